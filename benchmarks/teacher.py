"""The frozen teacher's forward pass on one long joint input, with its attention computed in different ways."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    DebertaV2Config,
    ModernBertConfig,
    PreTrainedModel,
)

from benchmarks.contest import DTYPES
from idrm.capture import Teacher
from idrm.errors import InputError
from idrm_kernels.testing.cases import error_bound

# The shapes of all-MiniLM-L6, deberta-v3-large and ModernBERT-large, from their published configurations.
SHAPES = {
    "minilm": (
        BertConfig,
        {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12},
    ),
    "deberta-large": (
        DebertaV2Config,
        {
            "vocab_size": 128100,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "relative_attention": True,
            "position_buckets": 256,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "max_relative_positions": -1,
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    "modernbert-large": (
        ModernBertConfig,
        {"hidden_size": 1024, "intermediate_size": 2624, "num_hidden_layers": 28, "num_attention_heads": 16},
    ),
}
# The block at half depth is supervised, and the ones above it are left out.
HALF = "sdpa-half"
# Beyond the differences that DeBERTa's log buckets tell apart one by one.
CHECKED_LENGTH, CHECKED_LAYERS = 200, 4
# For the check, on the weights of what attention is computed from: at their initial scale it is nearly uniform, and
# hides errors. In a deep encoder they would make one rounding grow without bound.
SHARPENED, SHARPENING = ("query", "key", "Wqkv", "rel_embeddings"), 8.0
VOCABULARY = 1000  # of the inputs


def encoder(shape: str, max_length: int, layers: int | None = None) -> PreTrainedModel:
    """An encoder of a shape with random weights in torch's default dtype, for inputs of up to ``max_length`` tokens.

    ``layers`` makes it shallower than its shape.
    """
    kind, fields = SHAPES[shape]
    # DeBERTa's positions are relative, and the table of them has its published size.
    positions = {} if kind is DebertaV2Config else {"max_position_embeddings": max_length}
    depth = {} if layers is None else {"num_hidden_layers": layers}
    config = kind(**{**fields, **positions, **depth})
    return AutoModel.from_config(config, **({"add_pooling_layer": False} if kind is BertConfig else {}))


@dataclasses.dataclass(frozen=True)
class TeacherContest:
    """A frozen teacher's forward pass on one joint input of 2 x ``length`` tokens: the supervised block's queries.

    Variants are the attention implementations of ``idrm.capture.Teacher`` with the last block supervised; and
    "sdpa-half", which supervises the block at half depth and leaves out the ones above it.

    Attributes:
        layers, all_layers: blocks of the encoder, and how many its shape has.
    """

    device: str
    dtype: str
    shape: str
    length: int
    layers: int
    all_layers: int

    @property
    def suite(self) -> str:
        return "teacher"

    @property
    def name(self) -> str:
        return f"{self.device}-{self.dtype}-{self.shape}-{self.layers}-layers-2x{self.length}"

    def variants(self, names: tuple[str, ...]) -> Mapping[str, Callable[[], object]]:
        return {name: self._call(*self._plan(name)) for name in names}

    def check(self, variant: str) -> str | None:
        """The queries of a few blocks on a short input against eager ones in float64, by the tests' error rule."""
        implementation, _ = self._plan(variant)
        small = {"length": min(self.length, CHECKED_LENGTH), "layers": min(self.layers, CHECKED_LAYERS)}
        checked = dataclasses.replace(self, **small)
        _, layer = checked._plan(variant)
        try:
            result = checked._call(implementation, layer, sharpened=True)().double()
        except InputError as error:
            return str(error)
        eager, exact = (
            checked._call("eager", layer, dtype, sharpened=True)().double() for dtype in (None, torch.float64)
        )
        error, bound = (result - exact).abs().max(), error_bound(eager, exact, torch.finfo(DTYPES[self.dtype]).eps)
        return None if error <= bound else f"queries of {checked.name} are off by {error:.2g}, expected {bound:.2g}"

    def check_result(self, variant: str, result: Tensor) -> str | None:
        """Half the dtype's digits of what eager attention gives, in the norm."""
        if variant == "eager":
            return None
        expected = self._call("eager", self._plan(variant)[1])().double()
        error = ((result.double() - expected).norm() / expected.norm()).item()
        tolerance = torch.finfo(DTYPES[self.dtype]).eps ** 0.5
        return None if error <= tolerance else f"queries of {self.name} are off by {error:.2g} of their norm"

    def needed_bytes(self, variant: str) -> int | None:
        return None

    def roof_seconds(self, variant: str) -> float | None:
        return None

    def _plan(self, variant: str) -> tuple[str, int]:
        """The attention implementation, and the supervised block."""
        return ("sdpa", self.layers // 2 - 1) if variant == HALF else (variant, self.layers - 1)

    def _call(
        self, implementation: str, layer: int, dtype: torch.dtype | None = None, sharpened: bool = False
    ) -> Callable[[], Tensor]:
        model = _model(self, sharpened)
        # Modules of its own, which a Teacher changes, around the same weights.
        shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
        model = copy.deepcopy(model, {} if dtype else shared).to(dtype or model.dtype)
        teacher = Teacher(model, SimpleNamespace(model_input_names=()), (layer,), implementation)
        tokens = 2 * self.length
        content = torch.arange(1, tokens - 1)
        ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
        inputs = SimpleNamespace(
            teacher_input_ids=ids.to(self.device),
            teacher_attention_mask=torch.ones_like(ids).to(self.device),
            teacher_index=content.to(self.device),
            teacher_positions=content.int().to(self.device),
            teacher_span=tokens,
        )
        return lambda: teacher.attention(inputs)[0].q


# The contest's own and the one that its results are checked on.
@functools.lru_cache(maxsize=2)
def _model(contest: TeacherContest, sharpened: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[contest.dtype])
    try:
        with torch.device(contest.device):
            model = encoder(contest.shape, 2 * contest.length, contest.layers)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if sharpened and weight.dim() == 2 and any(part in name for part in SHARPENED):
                weight.mul_(SHARPENING)
    return model
