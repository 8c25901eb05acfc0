"""A preference pair as both models read it: token ids, and which tokens of the two correspond."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from os.path import commonprefix
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from idrm.alignment.cutting import cut_each, cut_together, lengths_within, remaining_tokens, shared_cuts
from idrm.alignment.rendering import ChatRenderer, Span, TemplateRefusal, Text, canonical_text, plain_text
from idrm.alignment.units import NO_UNIT, Units, find_units
from idrm.errors import InputError

MIN_LENGTH = 8

_TOKENS = [Value("int32")]
_FEATURES = Features(
    {
        "chosen_input_ids": _TOKENS,
        "rejected_input_ids": _TOKENS,
        "teacher_input_ids": _TOKENS,
        "teacher_token_type_ids": _TOKENS,
        "student_positions": [_TOKENS],
        "student_units": [_TOKENS],
        "teacher_positions": [_TOKENS],
        "teacher_units": [_TOKENS],
        "num_units": _TOKENS,
        "response_units": _TOKENS,
        "dropped_student_tokens": Value("int32"),
        "dropped_teacher_tokens": Value("int32"),
        "cut_student": Value("bool"),
        "cut_teacher": Value("bool"),
        "unaligned": Value("bool"),
        "identical": Value("bool"),
        "margin": Value("float64"),
        "refusal": Value("string"),
        "units": Value("int32"),
        "one_to_one_units": Value("int32"),
        "longest_student_unit": Value("int32"),
        "longest_teacher_unit": Value("int32"),
        "student_content_tokens": Value("int32"),
        "teacher_content_tokens": Value("int32"),
    }
)
_STATISTICS = [
    "refusal",
    "units",
    "one_to_one_units",
    "longest_student_unit",
    "longest_teacher_unit",
    "student_content_tokens",
    "teacher_content_tokens",
]


@dataclass(frozen=True)
class _Tokens:
    """One tokenisation of one segment: ids, spans in coordinates, and which tokens stand in a message's content."""

    ids: list[int]
    spans: list[Span]
    in_content: list[bool]


@dataclass(frozen=True)
class _Division:
    """The units of both segments of a pair and where the prompts end among them."""

    units: list[Units]
    prompt_units: list[int]
    shared: list[tuple[int, int]] | None

    @classmethod
    def of(cls, units: list[Units], prompt_ends: Sequence[int], same_prompt: bool) -> "_Division":
        prompt_units = [bisect_right(segment.ends, end) for segment, end in zip(units, prompt_ends, strict=True)]
        shared = shared_cuts([segment.starts for segment in units], prompt_units) if same_prompt else None
        return cls(units, prompt_units, shared)


