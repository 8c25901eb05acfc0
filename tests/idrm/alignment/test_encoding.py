import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from idrm.alignment import PairEncoder, encode_preferences
from idrm.alignment.encoding import digest_of_reading
from idrm.errors import InputError
from idrm.preference import convert_record

CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "<im>{{ message.role }}\n{{ message.content | trim }}</im>\n{% endfor %}"
)
NO_LIMIT = 10_000


def _pair(chosen, rejected, prompt="the answer is? that's what", **fields):
    return convert_record({"prompt": prompt, "chosen": chosen, "rejected": rejected, **fields})


def _dialogue(*turns):
    headers = ("\n\nHuman: ", "\n\nAssistant: ")
    return "".join(headers[index % 2] + turn for index, turn in enumerate(turns))


DIALOGUE = convert_record(
    {
        "chosen": _dialogue("hello, the café?", "yes 25", "what is it", "the answer is fine 🙂"),
        "rejected": _dialogue("hello, the café?", "yes 25", "what is it", "don't that"),
    }
)


@pytest.fixture(scope="session")
def encoder_of(tokenizer_of):
    def encoder(
        student="byte-level",
        teacher="wordpiece",
        template=None,
        max_length=NO_LIMIT,
        teacher_max_length=NO_LIMIT,
        **settings,
    ):
        return PairEncoder(
            tokenizer_of(student, template),
            tokenizer_of(teacher) if teacher else None,
            max_length=max_length,
            teacher_max_length=teacher_max_length,
            **settings,
        )

    return encoder


def _student_ids(encoded):
    return [encoded["chosen_input_ids"], encoded["rejected_input_ids"]]


def _check(encoded, encoder):
    """What holds for every encoded pair."""
    student, teacher = _student_ids(encoded), encoded["teacher_input_ids"]
    assert all(len(ids) <= encoder.max_length for ids in student)
    assert len(teacher) == len(encoded["teacher_token_type_ids"]) <= encoder.teacher_max_length
    for segment in (0, 1):
        for positions, units, length in (
            (encoded["student_positions"][segment], encoded["student_units"][segment], len(student[segment])),
            (encoded["teacher_positions"][segment], encoded["teacher_units"][segment], len(teacher)),
        ):
            assert len(positions) == len(units)
            assert positions == sorted(set(positions))
            assert all(0 <= position < length for position in positions)
            assert units == sorted(units)
            assert sorted(set(units)) == list(range(encoded["num_units"][segment]))
        assert 0 <= encoded["response_units"][segment] <= encoded["num_units"][segment]
    chosen, rejected = encoded["teacher_positions"]
    assert encoded["teacher_places"] == [chosen, rejected]
    assert encoded["teacher_window_lengths"] == [len(teacher)]
    assert not chosen or not rejected or chosen[-1] < rejected[0]


def _unit_texts(encoded, encoder, segment):
    """For each unit the text of its student tokens and that of its teacher tokens, by decoding."""
    texts = []
    for unit in range(encoded["num_units"][segment]):
        pair = []
        for tokenizer, ids, side in (
            (encoder.student_tokenizer, _student_ids(encoded)[segment], "student"),
            (encoder.teacher_tokenizer, encoded["teacher_input_ids"], "teacher"),
        ):
            positions = [
                position
                for position, of in zip(
                    encoded[f"{side}_positions"][segment], encoded[f"{side}_units"][segment], strict=True
                )
                if of == unit
            ]
            tokens = tokenizer.convert_ids_to_tokens([ids[position] for position in positions])
            pair.append("".join(token.removeprefix("##").replace("Ġ", "") for token in tokens))
        texts.append(tuple(pair))
    return texts


def test_plain_dialogue(encoder_of):
    encoder = encoder_of()
    encoded = encoder(DIALOGUE)
    _check(encoded, encoder)
    text = _dialogue("hello, the café?", "yes 25", "what is it", "don't that")
    assert encoded["rejected_input_ids"] == [
        *encoder.student_tokenizer(text)["input_ids"],
        encoder.student_tokenizer.eos_token_id,
    ]
    contents = ["hello, the café?\nyes 25\nwhat is it\n" + end for end in ("the answer is fine 🙂", "don't that")]
    joint = encoder.teacher_tokenizer(*contents)
    assert encoded["teacher_input_ids"] == joint["input_ids"]
    assert encoded["teacher_token_type_ids"] == joint["token_type_ids"]
    pairs = _unit_texts(encoded, encoder, 1)
    assert pairs[-5:] == [("is", "is"), ("it", "it"), ("don", "don"), ("'t", "'t"), ("that", "that")]
    assert pairs[0] == ("hello", "hello")
    assert encoded["response_units"][1] == 3
    assert not any(encoded[flag] for flag in ("cut_student", "cut_teacher", "identical", "unaligned"))


