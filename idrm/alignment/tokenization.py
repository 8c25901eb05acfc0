"""One tokenisation of a text, with token spans in coordinates, and a tokenizer's template for pairs of texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from idrm.alignment.rendering import Span, Text
from idrm.errors import InputError


@dataclass(frozen=True)
class Tokens:
    """The tokens of one text.

    Attributes:
        ids: token ids.
        spans: for each token the coordinates (`Text.coordinates`) it covers; empty outside the message contents.
        in_content: for each token whether it stands in a message's content, be it only white space.
    """

    ids: list[int]
    spans: list[Span]
    in_content: list[bool]

    def append_special(self, token_id: int) -> None:
        self.ids.append(token_id)
        self.spans.append((0, 0))
        self.in_content.append(False)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], *, add_special_tokens: bool) -> list[Tokens]:
    """Tokenise each text by itself, uncut. The tokenizer must be a fast one: spans come from its offsets."""
    batch = tokenizer(
        [text.text for text in texts],
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_special_tokens_mask=True,
        padding=False,
        truncation=False,
        verbose=False,
    )
    segments = []
    for index, text in enumerate(texts):
        coordinates, contents = text.coordinates(), text.contents or []
        offsets, added = batch["offset_mapping"][index], batch["special_tokens_mask"][index]
        spans = [(coordinates[start], coordinates[end]) for start, end in offsets]
        in_content = [
            span[0] < span[1] or (not special and any(first <= start and end <= last for first, last in contents))
            for span, (start, end), special in zip(spans, offsets, added, strict=True)
        ]
        segments.append(Tokens(batch["input_ids"][index], spans, in_content))
    return segments


@dataclass(frozen=True)
class JointTemplate:
    """The special tokens that a teacher's tokenizer puts around a pair, and the token types of the five parts."""

    before: list[int]
    between: list[int]
    after: list[int]
    token_types: list[list[int]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "JointTemplate":
        encoding = tokenizer("a", "a")
        ids, segments = encoding["input_ids"], encoding.sequence_ids(0)
        types = encoding.get("token_type_ids", [0] * len(ids))
        if 0 not in segments or 1 not in segments or segments.index(0) > segments.index(1):
            raise InputError(f"{tokenizer.name_or_path}: expected a tokenizer that reads two texts one after the other")
        first, second = segments.index(0), segments.index(1)
        first_end, second_end = (len(segments) - segments[::-1].index(segment) for segment in (0, 1))
        bounds = [0, first, first_end, second, second_end, len(ids)]
        parts = [slice(start, end) for start, end in pairwise(bounds)]
        return cls(ids[parts[0]], ids[parts[2]], ids[parts[4]], [types[part] for part in parts])

    @property
    def num_special_tokens(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)

    def join(
        self, chosen: list[int], rejected: list[int], *, rejected_first: bool = False
    ) -> tuple[list[int], list[int], list[int]]:
        """(ids, token types, position of the first token of chosen and of rejected), in the order asked for."""
        first, second = (rejected, chosen) if rejected_first else (chosen, rejected)
        before, in_first, between, in_second, after = self.token_types
        types = [*before, *(in_first[:1] * len(first)), *between, *(in_second[:1] * len(second)), *after]
        ids = [*self.before, *first, *self.between, *second, *self.after]
        return ids, types, self.starts(len(chosen), len(rejected), rejected_first=rejected_first)

    def starts(self, chosen: int, rejected: int, *, rejected_first: bool) -> list[int]:
        """The position of the first token of chosen and of rejected, of so many tokens each."""
        first = len(self.before)
        second = first + (rejected if rejected_first else chosen) + len(self.between)
        return [second, first] if rejected_first else [first, second]