@dataclass(frozen=True)
class _JointTemplate:
    """The special tokens that a teacher's tokenizer puts around a pair, and the token types of the five parts."""

    before: list[int]
    between: list[int]
    after: list[int]
    token_types: list[list[int]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "_JointTemplate":
        encoding = tokenizer("a", "a")
        ids, segments = encoding["input_ids"], encoding.sequence_ids(0)
        types = encoding.get("token_type_ids", [0] * len(ids))
        if 0 not in segments or 1 not in segments or segments.index(0) > segments.index(1):
            raise InputError(f"{tokenizer.name_or_path}: expected a tokenizer that reads two texts one after the other")
        first, second = segments.index(0), segments.index(1)
        first_end, second_end = (len(segments) - segments[::-1].index(segment) for segment in (0, 1))
        bounds = [0, first, first_end, second, second_end, len(ids)]
        parts = [slice(start, end) for start, end in zip(bounds, bounds[1:], strict=False)]
        return cls(ids[parts[0]], ids[parts[2]], ids[parts[4]], [types[part] for part in parts])

    @property
    def num_special_tokens(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)

    def join(self, chosen: list[int], rejected: list[int]) -> tuple[list[int], list[int], list[int]]:
        """(ids, token types, position of each segment's first token)."""
        before, _, between, _, after = self.token_types
        types = [
            *before,
            *self.token_types[1][:1] * len(chosen),
            *between,
            *self.token_types[3][:1] * len(rejected),
            *after,
        ]
        starts = [len(self.before), len(self.before) + len(chosen) + len(self.between)]
        return [*self.before, *chosen, *self.between, *rejected, *self.after], types, starts


class PairEncoder:
    """Encodes one converted preference pair for the student and the teacher (DESIGN section 5).

    The student reads each segment by itself, through its chat template if it has one (tokenised without further special
    tokens, so that BOS is not doubled), else as plain text with the tokenizer's special tokens and EOS at its end. The
    teacher reads both segments' canonical texts in one input, by its tokenizer's own template for pairs.

    Inputs that are too long lose whole units from the left of the prompt, the response last; a leading BOS stays. The
    student's cut follows from `max_length` alone and the teacher's from `teacher_max_length` alone; units that either
    cannot read are in neither map. Nothing is tokenised again after cutting.
    """

    def __init__(
        self,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase | None,
        *,
        max_length: int,
        teacher_max_length: int,
    ) -> None:
        """
        Args:
            student_tokenizer: a fast tokenizer, with or without a chat template.
            teacher_tokenizer: a fast tokenizer, or None if nothing is distilled.
            max_length: the most tokens of one student sequence, special tokens included.
            teacher_max_length: the most tokens of the teacher's joint input, special tokens included.

        Raises:
            InputError: a slow tokenizer (it gives no offsets), one without a template for pairs, or a length under 8.
        """
        for whose, tokenizer in (("student", student_tokenizer), ("teacher", teacher_tokenizer)):
            if tokenizer is not None and not tokenizer.is_fast:
                raise InputError(
                    f"{tokenizer.name_or_path}: expected a fast tokenizer for the {whose} (its offsets align the two "
                    f"models), found the slow {type(tokenizer).__name__}"
                )
        for name, length in (("max_length", max_length), ("teacher_max_length", teacher_max_length)):
            if length < MIN_LENGTH:
                raise InputError(f"{name}: expected at least {MIN_LENGTH} tokens, found {length}")
        self.student_tokenizer = student_tokenizer
        self.teacher_tokenizer = teacher_tokenizer
        self.max_length = max_length
        self.teacher_max_length = teacher_max_length
        self._chat = ChatRenderer(student_tokenizer) if student_tokenizer.chat_template else None
        self._joint = _JointTemplate.of(teacher_tokenizer) if teacher_tokenizer is not None else None

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Encode one pair as `load_preferences` gives it.

        Returns a dict of lists and scalars; "per segment" means [chosen, rejected]:
            chosen_input_ids, rejected_input_ids: the student's inputs.
            teacher_input_ids, teacher_token_type_ids: the teacher's joint input; empty without a teacher.
            student_positions: per segment the positions, in its own input, of the tokens that take part.
            student_units: per segment the unit of each of them, from 0 in each segment, non-decreasing.
            teacher_positions, teacher_units: the same for the teacher, positions in the joint input.
            num_units: per segment. response_units: per segment how many of the units, the last ones, are the response's.
            dropped_student_tokens, dropped_teacher_tokens: content tokens in no unit, before any cutting.
            cut_student, cut_teacher: whether that model's input lost tokens.
            unaligned: the chat template altered a content, so that the pair has no units.
            identical: both student inputs came out the same, so that the pair teaches nothing.
            margin: float or None.
            refusal: what the chat template said when it refused these messages (all lists are empty then), else "".
            units, one_to_one_units, longest_student_unit, longest_teacher_unit (in tokens), student_content_tokens,
            teacher_content_tokens: for the report, before any cutting.
        """
        segments = (record["chosen"], record["rejected"])
        try:
            rendered = [self._render(messages, record["conversational"]) for messages in segments]
        except TemplateRefusal as refusal:
            return {**_nothing(record["margin"]), "refusal": str(refusal) or "refused"}
        student = self._tokenize_for_student(rendered)
        teacher, prompt_ends = [], [0, 0]
        if self._joint is not None:
            texts = [canonical_text(messages) for messages in segments]
            teacher = _tokenize(self.teacher_tokenizer, texts, add_special_tokens=False)

        unaligned = any(text.contents is None for text in rendered)
        same_prompt = segments[0][:-1] == segments[1][:-1]
        prompt_ends = [_length_without_spaces(messages[:-1]) for messages in segments]
        if unaligned:
            prefix = len(commonprefix([tokens.ids for tokens in student]))
            by_token = [[(i, i + 1) for i in range(len(tokens.ids))] for tokens in student]
            for_student = _Division.of([find_units(spans, spans) for spans in by_token], [prefix, prefix], True)
            own = [find_units(tokens.spans, tokens.spans) for tokens in teacher]
        else:
            others = teacher or student
            units = [find_units(s.spans, t.spans) for s, t in zip(student, others, strict=True)]
            for_student = _Division.of(units, prompt_ends, same_prompt)
            own = units
        for_teacher = _Division.of(own, prompt_ends, same_prompt) if teacher else None

        inputs, lost, student_cut = self._cut_student(student, for_student)
        encoded = _nothing(record["margin"])
        encoded["chosen_input_ids"], encoded["rejected_input_ids"] = inputs
        encoded["identical"] = inputs[0] == inputs[1]
        encoded["cut_student"] = any(count for _, count in lost)
        encoded["unaligned"] = unaligned
        if for_teacher is None:
            return encoded
        ids, types, shifts, teacher_cut = self._cut_teacher(teacher, for_teacher)
        encoded["teacher_input_ids"], encoded["teacher_token_type_ids"] = ids, types
        encoded["cut_teacher"] = len(ids) < self._joint.num_special_tokens + sum(len(t.ids) for t in teacher)
        if not unaligned:
            first = [max(cuts) for cuts in zip(student_cut, teacher_cut, strict=True)]
            encoded.update(_correspondence(for_teacher, first, lost, shifts))
            encoded.update(_statistics(units, student, teacher))
        return encoded

    @property
    def fingerprint(self) -> str:
        """A digest of all that decides what comes out: tokenizers, template, lengths and this code."""
        digest = sha256(f"{self.max_length} {self.teacher_max_length}".encode())
        for tokenizer in (self.student_tokenizer, self.teacher_tokenizer):
            if tokenizer is not None:
                digest.update(tokenizer.backend_tokenizer.to_str().encode())
                digest.update(repr((tokenizer.chat_template, tokenizer.special_tokens_map)).encode())
            digest.update(b"\0")
        package = Path(__file__).parent
        for module in sorted([*package.glob("*.py"), *(package.parent / "preference").glob("*.py")]):
            digest.update(module.read_bytes())
        return digest.hexdigest()

    def _render(self, messages: Sequence[dict[str, str]], conversational: bool) -> Text:
        return plain_text(messages, conversational) if self._chat is None else self._chat(messages)

    def _tokenize_for_student(self, texts: Sequence[Text]) -> list[_Tokens]:
        plain = self._chat is None
        segments = _tokenize(self.student_tokenizer, texts, add_special_tokens=plain)
        eos = self.student_tokenizer.eos_token_id
        for tokens in segments:
            if plain and eos is not None and tokens.ids[-1:] != [eos]:
                tokens.ids.append(eos)
                tokens.spans.append((0, 0))
                tokens.in_content.append(False)
        return segments

    def _cut_student(
        self, segments: Sequence[_Tokens], division: _Division
    ) -> tuple[list[list[int]], list[tuple[int, int]], tuple[int, int]]:
        """(inputs, per segment (leading tokens that stay, tokens lost behind them), per segment units lost)."""
        always_first = {self.student_tokenizer.bos_token_id, self.student_tokenizer.cls_token_id} - {None}
        leading = int(all(tokens.ids[:1] and tokens.ids[0] in always_first for tokens in segments))
        limit = self.max_length - leading
        remaining = [remaining_tokens(units.student[leading:], len(units)) for units in division.units]
        cut = cut_each(remaining, division.shared, limit)
        inputs, lost = [], []
        for tokens, left, units in zip(segments, remaining, cut, strict=True):
            start = len(tokens.ids) - min(left[units], limit)
            inputs.append(tokens.ids[:leading] + tokens.ids[start:])
            lost.append((leading, start - leading))
        return inputs, lost, cut

    def _cut_teacher(
        self, segments: Sequence[_Tokens], division: _Division
    ) -> tuple[list[int], list[int], list[int], tuple[int, int]]:
        """(ids, token types, per segment what to add to a token's index to get its position, per segment units lost)."""
        limit = self.teacher_max_length - self._joint.num_special_tokens
        remaining = [remaining_tokens(units.teacher, len(units)) for units in division.units]
        cut = cut_together(remaining, division.prompt_units, division.shared, limit)
        lengths = lengths_within([left[units] for left, units in zip(remaining, cut, strict=True)], limit)
        starts = [len(tokens.ids) - length for tokens, length in zip(segments, lengths, strict=True)]
        ids, types, first_positions = self._joint.join(
            *(tokens.ids[start:] for tokens, start in zip(segments, starts, strict=True))
        )
        shifts = [position - start for position, start in zip(first_positions, starts, strict=True)]
        return ids, types, shifts, cut


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], *, add_special_tokens: bool) -> list[_Tokens]:
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
            start_at < end_at
            or (not special and any(first <= start and end <= last for first, last in contents))
            for (start_at, end_at), (start, end), special in zip(spans, offsets, added, strict=True)
        ]
        segments.append(_Tokens(batch["input_ids"][index], spans, in_content))
    return segments


