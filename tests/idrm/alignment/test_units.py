import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from idrm.alignment.rendering import canonical_text
from idrm.alignment.tokenization import tokenize
from idrm.alignment.units import NO_UNIT, find_units

KINDS = ["byte-level", "byte-level trimmed", "byte-level NFC", "metaspace", "wordpiece", "unigram NFKC"]


def _text(content):
    return canonical_text([{"role": "user", "content": content}])


def _units(student, teacher, content):
    """The units of a content, and each as (its text, student tokens, teacher tokens), by two tokenizers."""
    ours, theirs = (tokenize(side, [_text(content)], add_special_tokens=False)[0] for side in (student, teacher))
    units = find_units(ours.spans, theirs.spans)
    bare = "".join(content.split())
    described = [
        (bare[start:end], units.student.count(unit), units.teacher.count(unit))
        for unit, (start, end) in enumerate(zip(units.starts, units.ends, strict=True))
    ]
    dropped = [
        [token for token, unit in zip(side.convert_ids_to_tokens(tokens.ids), found, strict=True) if unit == NO_UNIT]
        for side, tokens, found in ((student, ours, units.student), (teacher, theirs, units.teacher))
    ]
    return described, dropped


BYTES_OF_A_FIRE = 4

CASES = {
    "a leading space inside the token": ("byte-level", "the answer", [("the", 1, 1), ("answer", 1, 1)], [[], []]),
    "a leading space outside the offset": (
        "byte-level trimmed",
        "the answer",
        [("the", 1, 1), ("answer", 1, 1)],
        [[], []],
    ),
    "a trailing marker": ("metaspace", "the answer", [("the", 1, 1), ("answer", 1, 1)], [[], []]),
    "bytes of one character": ("byte-level", "é ü", [("é", 1, 1), ("ü", 2, 1)], [["Ġ"], []]),
    "[UNK] over a run of emoji": (
        "byte-level",
        "hi 🙂🙂 the",
        [("h", 1, 1), ("i", 1, 1), ("🙂🙂", 2 * BYTES_OF_A_FIRE, 1), ("the", 1, 1)],
        [["Ġ"], []],
    ),
    "bytes of an apostrophe": (
        "byte-level",
        "don\u2019t",
        [("don", 1, 1), ("\u2019", 3, 1), ("t", 1, 1)],
        [[], []],
    ),
    "U+200B, which only one side sees": (
        "byte-level",
        "the\u200banswer",
        [("the", 1, 1), ("an", 1, 2), ("sw", 1, 2), ("er", 1, 2)],
        [["â", "Ģ", "ĭ"], []],
    ),
    "a byte order mark": ("byte-level", "\ufeffthe", [("the", 1, 1)], [["ï", "»", "¿"], []]),
    "a no-break space": (
        "byte-level",
        "the\u00a0answer",
        [("the", 1, 1), ("answer", 3, 1)],
        [["Â", "ł"], []],
    ),
    "a trimmed no-break space": (
        "byte-level trimmed",
        "the\u00a0answer",
        [("the", 1, 1), ("answer", 3, 1)],
        [["Â", "ł"], []],
    ),
    "every other Unicode white space": (
        "byte-level",
        "t\u3000h\u2028t\x85h",
        [("t", 1, 1), ("h", 1, 1), ("t", 1, 1), ("h", 1, 1)],
        [["ã", "Ģ", "Ģ", "â", "Ģ", "¨", "Â", "ħ"], []],
    ),
    "an accent that one side composes and the other strips": (
        "byte-level NFC",
        "cafe\u0301 fine",
        [("cafe", 3, 1), ("fine", 1, 1)],
        [[], []],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_against_an_uncased_wordpiece(case, tokenizer_of):
    kind, content, expected, dropped = CASES[case]
    assert _units(tokenizer_of(kind), tokenizer_of("wordpiece"), content) == (expected, dropped)


def test_a_ligature_that_nfkc_takes_apart(tokenizer_of):
    units, dropped = _units(tokenizer_of("byte-level"), tokenizer_of("unigram NFKC"), "the \ufb01ne ½")
    # "▁f", "in", "e" against the three bytes of the ligature, "n", "e"; "½" becomes "1", an unknown slash and "2".
    assert units == [("the", 1, 1), ("\ufb01n", 4, 2), ("e", 1, 1), ("½", 2, 3)]
    assert dropped == [["Ġ", "Ġ"], ["▁"]]


def test_markers_that_two_kinds_of_metaspace_place_differently(tokenizer_of):
    units, dropped = _units(tokenizer_of("metaspace"), tokenizer_of("unigram NFKC"), "the answer  is")
    assert [text for text, _, _ in units] == ["the", "answer", "is"]
    assert dropped == [["▁"], ["▁"]]


def test_byte_fallback_against_bytes(tokenizer_of):
    units, dropped = _units(tokenizer_of("metaspace"), tokenizer_of("byte-level"), "Zoë 🙂")
    assert units == [("Zoë", 2, 1), ("🙂", BYTES_OF_A_FIRE, BYTES_OF_A_FIRE)]
    assert dropped == [[], ["Ġ"]]


ALPHABET = [
    *"atehr don't CAFÉ é 25.",
    *(" ", "\n", "  ", "\u00a0", "\u200b", "\ufeff", "\u3000", "\t"),
    *("\u0301", "\u0323", "\ufb01", "½", "ﷺ", "🙂", "👩\u200d🚀", "한", "中", "İ", "ß", "\u2019"),
    *("the ", "answer", " that", "don't", "naïve"),
]
CONTENTS = st.lists(st.sampled_from(ALPHABET), max_size=25).map("".join)


@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", ["wordpiece", "unigram NFKC", "byte-level"])
@given(content=CONTENTS)
def test_units_partition_the_kept_tokens_of_both_sides(student, teacher, content, tokenizer_of):
    text = _text(content)
    ours, theirs = (tokenize(tokenizer_of(kind), [text], add_special_tokens=False)[0] for kind in (student, teacher))
    units = find_units(ours.spans, theirs.spans)
    for tokens, of_token in ((ours, units.student), (theirs, units.teacher)):
        kept = [unit for unit in of_token if unit != NO_UNIT]
        assert sorted(set(kept)) == list(range(len(units)))
        assert kept == sorted(kept)
        for (start, end), unit in zip(tokens.spans, of_token, strict=True):
            if unit == NO_UNIT:
                assert start == end or all(
                    end <= first or last <= start for first, last in zip(units.starts, units.ends, strict=True)
                )
            else:
                assert units.starts[unit] <= start < end <= units.ends[unit]
    bounds = [bound for unit in zip(units.starts, units.ends, strict=True) for bound in unit]
    assert bounds == sorted(bounds)
    assert not bounds or bounds[-1] <= len("".join(content.split()))
    assert all(start < end for start, end in zip(units.starts, units.ends, strict=True))


@given(content=CONTENTS)
def test_only_tokens_without_a_counterpart_are_dropped(content, tokenizer_of):
    """The byte-level side covers every character, so that the teacher loses nothing but tokens of white space."""
    ours, theirs = (
        tokenize(tokenizer_of(kind), [_text(content)], add_special_tokens=False)[0]
        for kind in ("byte-level", "wordpiece")
    )
    units = find_units(ours.spans, theirs.spans)
    assert all(
        (unit != NO_UNIT) == (start < end) for unit, (start, end) in zip(units.teacher, theirs.spans, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
@given(words=st.lists(st.sampled_from(["the", "answer", "don't", "25", "xq", "Fine.", "of"]), max_size=12))
def test_the_units_of_two_equal_tokenisations_are_their_tokens(kind, words, tokenizer_of):
    tokenizer = tokenizer_of(kind)
    tokens = tokenize(tokenizer, [_text(" ".join(words))], add_special_tokens=False)[0]
    if tokenizer.convert_ids_to_tokens(tokens.ids)[:1] == ["▁"]:
        # A marker that Metaspace put before the text has the span of the first character, so it joins the first unit.
        assert tokens.spans.pop(0) == (0, 1)
    units = find_units(tokens.spans, tokens.spans)
    kept = [unit for unit, (start, end) in zip(units.student, tokens.spans, strict=True) if start < end]
    assert units.student == units.teacher
    assert kept == list(range(len(units)))


@given(content=CONTENTS)
def test_rows_of_merged_maps_sum_to_one(content, tokenizer_of):
    ours, theirs = (
        tokenize(tokenizer_of(kind), [_text(content)], add_special_tokens=False)[0]
        for kind in ("byte-level", "wordpiece")
    )
    units = find_units(ours.spans, theirs.spans)
    for of_token in (units.student, units.teacher):
        unit = torch.tensor([unit for unit in of_token if unit != NO_UNIT], dtype=torch.long)
        member = torch.nn.functional.one_hot(unit, len(units)).double() if len(units) else torch.zeros(0, 0).double()
        rows = torch.rand(len(unit), len(unit), dtype=torch.float64).softmax(-1)
        merged = (member.T / member.sum(0)[:, None]) @ rows @ member
        torch.testing.assert_close(merged.sum(-1), torch.ones(len(units), dtype=torch.float64))


def _components(spans, others):
    """The definition, taken at its word: connected components of the overlap graph that hold tokens of both sides."""
    tokens = [(*span, side, token) for side in (0, 1) for token, span in enumerate((spans, others)[side])]
    tokens = [token for token in tokens if token[0] < token[1]]
    group = list(range(len(tokens)))
    for i, (start, end, *_) in enumerate(tokens):
        for j, (other_start, other_end, *_) in enumerate(tokens):
            if start < other_end and other_start < end:
                group = [group[i] if g == group[j] else g for g in group]
    components = []
    for name in dict.fromkeys(group):
        members = [token for token, g in zip(tokens, group, strict=True) if g == name]
        if {side for _, _, side, _ in members} == {0, 1}:
            components.append((min(token[0] for token in members), {(side, token) for _, _, side, token in members}))
    return [members for _, members in sorted(components, key=lambda component: component[0])]


SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), max_size=14).map(
    lambda spans: [(start, start + length) for start, length in sorted(spans)]
)


@given(spans=SPANS, others=SPANS)
def test_units_are_the_connected_components_of_the_overlap(spans, others):
    units = find_units(spans, others)
    found = [
        {
            (side, token)
            for side, of_token in enumerate((units.student, units.teacher))
            for token, of in enumerate(of_token)
            if of == unit
        }
        for unit in range(len(units))
    ]
    assert found == _components(spans, others)


def test_tokens_that_go_back_are_one_stretch_with_those_before_them():
    units = find_units([(0, 2), (3, 5), (2, 3), (5, 6)], [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6)])
    assert units.student == [0, 1, 1, 2]
    assert units.teacher == [0, 1, 1, 1, 2]


def test_no_units_without_tokens():
    assert len(find_units([], [(0, 3)])) == len(find_units([(0, 3)], [])) == len(find_units([(2, 2)], [(0, 3)])) == 0


def test_the_sweep_is_linear():
    """A hundred thousand tokens a side, quicker than anything quadratic could be."""
    ours = [(3 * i, 3 * i + 3) for i in range(100_000)]
    theirs = [(2 * i, 2 * i + 2) for i in range(150_000)]
    units = find_units(ours, theirs)
    assert len(units) == 50_000
    assert units.student[-2:] == [49_999, 49_999]
