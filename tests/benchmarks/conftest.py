"""Small contests that cost nothing."""

import dataclasses
import typing

import pytest


@dataclasses.dataclass(frozen=True)
class FakeContest:
    """Appends the variants' names to ``log`` as they run."""

    device: str = "cpu"
    num_heads: int = 2
    head_dim: int = 8
    dtype: str = "float32"
    length: int = 64
    num_kv_heads: None = None
    passes: str = "forward_backward"
    teacher: str = "packed"
    units: str = "tokens"
    normalization: str = "block"
    wrong: str = ""
    nonsense: str = ""
    suite: str = "op"

    log: typing.ClassVar[list[str]] = []

    @property
    def name(self):
        return f"fake-2x{self.length}"

    def variants(self, names):
        return {name: lambda name=name: self.log.append(name) for name in names}

    def check(self, variant):
        return f"{variant} is wrong" if variant == self.wrong else None

    def check_result(self, variant, result):
        return f"{variant} returned nonsense" if variant == self.nonsense else None

    def needed_bytes(self, variant):
        return 1 << 60 if variant == "naive" and self.length > 1000 else None

    def roof_seconds(self, variant):
        return 1e-6 if variant == "cpp" else None


@pytest.fixture
def fake_contest():
    FakeContest.log.clear()
    return FakeContest