def _length_without_spaces(messages: Sequence[dict[str, str]]) -> int:
    return sum(len("".join(message["content"].split())) for message in messages)


def _correspondence(
    division: _Division, first: Sequence[int], lost: Sequence[tuple[int, int]], shifts: Sequence[int]
) -> dict[str, Any]:
    """Positions and units of the tokens whose unit is `first` or a later one, per segment."""
    columns: dict[str, Any] = {
        name: [] for name in ("student_positions", "student_units", "teacher_positions", "teacher_units")
    }
    for units, start, (leading, count), shift in zip(division.units, first, lost, shifts, strict=True):
        student = [(token, unit - start) for token, unit in enumerate(units.student) if unit >= start]
        teacher = [(token, unit - start) for token, unit in enumerate(units.teacher) if unit >= start]
        columns["student_positions"].append([token - count if token >= leading else token for token, _ in student])
        columns["student_units"].append([unit for _, unit in student])
        columns["teacher_positions"].append([token + shift for token, _ in teacher])
        columns["teacher_units"].append([unit for _, unit in teacher])
    columns["num_units"] = [len(units) - start for units, start in zip(division.units, first, strict=True)]
    columns["response_units"] = [
        len(units) - max(start, prompt)
        for units, start, prompt in zip(division.units, first, division.prompt_units, strict=True)
    ]
    return columns


