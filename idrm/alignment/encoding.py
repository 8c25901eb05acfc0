"""A preference pair as both models read it: token ids, and which tokens of the two correspond."""

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from idrm.alignment.cutting import cut_each, cut_together, lengths_within, remaining_tokens, shared_cuts
from idrm.alignment.rendering import ChatRenderer, Message, Span, TemplateRefusal, Text, canonical_text, plain_text
from idrm.alignment.tokenization import JointTemplate, Tokens, tokenize
from idrm.alignment.units import NO_UNIT, Units, find_units
from idrm.alignment.windows import divide_into_windows
from idrm.errors import InputError

MIN_LENGTH = 8


@dataclass(frozen=True)
class _Division:
    """The units of both segments of a pair, and at which of them the prompts end.

    `shared` lists the ways to cut the same from both segments (`cutting.shared_cuts`); None if their prompts differ.
    """

    units: list[Units]
    prompt_units: list[int]
    shared: list[tuple[int, int]] | None

    @classmethod
    def of(cls, units: list[Units], prompt_ends: Sequence[int], same_prompt: bool) -> "_Division":
        prompt_units = [bisect_right(segment.ends, end) for segment, end in zip(units, prompt_ends, strict=True)]
        shared = shared_cuts([segment.starts for segment in units], prompt_units) if same_prompt else None
        return cls(units, prompt_units, shared)


@dataclass(frozen=True)
class _StudentInput:
    """Both segments cut to fit: ids, how many of their first tokens no cut takes, tokens and units that one took."""

    ids: list[list[int]]
    leading: int
    lost_tokens: list[int]
    lost_units: tuple[int, int]

    def position(self, segment: int, token: int) -> int:
        return token if token < self.leading else token - self.lost_tokens[segment]


@dataclass(frozen=True)
class _TeacherInput:
    """What the teacher reads of a pair: one joint input, cut to fit, or the windows of one that is left whole.

    Attributes:
        ids, token_types: of the joint input, or of all windows one after the other.
        window_lengths: their lengths; one where there are no windows.
        origins: the position in the joint input at which each segment, uncut, would start.
        places: per segment, for each token that is read, its index into ``ids``.
        lost_tokens: per segment the first tokens, which are not read. lost_units: the units they were.
    """

    ids: list[int]
    token_types: list[int]
    window_lengths: list[int]
    origins: list[int]
    places: list[list[int]]
    lost_tokens: list[int]
    lost_units: tuple[int, int]

    def position(self, segment: int, token: int) -> int:
        return token + self.origins[segment]

    def place(self, segment: int, token: int) -> int:
        return self.places[segment][token - self.lost_tokens[segment]]


@dataclass(frozen=True)
class StudentContents:
    """What the student reads of one segment, and which of its tokens are the messages' contents.

    Attributes:
        ids: the input, cut to fit.
        positions: of the content tokens that are left, ascending. A token of white space alone is none.
        spans: what each of them covers, in characters of the contents without white space.
        prompt_tokens: how many of them, the first ones, belong to the prompt.
    """

    ids: list[int]
    positions: list[int]
    spans: list[Span]
    prompt_tokens: int