def test_role_headers_take_no_part(encoder_of):
    encoder = encoder_of()
    encoded = encoder(DIALOGUE)
    for segment, ids in enumerate(_student_ids(encoded)):
        part = [ids[position] for position in encoded["student_positions"][segment]]
        assert "Human" not in encoder.student_tokenizer.decode(part)
        assert "Human" in encoder.student_tokenizer.decode(ids)


def test_chat_template_is_tokenised_without_further_special_tokens(encoder_of):
    encoder = encoder_of(template=CHATML)
    encoded = encoder(DIALOGUE)
    _check(encoded, encoder)
    tokenizer = encoder.student_tokenizer
    assert encoded["chosen_input_ids"].count(tokenizer.bos_token_id) == 1
    assert encoded["chosen_input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.decode(encoded["rejected_input_ids"]).endswith("don't that</im>\n")
    # The first word of a content follows a newline here, not a space, and so falls into other tokens.
    assert encoded["num_units"] == encoder_of()(DIALOGUE)["num_units"]


@pytest.mark.parametrize("kind", ["byte-level", "byte-level trimmed", "byte-level NFC", "metaspace"])
@pytest.mark.parametrize("teacher", ["wordpiece", "unigram NFKC"])
def test_bare_strings_are_concatenated(kind, teacher, encoder_of):
    encoder = encoder_of(kind, teacher)
    encoded = encoder(_pair("fine", "that", prompt="the answer is "))
    _check(encoded, encoder)
    tokenizer = encoder.student_tokenizer
    assert encoded["chosen_input_ids"] == [*tokenizer("the answer is fine")["input_ids"], tokenizer.eos_token_id]
    assert (
        encoded["teacher_input_ids"]
        == encoder.teacher_tokenizer("the answer is \nfine", "the answer is \nthat")["input_ids"]
    )


def test_a_token_across_prompt_and_response_makes_its_unit_one_of_the_response(encoder_of):
    encoder = encoder_of()
    encoded = encoder(_pair("wer", "d", prompt="the ans"))
    # The student reads "the", " answer"; the teacher "the", "an"..., "s", "w", "e", "r".
    assert encoded["num_units"][0] == 2
    assert encoded["response_units"][0] == 1
    assert encoded["student_units"][0] == [0, 1]


def test_without_a_teacher_only_the_student_is_encoded(encoder_of):
    record = _pair("yes", "no", margin=1.5)
    alone, both = encoder_of(teacher=None)(record), encoder_of()(record)
    assert _student_ids(alone) == _student_ids(both)
    assert alone["teacher_input_ids"] == []
    assert alone["student_positions"] == [[], []]
    assert alone["margin"] == both["margin"] == 1.5


LONG = _pair(
    " the answer is fine, hello", " what is that?", prompt="hello, the kettle is fine. what is the answer? yes, no"
)


@pytest.mark.parametrize("max_length", [NO_LIMIT, 20, 14, 9])
@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("teacher_max_length", [NO_LIMIT, 40, 30, 20, 12, 8])
def test_cutting_keeps_a_suffix_of_tokens_and_of_units(max_length, teacher_max_length, template, encoder_of):
    whole = encoder_of(template=template)(LONG)
    encoder = encoder_of(template=template, max_length=max_length, teacher_max_length=teacher_max_length)
    encoded = encoder(LONG)
    _check(encoded, encoder)
    bos = encoder.student_tokenizer.bos_token_id
    for segment, (ids, all_ids) in enumerate(zip(_student_ids(encoded), _student_ids(whole), strict=True)):
        leading = [bos] if all_ids[0] == bos else []
        assert ids[: len(leading)] == leading
        tail = ids[len(leading) :]
        assert all_ids[len(all_ids) - len(tail) :] == tail
        units = _unit_texts(whole, encoder, segment)
        kept = _unit_texts(encoded, encoder, segment)
        assert kept == units[len(units) - len(kept) :]
        assert encoded["response_units"][segment] == min(whole["response_units"][segment], len(kept))
    prompt_units = [encoded["num_units"][segment] - encoded["response_units"][segment] for segment in (0, 1)]
    assert prompt_units[0] == prompt_units[1]
    assert encoded["cut_student"] == (_student_ids(encoded) != _student_ids(whole))
    assert encoded["cut_teacher"] == (encoded["teacher_input_ids"] != whole["teacher_input_ids"])


def test_a_model_only_loses_what_it_cannot_itself_read(encoder_of):
    whole = encoder_of()(LONG)
    cut_teacher, cut_student = encoder_of(teacher_max_length=24)(LONG), encoder_of(max_length=14)(LONG)
    assert _student_ids(cut_teacher) == _student_ids(whole)
    assert cut_student["teacher_input_ids"] == whole["teacher_input_ids"]
    assert cut_teacher["num_units"] < whole["num_units"]
    assert cut_student["num_units"] < whole["num_units"]


def test_a_segment_read_second_is_found_there(encoder_of):
    """The order is drawn from texts and seed: the same at every call, each way for about half of the pairs."""
    pairs = [_pair(f" the answer {index}", f" fine {index}") for index in range(40)]
    first = encoder_of()
    drawn = encoder_of(teacher_segment_order="random", seed=1)
    orders = []
    for pair in pairs:
        chosen_first, encoded = first(pair), drawn(pair)
        assert encoded == drawn(pair)
        texts = [message_list[-1]["content"] for message_list in (pair["chosen"], pair["rejected"])]
        prompt = pair["chosen"][0]["content"]
        joint = [f"{prompt}\n{text}" for text in texts]
        rejected_first = encoded["teacher_positions"][0][0] > encoded["teacher_positions"][1][0]
        expected = encoder_of().teacher_tokenizer(*(joint[::-1] if rejected_first else joint))
        assert encoded["teacher_input_ids"] == expected["input_ids"]
        assert encoded["teacher_token_type_ids"] == expected["token_type_ids"]
        for segment in (0, 1):
            read = [
                [of["teacher_input_ids"][at] for at in of["teacher_places"][segment]] for of in (chosen_first, encoded)
            ]
            assert read[0] == read[1]
        changed = {"teacher_input_ids", "teacher_token_type_ids", "teacher_positions", "teacher_places"}
        same = encoded.keys() - changed - {"teacher_reading"}
        assert all(encoded[name] == chosen_first[name] for name in same)
        assert (encoded["teacher_reading"] == chosen_first["teacher_reading"]) == (not rejected_first)
        orders.append(rejected_first)
    assert 10 < sum(orders) < 30
    other_seed = encoder_of(teacher_segment_order="random", seed=2)
    assert any(other_seed(pair)["teacher_input_ids"] != drawn(pair)["teacher_input_ids"] for pair in pairs)


@pytest.mark.parametrize(
    "name",
    [
        *("teacher_input_ids", "teacher_token_type_ids", "teacher_window_lengths"),
        *("teacher_places", "teacher_positions", "teacher_units", "num_units"),
    ],
)
def test_the_digest_of_a_reading_follows_each_part(name, encoder_of):
    encoded = encoder_of()(LONG)
    assert digest_of_reading(encoded) == encoded["teacher_reading"]
    values = encoded[name]
    per_segment = isinstance(values[0], list)
    changed = [[*values[0][:-1], values[0][-1] + 1], values[1]] if per_segment else [values[0] + 1, *values[1:]]
    assert digest_of_reading({**encoded, name: changed}) != encoded["teacher_reading"]


@pytest.mark.parametrize("order", ["chosen_first", "random"])
@pytest.mark.parametrize("limit", [12, 17, 30])
def test_windows_hold_every_token_in_context(limit, order, encoder_of):
    """Read in windows, a pair loses nothing: each token's place shows its id, in an input no longer than allowed."""
    settings = {"teacher_segment_order": order, "seed": 3}
    whole = encoder_of(**settings)(LONG)
    encoded = encoder_of(teacher_max_length=limit, teacher_long_inputs="windows", **settings)(LONG)
    lengths = encoded["teacher_window_lengths"]
    assert len(lengths) > 1
    assert max(lengths) <= limit
    assert sum(lengths) == len(encoded["teacher_input_ids"]) == len(encoded["teacher_token_type_ids"])
    assert not encoded["cut_teacher"]
    changed = {"teacher_input_ids", "teacher_token_type_ids", "teacher_window_lengths", "teacher_places"}
    assert encoded["teacher_reading"] != whole["teacher_reading"]
    same = encoded.keys() - changed - {"teacher_reading"}
    assert all(encoded[name] == whole[name] for name in same)
    starts = [sum(lengths[:window]) for window in range(len(lengths))]
    special = whole["teacher_input_ids"][0]
    assert all(encoded["teacher_input_ids"][start] == special for start in starts)
    for segment in (0, 1):
        places, positions = encoded["teacher_places"][segment], encoded["teacher_positions"][segment]
        assert len(set(places)) == len(places)
        for place, position in zip(places, positions, strict=True):
            assert encoded["teacher_input_ids"][place] == whole["teacher_input_ids"][position]
            assert encoded["teacher_token_type_ids"][place] == whole["teacher_token_type_ids"][position]


def test_the_header_of_the_response_outlives_the_prompt(encoder_of):
    encoder = encoder_of(template=CHATML, max_length=30)
    encoded = encoder(
        convert_record({"chosen": _dialogue("hello " * 20, "yes"), "rejected": _dialogue("hello " * 20, "no")})
    )
    whole = encoder_of(template=CHATML)(
        convert_record({"chosen": _dialogue("", "yes"), "rejected": _dialogue("", "no")})
    )
    assert encoder.student_tokenizer.decode(whole["chosen_input_ids"]).endswith("<im>assistant\nyes</im>\n")
    assert encoder.student_tokenizer.decode(encoded["chosen_input_ids"]).endswith("<im>assistant\nyes</im>\n")


def test_pairs_that_cutting_made_equal_are_marked(encoder_of):
    record = _pair("yes " + "the answer " * 8, "no " + "the answer " * 8)
    assert not encoder_of()(record)["identical"]
    assert encoder_of(max_length=10)(record)["identical"]


def test_an_altered_content_leaves_a_pair_without_units(encoder_of):
    template = CHATML.replace("message.content", "message.content.replace('hello', 'hi')")
    encoder = encoder_of(template=template, max_length=20, teacher_max_length=20)
    encoded = encoder(DIALOGUE)
    assert encoded["unaligned"]
    assert encoded["num_units"] == [0, 0]
    _check(encoded, encoder)
    assert max(len(ids) for ids in _student_ids(encoded)) == 20
    untouched = convert_record({"chosen": _dialogue("the", "yes"), "rejected": _dialogue("the", "no")})
    assert not encoder(untouched)["unaligned"]


def test_unaligned_segments_lose_the_same_beginning(encoder_of):
    template = CHATML.replace("message.content", "message.content.replace('hello', 'hi')")
    record = convert_record(
        {"chosen": _dialogue("hello the answer is", "yes"), "rejected": _dialogue("hello the answer is", "no, no, no")}
    )
    chosen, rejected = _student_ids(encoder_of(template=template)(record))
    ids = _student_ids(encoder_of(template=template, max_length=len(rejected) - 3)(record))
    assert [len(cut) for cut in ids] == [len(chosen) - 3, len(rejected) - 3]


def test_dropped_tokens_are_counted(encoder_of):
    encoded = encoder_of()(_pair("é ü  \u200b", "no", prompt="the"))
    # Chosen: the space before the bytes of "ü", the white space behind it, and the three bytes of U+200B.
    spaces = encoded["dropped_student_tokens"] - 3
    assert spaces >= 2
    assert encoded["dropped_teacher_tokens"] == 0


def test_a_slow_tokenizer_is_refused(tokenizer_of):
    with pytest.raises(InputError, match=r"fast tokenizer for the teacher.*ByT5Tokenizer"):
        PairEncoder(tokenizer_of("byte-level"), ByT5Tokenizer(), max_length=99, teacher_max_length=99)
    with pytest.raises(InputError, match="fast tokenizer for the student"):
        PairEncoder(ByT5Tokenizer(), None, max_length=99, teacher_max_length=99)


@pytest.mark.parametrize("name", ["max_length", "teacher_max_length"])
def test_a_length_too_short_to_read_anything_is_refused(name, encoder_of):
    with pytest.raises(InputError, match=f"^{name}: expected at least 8 tokens, found 3"):
        encoder_of(**{name: 3})


def test_a_teacher_that_reads_no_pairs_is_refused(tokenizer_of):
    with pytest.raises(InputError, match="two texts"):
        PairEncoder(tokenizer_of("byte-level"), tokenizer_of("one text"), max_length=99, teacher_max_length=99)


WORDS = st.lists(
    st.sampled_from(["the", "answer", "don't", "Zoë", "🙂🙂", "\u200b", "ﬁne", "25", "\n\n", "cafe\u0301", "x" * 12]),
    max_size=12,
).map(" ".join)


@pytest.mark.parametrize("teacher", ["wordpiece", "unigram NFKC"])
@pytest.mark.parametrize("template", [None, CHATML])
@given(
    prompts=st.tuples(WORDS, WORDS),
    responses=st.tuples(WORDS, WORDS),
    same_prompt=st.booleans(),
    lengths=st.tuples(st.integers(8, 60), st.integers(8, 90)),
    student=st.sampled_from(["byte-level", "byte-level trimmed", "byte-level NFC", "metaspace"]),
)
def test_every_pair_fits_both_models(teacher, template, prompts, responses, same_prompt, lengths, student, encoder_of):
    encoder = encoder_of(student, teacher, template, *lengths)
    record = convert_record(
        {
            "chosen": _dialogue(prompts[0], responses[0]),
            "rejected": _dialogue(prompts[0 if same_prompt else 1], responses[1]),
        }
    )
    encoded = encoder(record)
    _check(encoded, encoder)
    assert not encoded["unaligned"]
    whole = encoder_of(student, teacher, template)(record)
    lost = [before - after for before, after in zip(whole["num_units"], encoded["num_units"], strict=True)]
    prompt_units = [units - own for units, own in zip(whole["num_units"], whole["response_units"], strict=True)]
    if same_prompt and lost[0] != lost[1]:
        assert all(gone >= units for gone, units in zip(lost, prompt_units, strict=True))


def _dataset(*records):
    return Dataset.from_list([convert_record(record) for record in records])


def test_a_data_set_is_encoded_and_reported(encoder_of):
    long = "the answer " * 8
    dataset = _dataset(
        {"prompt": "what?", "chosen": " yes", "rejected": " no", "margin": 2.0},
        {"prompt": "what?", "chosen": f" yes {long}", "rejected": f" no {long}"},
        {"prompt": "what is 25?", "chosen": " the answer", "rejected": f" {long}"},
    )
    encoded, report = encode_preferences(dataset, encoder_of(max_length=12))
    assert encoded["margin"][:] == [2.0, None]
    assert "refusal" not in encoded.column_names
    assert (report.pairs, report.kept, report.dropped) == (3, 2, {"identical_after_cutting": 1})
    assert (report.cut_student, report.cut_teacher, report.unaligned) == (1, 0, 0)
    assert (report.longest_student_unit, report.longest_teacher_unit) == (2, 1)
    assert 0 < report.one_to_one_units <= report.units
    assert "1 identical_after_cutting" in report.summary()
    assert "cut for the student: 50.0%" in report.summary()
    expected = encoder_of(max_length=12)(dataset[0])
    assert all(encoded[0][column] == expected[column] for column in encoded.column_names)


def test_refused_and_unaligned_pairs_are_counted(encoder_of):
    template = "{% if messages | length > 2 %}{{ raise_exception('too many turns') }}{% endif %}" + CHATML.replace(
        "message.content", "message.content.replace('hello', 'hi')"
    )
    dataset = _dataset(
        {"chosen": _dialogue("hello", "yes"), "rejected": _dialogue("hello", "no")},
        {"chosen": _dialogue("the", "yes"), "rejected": _dialogue("the", "no")},
        {"chosen": _dialogue("a", "b", "c", "d"), "rejected": _dialogue("a", "b", "c", "e")},
    )
    encoded, report = encode_preferences(dataset, encoder_of(template=template), num_proc=2)
    assert report.dropped == {"refused_by_chat_template": 1}
    assert report.refusal == "too many turns"
    assert report.unaligned == 1
    assert encoded[0]["num_units"] == [0, 0]
    assert min(encoded[1]["num_units"]) > 0
    assert "'too many turns'" in report.summary()
    with pytest.raises(InputError, match=r"no pair can be trained on.*refused_by_chat_template"):
        encode_preferences(dataset.select([2]), encoder_of(template=template))


def test_the_report_without_a_teacher_speaks_of_the_student_only(encoder_of):
    _, report = encode_preferences(_dataset({"prompt": "a", "chosen": "b", "rejected": "c"}), encoder_of(teacher=None))
    assert report.summary() == "1 pairs encoded, 1 kept; dropped: none; cut for the student: 0.0%"


def test_the_fingerprint_follows_what_decides_the_result(encoder_of):
    encoders = [
        encoder_of(),
        encoder_of(max_length=9),
        encoder_of(teacher_max_length=9),
        encoder_of(teacher=None),
        encoder_of(template=CHATML),
        encoder_of(student="byte-level trimmed"),
    ]
    assert len({encoder.fingerprint for encoder in encoders}) == len(encoders)
    assert encoder_of().fingerprint == encoders[0].fingerprint