def _statistics(units: Sequence[Units], student: Sequence[_Tokens], teacher: Sequence[_Tokens]) -> dict[str, int]:
    counts = {
        side: [Counter(unit for unit in getattr(segment, side) if unit != NO_UNIT) for segment in units]
        for side in ("student", "teacher")
    }
    statistics = {
        "units": sum(len(segment) for segment in units),
        "one_to_one_units": sum(
            ours[unit] == theirs[unit] == 1
            for ours, theirs in zip(counts["student"], counts["teacher"], strict=True)
            for unit in ours
        ),
    }
    for side, segments in (("student", student), ("teacher", teacher)):
        content = sum(sum(tokens.in_content) for tokens in segments)
        statistics[f"{side}_content_tokens"] = content
        statistics[f"dropped_{side}_tokens"] = content - sum(count.total() for count in counts[side])
        statistics[f"longest_{side}_unit"] = max((max(count.values(), default=0) for count in counts[side]), default=0)
    return statistics


def _nothing(margin: float | None) -> dict[str, Any]:
    """The columns of a pair of which nothing is known yet."""
    per_segment = ("student_positions", "student_units", "teacher_positions", "teacher_units")
    inputs = ("chosen_input_ids", "rejected_input_ids", "teacher_input_ids", "teacher_token_type_ids")
    flags = ("cut_student", "cut_teacher", "unaligned", "identical")
    counts = [name for name, feature in _FEATURES.items() if feature == Value("int32")]
    return {
        **{name: [] for name in inputs},
        **{name: [[], []] for name in per_segment},
        "num_units": [0, 0],
        "response_units": [0, 0],
        **{name: 0 for name in counts},
        **{name: False for name in flags},
        "margin": margin,
        "refusal": "",
    }