class PairEncoder:
    """Encodes one converted preference pair for the student and the teacher (DESIGN section 5).

    The student reads each segment by itself, through its chat template if it has one (tokenised without further special
    tokens, so that BOS is not doubled), else as plain text with the tokenizer's special tokens and EOS at its end. The
    teacher reads both segments' canonical texts in one input, by its tokenizer's own template for pairs.

    Inputs that are too long lose whole units from the left of the prompt, the response last; a leading BOS stays. The
    student's cut follows from `max_length` alone and the teacher's from `teacher_max_length` alone; units that either
    cannot read are in neither map. Nothing is tokenised again after cutting. With `teacher_long_inputs` "windows" the
    teacher loses nothing: what is too long for it is read in several inputs (`windows.divide_into_windows`).
    """

    def __init__(
        self,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase | None,
        *,
        max_length: int,
        teacher_max_length: int,
        teacher_segment_order: Literal["chosen_first", "random"] = "chosen_first",
        teacher_long_inputs: Literal["cut", "windows"] = "cut",
        seed: int = 0,
    ) -> None:
        """
        Args:
            student_tokenizer: a fast tokenizer, with or without a chat template.
            teacher_tokenizer: a fast tokenizer, or None if nothing is distilled.
            max_length: the most tokens of one student sequence, special tokens included.
            teacher_max_length: the most tokens of the teacher's joint input, special tokens included.
            teacher_segment_order: which segment the teacher reads first: "random" decides it for every pair by a hash
                of its texts and `seed`, so that a pair's order is the same in every epoch, process and run.
            teacher_long_inputs: "cut", or "windows" to read long pairs whole in several inputs.

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
        self.teacher_segment_order = teacher_segment_order
        self.teacher_long_inputs = teacher_long_inputs
        self.seed = seed
        self._chat = ChatRenderer(student_tokenizer) if student_tokenizer.chat_template else None
        self._joint = JointTemplate.of(teacher_tokenizer) if teacher_tokenizer is not None else None

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Encode one pair as `load_preferences` gives it.

        Returns a dict of lists and scalars; "per segment" means [chosen, rejected]:
            chosen_input_ids, rejected_input_ids: the student's inputs.
            teacher_input_ids, teacher_token_type_ids: the teacher's joint input, or its windows one after the other;
                empty without a teacher.
            teacher_window_lengths: the tokens of each of them; one number where there are no windows.
            student_positions: per segment the positions, in its own input, of the tokens that take part.
            student_units: per segment the unit of each of them, from 0 in each segment, non-decreasing.
            teacher_positions, teacher_units: the same for the teacher; positions in the joint input, which under
                "windows" is one that holds both segments whole.
            teacher_places: per segment where in teacher_input_ids each of these tokens is read: its position, but
                under "windows".
            teacher_tokens: how many tokens of the teacher's take part, of both segments.
            teacher_reading: a digest of all that decides what the teacher's maps of this pair are, the teacher aside:
                its inputs, and its tokens' places, positions and units; "" where there are no units.
            num_units: per segment. response_units: per segment how many of them, the last ones, lie in the response.
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
            return {**_blank(record["margin"]), "refusal": str(refusal) or "refused"}
        student = self._tokenize_for_student(rendered)
        teacher = self._tokenize_for_teacher(segments)
        unaligned = any(text.contents is None for text in rendered)
        prompt_ends = [_length_without_spaces(messages[:-1]) for messages in segments]
        same_prompt = segments[0][:-1] == segments[1][:-1]

        if unaligned:  # each model is cut by its own tokens
            division = _divide_unaligned(student)
            units = [find_units(tokens.spans, tokens.spans) for tokens in teacher]
        else:
            units = [find_units(s.spans, t.spans) for s, t in zip(student, teacher or student, strict=True)]
            division = _Division.of(units, prompt_ends, same_prompt)
        student_input = self._cut_student(student, division)
        encoded = {
            **_blank(record["margin"]),
            "chosen_input_ids": student_input.ids[0],
            "rejected_input_ids": student_input.ids[1],
            "cut_student": any(student_input.lost_tokens),
            "identical": student_input.ids[0] == student_input.ids[1],
            "unaligned": unaligned,
        }
        if not teacher:
            return encoded
        teacher_division = _Division.of(units, prompt_ends, same_prompt) if unaligned else division
        teacher_input = self._read_by_teacher(teacher, teacher_division, self._rejected_first(segments))
        encoded |= {
            "teacher_input_ids": teacher_input.ids,
            "teacher_token_type_ids": teacher_input.token_types,
            "teacher_window_lengths": teacher_input.window_lengths,
            "cut_teacher": any(teacher_input.lost_tokens),
        }
        if not unaligned:
            encoded |= _correspondence(division, student_input, teacher_input) | _statistics(units, student, teacher)
            encoded["teacher_tokens"] = sum(map(len, encoded["teacher_places"]))
            encoded["teacher_reading"] = digest_of_reading(encoded)
        return encoded

    def response_tokens(self, messages: Sequence[Message], conversational: bool) -> int | None:
        """How many tokens of a student's sequence, the last ones, are its response and what the template ends it with.

        Before any cutting, which takes the response last. None where the template altered a content.

        Raises TemplateRefusal with the chat template's own words.
        """
        text = self._render(messages, conversational)
        if text.contents is None:
            return None
        length = len(self._tokenize_for_student([text])[0].ids)
        start = text.contents[-1][0]
        # In characters: white space at the beginning of a response has no coordinates.
        offsets = self.student_tokenizer(
            text.text, add_special_tokens=self._chat is None, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        return length - next((index for index, (_, end) in enumerate(offsets) if end > start), len(offsets))

    @property
    def fingerprint(self) -> str:
        """A digest of all that decides what comes out: tokenizers, template, lengths and this code."""
        order = (self.teacher_segment_order, *((self.seed,) if self.teacher_segment_order == "random" else ()))
        settings = (self.max_length, self.teacher_max_length, order, self.teacher_long_inputs)
        digest = sha256(repr(settings).encode())
        for tokenizer in (self.student_tokenizer, self.teacher_tokenizer):
            if tokenizer is not None:
                digest.update(tokenizer.backend_tokenizer.to_str().encode())
                digest.update(repr((tokenizer.chat_template, tokenizer.special_tokens_map)).encode())
            digest.update(b"\0")
        package = Path(__file__).parent
        reading = [package.parent / "sources.py", *(package.parent / "preference").glob("*.py")]
        for module in sorted([*package.glob("*.py"), *reading]):
            digest.update(module.read_bytes())
        return digest.hexdigest()

    def student_contents(self, record: Mapping[str, Any]) -> list[StudentContents]:
        """The student's inputs of a pair, as without a teacher, and their content tokens; [chosen, rejected].

        Both are without content tokens if the chat template altered a content.

        Raises TemplateRefusal with the chat template's own words.
        """
        segments = (record["chosen"], record["rejected"])
        rendered = [self._render(messages, record["conversational"]) for messages in segments]
        student = self._tokenize_for_student(rendered)
        if any(text.contents is None for text in rendered):
            cut = self._cut_student(student, _divide_unaligned(student))
            return [StudentContents(ids, [], [], 0) for ids in cut.ids]
        units = [find_units(tokens.spans, tokens.spans) for tokens in student]
        prompt_ends = [_length_without_spaces(messages[:-1]) for messages in segments]
        division = _Division.of(units, prompt_ends, segments[0][:-1] == segments[1][:-1])
        cut = self._cut_student(student, division)
        contents = []
        for segment, (tokens, prompt_units) in enumerate(zip(student, division.prompt_units, strict=True)):
            unit_of_token = units[segment].student
            kept = [token for token, unit in enumerate(unit_of_token) if unit >= cut.lost_units[segment]]
            contents.append(
                StudentContents(
                    ids=cut.ids[segment],
                    positions=[cut.position(segment, token) for token in kept],
                    spans=[tokens.spans[token] for token in kept],
                    prompt_tokens=sum(unit_of_token[token] < prompt_units for token in kept),
                )
            )
        return contents

    def _render(self, messages: Sequence[Message], conversational: bool) -> Text:
        return plain_text(messages, conversational) if self._chat is None else self._chat(messages)

    def _tokenize_for_student(self, texts: Sequence[Text]) -> list[Tokens]:
        plain = self._chat is None
        segments = tokenize(self.student_tokenizer, texts, add_special_tokens=plain)
        eos = self.student_tokenizer.eos_token_id
        for tokens in segments:
            if plain and eos is not None and tokens.ids[-1:] != [eos]:
                tokens.append_special(eos)
        return segments

    def _tokenize_for_teacher(self, segments: Sequence[Sequence[Message]]) -> list[Tokens]:
        if self.teacher_tokenizer is None:
            return []
        texts = [canonical_text(messages) for messages in segments]
        return tokenize(self.teacher_tokenizer, texts, add_special_tokens=False)

    def _cut_student(self, segments: Sequence[Tokens], division: _Division) -> _StudentInput:
        starts_of_text = {self.student_tokenizer.bos_token_id, self.student_tokenizer.cls_token_id} - {None}
        leading = 1 if all(starts_of_text.intersection(tokens.ids[:1]) for tokens in segments) else 0
        limit = self.max_length - leading
        remaining = [remaining_tokens(units.student[leading:], len(units)) for units in division.units]
        lost_units = cut_each(remaining, division.shared, limit)
        ids, lost_tokens = [], []
        for tokens, left, units in zip(segments, remaining, lost_units, strict=True):
            start = len(tokens.ids) - min(left[units], limit)
            ids.append(tokens.ids[:leading] + tokens.ids[start:])
            lost_tokens.append(start - leading)
        return _StudentInput(ids, leading, lost_tokens, lost_units)

    def _rejected_first(self, segments: Sequence[Sequence[Message]]) -> bool:
        if self.teacher_segment_order == "chosen_first":
            return False
        digest = sha256(str(self.seed).encode())
        for messages in segments:
            digest.update(b"\0" + canonical_text(messages).text.encode(errors="surrogatepass"))
        return digest.digest()[0] % 2 == 1

    def _read_by_teacher(self, segments: Sequence[Tokens], division: _Division, rejected_first: bool) -> _TeacherInput:
        """The input of the segments [chosen, rejected], which the teacher may read in the other order."""
        limit = self.teacher_max_length - self._joint.num_special_tokens
        if self.teacher_long_inputs == "windows":
            lost_units = (0, 0)
            lengths = (len(segments[0].ids), len(segments[1].ids))
        else:
            remaining = [remaining_tokens(units.teacher, len(units)) for units in division.units]
            lost_units = cut_together(remaining, division.prompt_units, division.shared, limit)
            lengths = lengths_within([left[units] for left, units in zip(remaining, lost_units, strict=True)], limit)
        lost_tokens = [len(tokens.ids) - length for tokens, length in zip(segments, lengths, strict=True)]
        texts = [tokens.ids[lost:] for tokens, lost in zip(segments, lost_tokens, strict=True)]

        ids, token_types, window_lengths, window_starts = [], [], [], []
        divided = divide_into_windows(lengths, limit)
        for window in range(len(divided[0].starts)):
            stretches = [text[part.stretch(window)] for text, part in zip(texts, divided, strict=True)]
            joined, types, starts = self._joint.join(*stretches, rejected_first=rejected_first)
            window_starts.append([len(ids) + start for start in starts])
            ids += joined
            token_types += types
            window_lengths.append(len(joined))
        places = [
            [window_starts[window][segment] + token - part.starts[window] for token, window in enumerate(part.owners())]
            for segment, part in enumerate(divided)
        ]
        whole_starts = self._joint.starts(*lengths, rejected_first=rejected_first)
        origins = [start - lost for start, lost in zip(whole_starts, lost_tokens, strict=True)]
        return _TeacherInput(ids, token_types, window_lengths, origins, places, lost_tokens, lost_units)


def _length_without_spaces(messages: Sequence[Message]) -> int:
    return sum(len("".join(message["content"].split())) for message in messages)


def _divide_unaligned(segments: Sequence[Tokens]) -> _Division:
    """A division in which a token is a unit, and what both segments begin with is the prompt."""
    chosen, rejected = (tokens.ids for tokens in segments)
    differing = (i for i, (ours, theirs) in enumerate(zip(chosen, rejected, strict=False)) if ours != theirs)
    prompt_end = next(differing, min(len(chosen), len(rejected)))
    tokens_as_spans = [[(token, token + 1) for token in range(len(ids))] for ids in (chosen, rejected)]
    return _Division.of([find_units(spans, spans) for spans in tokens_as_spans], [prompt_end, prompt_end], True)


def _correspondence(division: _Division, student: _StudentInput, teacher: _TeacherInput) -> dict[str, Any]:
    """Positions and units of the tokens, per segment, of the units that neither model lost."""
    columns: dict[str, list] = {
        "student_positions": [],
        "student_units": [],
        "teacher_positions": [],
        "teacher_units": [],
        "teacher_places": [],
        "num_units": [],
        "response_units": [],
    }
    for segment, (units, prompt_units) in enumerate(zip(division.units, division.prompt_units, strict=True)):
        first = max(student.lost_units[segment], teacher.lost_units[segment])
        for whose, unit_of_token, model_input in (
            ("student", units.student, student),
            ("teacher", units.teacher, teacher),
        ):
            kept = [token for token, unit in enumerate(unit_of_token) if unit >= first]
            columns[f"{whose}_positions"].append([model_input.position(segment, token) for token in kept])
            columns[f"{whose}_units"].append([unit_of_token[token] - first for token in kept])
            if model_input is teacher:
                columns["teacher_places"].append([teacher.place(segment, token) for token in kept])
        columns["num_units"].append(len(units) - first)
        columns["response_units"].append(len(units) - max(first, prompt_units))
    return columns


def digest_of_reading(encoded: Mapping[str, Any]) -> str:
    """The column teacher_reading of an encoded pair (`PairEncoder`), "" if it has no units."""
    if not sum(encoded["num_units"]):
        return ""
    digest = blake2b(digest_size=16)
    lists = [encoded[name] for name in ("teacher_input_ids", "teacher_token_type_ids", "teacher_window_lengths")]
    for name in ("teacher_places", "teacher_positions", "teacher_units"):
        lists += encoded[name]
    for numbers in [*lists, encoded["num_units"]]:
        digest.update(array("q", [len(numbers), *numbers]).tobytes())
    return digest.hexdigest()


def _statistics(units: Sequence[Units], student: Sequence[Tokens], teacher: Sequence[Tokens]) -> dict[str, int]:
    """The counts that a report sums up, over whole texts."""
    columns = {"units": sum(len(segment) for segment in units), "one_to_one_units": 0}
    sizes = {
        "student": [Counter(segment.student) for segment in units],
        "teacher": [Counter(segment.teacher) for segment in units],
    }
    for ours, theirs, segment in zip(sizes["student"], sizes["teacher"], units, strict=True):
        columns["one_to_one_units"] += sum(ours[unit] == 1 == theirs[unit] for unit in range(len(segment)))
    for whose, segments in (("student", student), ("teacher", teacher)):
        in_units = [{unit: size for unit, size in counter.items() if unit != NO_UNIT} for counter in sizes[whose]]
        content = sum(sum(tokens.in_content) for tokens in segments)
        columns[f"{whose}_content_tokens"] = content
        columns[f"dropped_{whose}_tokens"] = content - sum(sum(counter.values()) for counter in in_units)
        columns[f"longest_{whose}_unit"] = max(max(counter.values(), default=0) for counter in in_units)
    return columns


def _blank(margin: float | None) -> dict[str, Any]:
    """All columns of a pair of which nothing is known yet but its margin."""
    return {
        "chosen_input_ids": [],
        "rejected_input_ids": [],
        "teacher_input_ids": [],
        "teacher_token_type_ids": [],
        "teacher_window_lengths": [],
        "student_positions": [[], []],
        "student_units": [[], []],
        "teacher_positions": [[], []],
        "teacher_units": [[], []],
        "teacher_places": [[], []],
        "teacher_tokens": 0,
        "teacher_reading": "",
        "num_units": [0, 0],
        "response_units": [0, 0],
        "dropped_student_tokens": 0,
        "dropped_teacher_tokens": 0,
        "cut_student": False,
        "cut_teacher": False,
        "unaligned": False,
        "identical": False,
        "margin": margin,
        "refusal": "",
        "units": 0,
        "one_to_one_units": 0,
        "longest_student_unit": 0,
        "longest_teacher_unit": 0,
        "student_content_tokens": 0,
        "teacher_content_tokens": 0,
    }
