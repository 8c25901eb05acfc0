"""Encoding of a whole data set: every pair encoded, every pair that cannot be trained on dropped and counted."""

from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256

from datasets import Dataset, Features, Value

from idrm.alignment.encoding import PairEncoder
from idrm.errors import InputError

_TOKENS = [Value("int32")]
_FEATURES = Features(
    {
        "chosen_input_ids": _TOKENS,
        "rejected_input_ids": _TOKENS,
        "teacher_input_ids": _TOKENS,
        "teacher_token_type_ids": _TOKENS,
        "teacher_window_lengths": _TOKENS,
        "student_positions": [_TOKENS],
        "student_units": [_TOKENS],
        "teacher_positions": [_TOKENS],
        "teacher_units": [_TOKENS],
        "teacher_places": [_TOKENS],
        "teacher_tokens": Value("int32"),
        "teacher_reading": Value("string"),
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
class AlignmentReport:
    """What encoding did to the pairs of one data set.

    Attributes:
        pairs: pairs that came in; `kept` of them came out, the others are counted in `dropped` by reason.
        refusal: what the chat template said when it first refused a pair; empty if it never did.
        unaligned: kept pairs without units: they train the preference loss only.
        cut_student, cut_teacher: kept pairs that were cut for that model.
        read_in_windows: kept pairs that the teacher reads in several inputs.
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
    read_in_windows: int = 0
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
                *([f"read in windows: {_share(self.read_in_windows, self.kept)}"] if self.read_in_windows else ()),
                f"unaligned: {self.unaligned:,}",
                f"units of one token to one: {_share(self.one_to_one_units, self.units)}",
                f"longest units: {self.longest_student_unit} student and {self.longest_teacher_unit} teacher tokens",
                f"student tokens in no unit: {_share(self.dropped_student_tokens, self.student_tokens)}",
                f"teacher tokens in no unit: {_share(self.dropped_teacher_tokens, self.teacher_tokens)}",
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
    fingerprint = sha256(f"{dataset._fingerprint} {encoder.fingerprint}".encode()).hexdigest()[
        :32
    ]  # datasets refuses long ones
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
        read_in_windows=sum(len(lengths) > 1 for lengths in encoded["teacher_window_lengths"][:]),
        student_tokens=sum(encoded["student_content_tokens"][:]),
        teacher_tokens=sum(encoded["teacher_content_tokens"][:]),
        longest_student_unit=max(encoded["longest_student_unit"][:], default=0),
        longest_teacher_unit=max(encoded["longest_teacher_unit"][:], default=0),
        **totals,
    )
    if not report.kept:
        raise InputError(f"no pair can be trained on ({report.summary()})")
    return encoded.remove_columns(_STATISTICS), report