@dataclass(frozen=True)
class AlignmentReport:
    """What encoding did to the pairs of one data set.

    Attributes:
        pairs: pairs that came in; `kept` of them came out, the others are counted in `dropped` by reason.
        refusal: what the chat template said when it first refused a pair; empty if it never did.
        unaligned: kept pairs without units: they train the preference loss only.
        cut_student, cut_teacher: kept pairs that were cut for that model.
        units, one_to_one_units: units of the kept pairs' whole texts, and those that are one token on either side.
        student_tokens, teacher_tokens: their content tokens; dropped_*: those of them in no unit.
        longest_student_unit, longest_teacher_unit: the most tokens in one unit.
    """

    pairs: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    refusal: str = ""
    unaligned: int = 0
    cut_student: int = 0
    cut_teacher: int = 0
    units: int = 0
    one_to_one_units: int = 0
    student_tokens: int = 0
    dropped_student_tokens: int = 0
    teacher_tokens: int = 0
    dropped_teacher_tokens: int = 0
    longest_student_unit: int = 0
    longest_teacher_unit: int = 0

    def summary(self) -> str:
        """One line for the log."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items()) or "none"
        parts = [f"{self.pairs:,} pairs encoded, {self.kept:,} kept; dropped: {reasons}"]
        if self.refusal:
            parts.append(f"the chat template said {self.refusal!r}")
        parts.append(f"cut for the student: {_share(self.cut_student, self.kept)}")
        if self.units or self.unaligned:
            parts += [
                f"cut for the teacher: {_share(self.cut_teacher, self.kept)}",
                f"unaligned: {self.unaligned:,}",
                f"units of one token to one: {_share(self.one_to_one_units, self.units)}",
                f"longest units: {self.longest_student_unit} student and {self.longest_teacher_unit} teacher tokens",
                f"content tokens in no unit: {_share(self.dropped_student_tokens, self.student_tokens)} of the student's, "
                f"{_share(self.dropped_teacher_tokens, self.teacher_tokens)} of the teacher's",
            ]
        return "; ".join(parts)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def encode_preferences(
    dataset: Dataset, encoder: PairEncoder, *, num_proc: int | None = None
) -> tuple[Dataset, AlignmentReport]:
    """Encode all pairs of a data set from `load_preferences`; drop, and count, those that cannot be trained on.

    Args:
        dataset: columns chosen, rejected, conversational, margin.
        encoder: what to encode them with. Results are cached by `datasets` under the encoder's fingerprint.
        num_proc: processes to share the work; None for this one alone.

    Returns:
        (dataset, report): the columns that `PairEncoder` returns, up to and including margin.

    Raises:
        InputError: no pair is left.
    """
    fingerprint = sha256(f"{dataset._fingerprint} {encoder.fingerprint}".encode()).hexdigest()
    encoded = dataset.map(
        encoder,
        remove_columns=dataset.column_names,
        features=_FEATURES,
        num_proc=num_proc,
        new_fingerprint=fingerprint,
        desc="Encoding pairs",
    )
    refusals, identical = encoded["refusal"][:], encoded["identical"][:]
    reasons = [
        "refused_by_chat_template" if refusal else "identical_after_cutting" if same else ""
        for refusal, same in zip(refusals, identical, strict=True)
    ]
    dropped = dict(sorted(Counter(reason for reason in reasons if reason).items()))
    if dropped:
        encoded = encoded.select([index for index, reason in enumerate(reasons) if not reason])
    totals = {
        name: sum(encoded[name][:])
        for name in (
            "unaligned",
            "cut_student",
            "cut_teacher",
            "units",
            "one_to_one_units",
            "dropped_student_tokens",
            "dropped_teacher_tokens",
        )
    }
    report = AlignmentReport(
        pairs=len(reasons),
        kept=len(encoded),
        dropped=dropped,
        refusal=next((refusal for refusal in refusals if refusal), ""),
        student_tokens=sum(encoded["student_content_tokens"][:]),
        teacher_tokens=sum(encoded["teacher_content_tokens"][:]),
        longest_student_unit=max(encoded["longest_student_unit"][:], default=0),
        longest_teacher_unit=max(encoded["longest_teacher_unit"][:], default=0),
        **totals,
    )
    if not report.kept:
        raise InputError(f"no pair can be trained on ({report.summary()})")
    return encoded.remove_columns(_STATISTICS), report
