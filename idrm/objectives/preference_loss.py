"""The loss of a pair's two rewards: Bradley-Terry with a margin, label smoothing and the confidence term."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class PreferenceLoss:
    """Cross-entropy of sigmoid(chosen - rejected - margin) and a target, which is 1 for Bradley-Terry.

        target = (1 - a) * (1 - label_smoothing) + a * agreement,   a = confidence_weight * min(1, progress / warm-up)

    Sources: adaptive margins and label smoothing, "Secrets of RLHF in Large Language Models Part II", arXiv 2401.06080
    (section 2); the confidence term, "Weak-to-Strong Generalization", arXiv 2312.09390 (appendix A.4), with the
    threshold of its published code. docs/objectives.md has the formulas.

    Attributes:
        label_smoothing: how likely a label is taken to be wrong, 0 to below 0.5.
        confidence_weight: weight of the model's own judgement in the target once it is warmed up, 0 to below 1.
        confidence_warmup: share of training over which it grows from 0; 0 for none.
    """

    label_smoothing: float = 0.0
    confidence_weight: float = 0.0
    confidence_warmup: float = 0.2

    def __call__(
        self,
        rewards: Tensor,
        margin: Tensor | float = 0.0,
        *,
        chosen_is_first: Tensor | None = None,
        progress: float = 1.0,
    ) -> Tensor:
        """The loss of B pairs, (B,), in the dtype of the rewards.

        Args:
            rewards: (2, B), chosen and rejected.
            margin: (B,), or one for all.
            chosen_is_first: (B,) bool, the order that was drawn for each pair; None leaves the confidence term out, as
                evaluation does, whose pairs must not depend on their batch.
            progress: share of training that is behind, 0 to 1.
        """
        chosen, rejected = rewards
        logits = chosen - rejected - margin
        target: Tensor | float = 1 - self.label_smoothing
        weight = self._confidence_weight(progress)
        if weight and chosen_is_first is not None:
            target = (1 - weight) * target + weight * agreement(logits, chosen_is_first).to(logits.dtype)
        return -target * logsigmoid(logits) - (1 - target) * logsigmoid(-logits)

    def _confidence_weight(self, progress: float) -> float:
        if not self.confidence_warmup:
            return self.confidence_weight
        return self.confidence_weight * min(1.0, progress / self.confidence_warmup)


@torch.no_grad()
def agreement(logits: Tensor, chosen_is_first: Tensor) -> Tensor:
    """Which of B pairs the model judges as they are labelled, once it has to find as many firsts as there are.

    Of K pairs whose first sequence is the chosen one, the model is taken to name the K whose first sequence it prefers
    most. Without a drawn order all K = B are right whatever the model says, and the term does nothing.

    Args:
        logits: (B,), in favour of chosen.
        chosen_is_first: (B,) bool.

    Returns:
        (B,) bool.
    """
    in_favour_of_first = torch.where(chosen_is_first, logits, -logits)
    order = in_favour_of_first.argsort(descending=True, stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return (place < chosen_is_first.sum()) == chosen_is_first
