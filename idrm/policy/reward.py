"""A reward model as TRL's trainers ask for rewards: of prompts and completions, whatever tokenizer the policy has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from idrm.alignment.rendering import Message, TemplateRefusal
from idrm.errors import InputError
from idrm.evaluation.reward_model import RewardModel


def reward_function(model: RewardModel, batch_size: int) -> Callable[..., list[float]]:
    """What gives the reward of each completion, read after its prompt's messages as the reward model was trained to.

    An empty response is read too: its reward is that of the prompt with nothing after it.
    """

    def reward(
        completions: Sequence[Any], messages: Sequence[Sequence[Message]], conversational: Sequence[bool], **_: Any
    ) -> list[float]:
        sequences = []
        for completion, prompt, dialogue in zip(completions, messages, conversational, strict=True):
            text = completion if isinstance(completion, str) else completion[-1]["content"]
            # A dialogue's turns are read without the white space around them (`idrm.preference.formats`).
            response = {"role": "assistant", "content": text.strip() if dialogue else text}
            try:
                sequences.append(model.encode([*prompt, response], dialogue))
            except TemplateRefusal as refusal:
                raise InputError(f"the reward model's chat template refuses a response ({refusal})") from refusal
        return model.rewards(sequences, batch_size=batch_size, show_progress=False)

    return reward
