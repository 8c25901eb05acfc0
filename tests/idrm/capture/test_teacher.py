"""A teacher's packed attention equals transformers' own probabilities, restricted to content tokens."""

import contextlib
import copy
import functools
import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    ByT5Tokenizer,
    CamembertConfig,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)
from transformers.models.bert import modeling_bert
from transformers.models.modernbert import modeling_modernbert

from idrm.capture import Teacher, deberta
from idrm.errors import InputError
from idrm_kernels import MapLayout, PackedAttention, attention_map_distance, attention_map_rows
from idrm_kernels.testing.cases import error_bound
from idrm_kernels.testing.memory import peak_bytes

HEADS = 4
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
RELATIVE = {**SIZES, "relative_attention": True, "position_biased_input": False, "type_vocab_size": 0}
V2 = {**RELATIVE, "pos_att_type": ["c2p", "p2c"], "norm_rel_ebd": "layer_norm"}
MODERN_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2)
CONFIGS = {
    "bert": BertConfig(**SIZES),
    "camembert": CamembertConfig(**SIZES | {"max_position_embeddings": 65, "type_vocab_size": 1}),
    "roberta": RobertaConfig(**SIZES | {"max_position_embeddings": 65, "type_vocab_size": 1}),
    "xlm-roberta": XLMRobertaConfig(**SIZES | {"max_position_embeddings": 67, "pad_token_id": 2, "type_vocab_size": 1}),
    "electra": ElectraConfig(**SIZES, embedding_size=16),
    "distilbert": DistilBertConfig(
        vocab_size=60, dim=32, hidden_dim=40, n_layers=3, n_heads=HEADS, max_position_embeddings=64
    ),
    # Two layers of three are global; the one between reads four tokens on each side.
    "modernbert": ModernBertConfig(**SIZES, global_attn_every_n_layers=2, local_attention=8, **MODERN_TOKENS),
    "v1 plain": DebertaConfig(**SIZES),
    "v1 no terms": DebertaConfig(**RELATIVE, pos_att_type=[]),
    "v1 c2p": DebertaConfig(**RELATIVE, pos_att_type=["c2p"]),
    "v1 p2c": DebertaConfig(**RELATIVE, pos_att_type=["p2c"]),
    "v1 c2p p2c": DebertaConfig(**RELATIVE, pos_att_type="c2p|p2c"),
    "v1 beyond the range": DebertaConfig(**RELATIVE, pos_att_type="c2p|p2c", max_relative_positions=10),
    "v2 plain": DebertaV2Config(**SIZES),
    "v2 no terms": DebertaV2Config(**V2 | {"pos_att_type": []}),
    "v2 c2p": DebertaV2Config(**V2 | {"pos_att_type": ["c2p"]}),
    "v2 p2c": DebertaV2Config(**V2 | {"pos_att_type": ["p2c"]}),
    "v2 c2p p2c": DebertaV2Config(**V2),
    "v2 beyond the range": DebertaV2Config(**V2, max_relative_positions=10),
    "v2 share_att_key": DebertaV2Config(**V2, share_att_key=True),
    "v2 share_att_key c2p": DebertaV2Config(**V2 | {"pos_att_type": ["c2p"]}, share_att_key=True),
    "v2 share_att_key p2c": DebertaV2Config(**V2 | {"pos_att_type": ["p2c"]}, share_att_key=True),
    "v2 share_att_key no terms": DebertaV2Config(**V2 | {"pos_att_type": []}, share_att_key=True),
    "v2 buckets": DebertaV2Config(**V2, position_buckets=16, share_att_key=True),
    "v2 buckets c2p": DebertaV2Config(**V2 | {"pos_att_type": ["c2p"]}, position_buckets=16),
    "v2 buckets p2c": DebertaV2Config(**V2 | {"pos_att_type": ["p2c"]}, position_buckets=16, share_att_key=True),
    "v2 buckets about as many as the range": DebertaV2Config(**V2, position_buckets=16, max_relative_positions=9),
    "v2 buckets beyond the range": DebertaV2Config(**V2, position_buckets=8, max_relative_positions=20),
    "v2 odd buckets": DebertaV2Config(**V2, position_buckets=7, max_relative_positions=20),
    "v2 no layer norm, absolute positions": DebertaV2Config(
        **V2 | {"norm_rel_ebd": "none", "position_biased_input": True}
    ),
    "v2 convolution": DebertaV2Config(**V2, position_buckets=16, conv_kernel_size=3),
}
OTHERS = {
    "v2 absolute positions, types": DebertaV2Config(
        **V2 | {"position_biased_input": True, "type_vocab_size": 2}, position_buckets=16
    )
}
BOUNDED = (
    "bert",
    "camembert",
    "roberta",
    "xlm-roberta",
    "electra",
    "distilbert",
    "modernbert",
    "plain",
    "absolute positions",
)
DEBERTAS = [name for name in CONFIGS if name.startswith(("v1", "v2"))]


def is_bounded(name):
    return name.startswith(BOUNDED) or name.endswith(BOUNDED)


@pytest.fixture(scope="module")
def tokenizer():
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "yes", "no"])}
    backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def build(config):
    torch.manual_seed(0)
    model = AutoModel.from_config(copy.deepcopy(config)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float(name.lower().endswith("norm.weight")), std=0.35)
    return model.eval()


def interaction_inputs(config, lengths, padding_side="right"):
    """Joint inputs [CLS] chosen [SEP] rejected [SEP] of these (chosen, rejected) lengths; content tokens are kept."""
    generator = torch.Generator().manual_seed(2)
    width = max(chosen + rejected + 3 for chosen, rejected in lengths)
    fields = {"ids": [], "mask": [], "types": [], "index": [], "positions": []}
    for row, (chosen, rejected) in enumerate(lengths):
        length = chosen + rejected + 3
        start = width - length if padding_side == "left" else 0
        ids = torch.full((width,), config.pad_token_id)
        ids[start : start + length] = torch.randint(5, 60, (length,), generator=generator)
        mask = torch.zeros(width, dtype=torch.long)
        mask[start : start + length] = 1
        types = torch.zeros(width, dtype=torch.long)
        types[start + chosen + 2 : start + length] = 1
        content = torch.cat([torch.arange(1, chosen + 1), torch.arange(chosen + 2, length - 1)])
        for field, value in zip(fields, (ids, mask, types, row * width + start + content, content), strict=True):
            fields[field].append(value)
    return SimpleNamespace(
        teacher_input_ids=torch.stack(fields["ids"]),
        teacher_attention_mask=torch.stack(fields["mask"]),
        teacher_token_type_ids=torch.stack(fields["types"]),
        teacher_index=torch.cat(fields["index"]),
        teacher_positions=torch.cat(fields["positions"]).int(),
        teacher_span=width,
    )


def layout_of(lengths):
    counts = torch.tensor([0, *(length for pair in lengths for length in pair)])
    return MapLayout.build(counts.cumsum(0), segments=2)


@pytest.fixture(scope="module", autouse=True)
def softmax_in_float64():
    """ModernBERT's eager function takes its softmax in float32, whatever the model's dtype; BERT's in the model's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_modernbert, "eager_attention_forward", modeling_bert.eager_attention_forward)
        yield


def dense_probabilities(config, inputs):
    """Per layer and example transformers' (heads, content, content) map, of the example alone and without padding."""
    model = build(config)
    model.config._attn_implementation_internal = "eager"
    width = inputs.teacher_input_ids.shape[1]
    maps = []
    for row in range(len(inputs.teacher_input_ids)):
        real = inputs.teacher_attention_mask[row].bool()
        arguments = {"input_ids": inputs.teacher_input_ids[row, real][None], "attention_mask": real[real].long()[None]}
        if config.model_type in ("bert", "electra"):
            arguments["token_type_ids"] = inputs.teacher_token_type_ids[row, real][None]
        with torch.no_grad():
            attentions = model(**arguments, output_attentions=True).attentions
        own = inputs.teacher_index // width == row
        content = inputs.teacher_positions[own].long()
        of_content = [attention[0][:, content][:, :, content] for attention in attentions]
        maps.append([probability / probability.sum(-1, keepdim=True) for probability in of_content])
    return list(zip(*maps, strict=True))


@functools.cache
def expected_probabilities(name):
    """Those of CONFIGS[name] for pairs of lengths_of(name), on whichever side they are padded."""
    return dense_probabilities(CONFIGS[name], interaction_inputs(CONFIGS[name], lengths_of(name)))


def lengths_of(name):
    return [(20, 31), (9, 4)] if is_bounded(name) else [(20, 31), (70, 75), (9, 4)]


@pytest.mark.parametrize(
    ("name", "implementation", "padding_side"),
    [
        *((name, "sdpa", padding_side) for name in CONFIGS for padding_side in ("right", "left")),
        *((name, "eager", "left") for name in DEBERTAS),
    ],
)
def test_attention_equals_transformers_probabilities(name, implementation, padding_side, tokenizer):
    config, lengths = CONFIGS[name], lengths_of(name)
    inputs, expected = interaction_inputs(config, lengths, padding_side), expected_probabilities(name)
    teacher = Teacher(build(config), tokenizer, [-1, 0], attn_implementation=implementation)
    layout = layout_of(lengths)
    packed = teacher.attention(inputs)
    assert len(packed) == 2
    for attention, layer in zip(packed, (2, 0), strict=True):
        assert attention.q.shape == (sum(map(sum, lengths)), HEADS, 8)
        assert not attention.q.requires_grad
        dense = [probability[:, row] for probability in expected[layer] for row in range(probability.shape[1])]
        chosen_rows = range(0, layout.total_units, 5)
        rows = attention_map_rows(
            attention, layout, chosen_rows, normalization="joint", num_head_groups=HEADS, teacher_side=True
        )
        for ours, row in zip(rows, chosen_rows, strict=True):
            torch.testing.assert_close(ours, dense[row], rtol=0, atol=1e-10)
        # Far from uniform, so that an error would show.
        assert torch.stack([(row.amax(dim=-1) * row.shape[-1]).mean() for row in dense]).mean() > 3


@pytest.mark.parametrize("name", ["bert", "modernbert", "v1 c2p p2c", "v2 buckets", "v2 no terms"])
def test_attention_is_restored_from_queries_and_keys(name, tokenizer):
    lengths = [(20, 31), (9, 4)]
    inputs = interaction_inputs(CONFIGS[name], lengths)
    teacher = Teacher(build(CONFIGS[name]), tokenizer, [-1, 0])
    packed = teacher.attention(inputs)
    q, k = (torch.stack([getattr(attention, name) for attention in packed]) for name in ("q", "k"))
    assert q.shape == k.shape == (2, sum(map(sum, lengths)), teacher.num_heads, teacher.head_dim)
    for ours, theirs in zip(teacher.restored(q, k, inputs), packed, strict=True):
        assert ours.scale == theirs.scale
        assert torch.equal(ours.q, theirs.q)
        assert (
            (ours.position_bias is None) == (theirs.position_bias is None) == (name not in ("v1 c2p p2c", "v2 buckets"))
        )
        if ours.position_bias is not None:
            for field in ("positions", "slot_of_delta", "c2p", "p2c"):
                assert torch.equal(getattr(ours.position_bias, field), getattr(theirs.position_bias, field))
    for half in teacher.restored(q.bfloat16(), k.bfloat16(), inputs):
        assert half.q.dtype == torch.bfloat16
        assert half.position_bias is None or half.position_bias.c2p.dtype == torch.bfloat16


def test_a_fingerprint_tells_teachers_apart(tokenizer):
    def fingerprint(config, layers=(-1,), change=None):
        model = build(config)
        if change is not None:
            change(model)
        return Teacher(model, tokenizer, layers).fingerprint

    def nudge(model):
        with torch.no_grad():
            model.encoder.layer[0].attention.self.query.bias[0] += 1e-12

    def above(model):
        with torch.no_grad():
            model.encoder.layer[-1].attention.self.query.bias[0] += 1

    bert = CONFIGS["bert"]
    own = fingerprint(bert)
    assert own == fingerprint(bert)
    others = [fingerprint(bert, layers=[-2]), fingerprint(bert, layers=[-1, -2]), fingerprint(bert, change=nudge)]
    others.append(fingerprint(bert, change=lambda model: setattr(model.config, "layer_norm_eps", 1e-5)))
    others.append(fingerprint(bert, change=lambda model: model.float()))
    assert len({own, *others}) == 6
    # What lies above the supervised layers decides nothing, and how attention is computed the rounding alone.
    assert own == fingerprint(bert, change=lambda model: model.set_attn_implementation("eager"))
    assert fingerprint(bert, layers=[-2], change=above) == fingerprint(bert, layers=[-2])


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("name", ["bert", "v1 c2p p2c", "v2 buckets", "v2 no terms"])
def test_distance_equals_one_from_dense_probabilities(name, impl, tokenizer):
    config, lengths = CONFIGS[name], [(20, 31), (9, 4)]
    inputs, layout = interaction_inputs(config, lengths), layout_of(lengths)
    torch.manual_seed(3)
    student = PackedAttention(q=torch.randn(64, 6, 8).double(), k=torch.randn(64, 2, 8).double())
    (attention,) = Teacher(build(config), tokenizer, [-1]).attention(inputs)
    distance = attention_map_distance(student, attention, layout, impl=impl)[0]

    start, expected = 0, []
    for (chosen, rejected), teacher_map in zip(lengths, dense_probabilities(config, inputs)[-1], strict=True):
        tokens = slice(start, start + chosen + rejected)
        keys = student.k[tokens].repeat_interleave(3, dim=1)
        scores = torch.einsum("ihd,jhd->hij", student.q[tokens], keys) * 8**-0.5
        of_segment = []
        for columns in (slice(0, chosen), slice(chosen, chosen + rejected)):
            theirs = teacher_map[:, :, columns] / teacher_map[:, :, columns].sum(-1, keepdim=True)
            difference = scores[:, :, columns].softmax(-1).mean(0) - theirs.mean(0)
            of_segment.append(difference.square().sum(-1))
        expected.append(torch.stack(of_segment, dim=-1))
        start += chosen + rejected
    torch.testing.assert_close(distance, torch.cat(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["v1 c2p p2c", "v2 c2p p2c", "v2 buckets"])
def test_position_tables_are_linear_in_the_content_tokens(name, tokenizer):
    inputs = interaction_inputs(CONFIGS[name], [(9, 4), (5, 5)])
    (attention,) = Teacher(build(CONFIGS[name]), tokenizer).attention(inputs)
    bias = attention.position_bias
    assert bias.c2p.shape == bias.p2c.shape
    assert bias.c2p.shape[:2] == (23, HEADS)
    assert bias.c2p.is_contiguous()
    assert bias.p2c.is_contiguous()
    assert bias.slot_of_delta.min() == 0
    assert bias.slot_of_delta.max() == bias.c2p.shape[2] - 1
    assert bias.positions.tolist() == [*range(1, 10), *range(11, 15), *range(1, 6), *range(7, 12)]


@pytest.mark.parametrize("name", ["bert", "v1 c2p p2c", "v2 buckets"])
def test_layers_above_the_highest_supervised_one_are_left_out(name, tokenizer):
    inputs = interaction_inputs(CONFIGS[name], [(9, 4)])
    whole = Teacher(build(CONFIGS[name]), tokenizer, [-2, -1]).attention(inputs)[0]
    model = build(CONFIGS[name])
    teacher = Teacher(model, tokenizer, [-2])
    assert len(model.encoder.layer) == 2
    assert teacher.layers == (1,)
    assert torch.equal(teacher.attention(inputs)[0].q, whole.q)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["v1 c2p p2c", "v2 convolution"])
def test_debertas_highest_supervised_block_is_entered_and_not_run(name, implementation, tokenizer):
    model, ran = build(CONFIGS[name]), []
    for layer, block in enumerate(model.encoder.layer):
        block.attention.register_forward_hook(lambda *arguments, layer=layer: ran.append(layer))
    teacher = Teacher(model, tokenizer, [0, -1], implementation)
    assert len(teacher.attention(interaction_inputs(CONFIGS[name], [(9, 4)]))) == 2
    assert ran == [0, 1]


@pytest.mark.parametrize("name", ["bert", "v1 c2p p2c", "v2 share_att_key"])
def test_the_teachers_dtype_is_its_own(name, tokenizer):
    inputs, layout = interaction_inputs(CONFIGS[name], [(9, 4)]), layout_of([(9, 4)])
    (exact,) = Teacher(build(CONFIGS[name]), tokenizer).attention(inputs)
    teacher = Teacher(build(CONFIGS[name]).bfloat16(), tokenizer)
    (plain,) = teacher.attention(inputs)
    with torch.autocast("cpu", dtype=torch.float16):
        (under_autocast,) = teacher.attention(inputs)
    assert plain.q.dtype == plain.k.dtype == torch.bfloat16
    assert torch.equal(plain.q, under_autocast.q)
    maps = [
        torch.stack(attention_map_rows(attention, layout, range(13), teacher_side=True)).double()
        for attention in (plain, exact)
    ]
    assert (maps[0] - maps[1]).abs().mean() < 0.02


def test_max_length():
    lengths = {
        name: Teacher(build(config), SimpleNamespace(model_input_names=[])).max_length
        for name, config in CONFIGS.items()
    }
    assert lengths["bert"] == lengths["roberta"] == lengths["xlm-roberta"] == lengths["distilbert"] == 64
    assert lengths["v1 plain"] == 64
    assert lengths["v1 c2p"] is None
    assert lengths["v2 buckets"] is None


def test_inputs_beyond_max_length_are_refused(tokenizer):
    inputs = interaction_inputs(CONFIGS["roberta"], [(30, 32)])
    with pytest.raises(ValueError, match="teacher_input_ids: expected at most 64 tokens, got 65"):
        Teacher(build(CONFIGS["roberta"]), tokenizer).attention(inputs)


def test_layers_beyond_the_depth(tokenizer):
    with pytest.raises(InputError, match="teacher: layer 3 is beyond the model's depth"):
        Teacher(build(CONFIGS["bert"]), tokenizer, [3])


def test_what_is_no_encoder_or_has_no_differences_is_refused(tokenizer):
    for name, changes, expected in (
        ("bert", {"is_decoder": True}, "is_decoder true hides the tokens to the right"),
        ("roberta", {"pad_token_id": None}, "roberta counts positions from pad_token_id, which its config lacks"),
        ("v2 buckets", {"position_buckets": 1}, "with one position bucket has no differences"),
    ):
        model = build(CONFIGS[name])
        model.config.update(changes)
        with pytest.raises(InputError, match=expected):
            Teacher(model, tokenizer)


def test_a_teacher_reads_inputs_of_one_length_after_another(tokenizer):
    """What DeBERTa keeps of its positions serves every length."""
    config = CONFIGS["v2 buckets"]
    teacher = Teacher(build(config), tokenizer, [-1, 0, -1])
    for lengths in ([(9, 4)], [(70, 75), (2, 0)], [(9, 4)]):
        inputs = interaction_inputs(config, lengths)
        fresh = Teacher(build(config), tokenizer, [-1, 0, -1]).attention(inputs)
        for ours, theirs in zip(teacher.attention(inputs), fresh, strict=True):
            assert torch.equal(ours.q, theirs.q)
            assert torch.equal(ours.position_bias.c2p, theirs.position_bias.c2p)
            assert torch.equal(ours.position_bias.slot_of_delta, theirs.position_bias.slot_of_delta)


def test_talking_heads_are_refused(tokenizer):
    config = DebertaConfig(**RELATIVE, pos_att_type="c2p|p2c", talking_head=True)
    with pytest.raises(InputError, match="expected talking_head=False"):
        Teacher(build(config), tokenizer)


NLI = {"id2label": {0: "contradiction", 1: "entailment", 2: "neutral"}}


def save(folder, config, tokenizer, auto_class=AutoModelForSequenceClassification, **fields):
    config = copy.deepcopy(config)
    config.update(fields)
    torch.manual_seed(0)
    auto_class.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "distilbert", "modernbert", "v1 c2p p2c", "v2 buckets"])
def test_loading_a_classifier_gives_its_frozen_encoder_in_silence(name, tokenizer, tmp_path, caplog, capfd):
    path = save(tmp_path, CONFIGS[name], tokenizer, **NLI)
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        teacher = Teacher.load(path, layers=[-1, 0], dtype=torch.float64)
    assert not caplog.records
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
    assert teacher.num_heads == HEADS
    assert teacher.layers == (2, 0)
    inputs = interaction_inputs(CONFIGS[name], [(9, 4)])
    classifier = AutoModelForSequenceClassification.from_pretrained(path).double()
    expected = Teacher(classifier.base_model, teacher.tokenizer, [-1, 0]).attention(inputs)
    for ours, theirs in zip(teacher.attention(inputs), expected, strict=True):
        assert torch.equal(ours.k, theirs.k)
        assert not ours.k.requires_grad


def test_minilm_reads_a_real_pair(minilm_path, caplog):
    teacher = Teacher.load(minilm_path, layers=[-1, -2], dtype=torch.float64)
    assert "is no NLI classifier" in caplog.text
    assert (teacher.layers, teacher.num_heads, teacher.max_length) == ((5, 4), 12, 512)
    encoded = teacher.tokenizer("How tall is it?", "It is 8,849 metres tall.", return_tensors="pt")
    content = torch.isin(encoded["input_ids"], torch.tensor(teacher.tokenizer.all_special_ids)).logical_not()[0]
    inputs = SimpleNamespace(
        teacher_input_ids=encoded["input_ids"],
        teacher_attention_mask=encoded["attention_mask"],
        teacher_token_type_ids=encoded["token_type_ids"],
        teacher_index=content.nonzero()[:, 0],
        teacher_positions=content.nonzero()[:, 0].int(),
        teacher_span=len(content),
    )
    assert encoded["token_type_ids"].sum() > 0
    dense = AutoModel.from_pretrained(minilm_path, attn_implementation="eager", dtype=torch.float64).eval()
    with torch.no_grad():
        attentions = dense(**encoded, output_attentions=True).attentions
    lengths = [int(((encoded["token_type_ids"][0] == segment) & content).sum()) for segment in (0, 1)]
    layout = layout_of([tuple(lengths)])
    for attention, layer in zip(teacher.attention(inputs), (5, 4), strict=True):
        every_head = attentions[layer][0][:, content][:, :, content]
        expected = (every_head / every_head.sum(-1, keepdim=True)).mean(dim=0)
        rows = attention_map_rows(attention, layout, range(sum(lengths)), normalization="joint", teacher_side=True)
        torch.testing.assert_close(torch.cat(rows), expected, rtol=0, atol=1e-10)


def test_an_attention_implementation_may_be_chosen(tokenizer, tmp_path):
    path = save(tmp_path, CONFIGS["bert"], tokenizer, **NLI)
    inputs = interaction_inputs(CONFIGS["bert"], [(9, 4)])
    eager, sdpa = (
        Teacher.load(path, attn_implementation=name, dtype=torch.float64).attention(inputs)[0].q
        for name in ("eager", "sdpa")
    )
    torch.testing.assert_close(eager, sdpa, rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="attention implementation 'flex_attention' is unknown"):
        Teacher.load(path, attn_implementation="flex_attention")


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "electra", "distilbert", "modernbert"])
def test_sdpa_is_the_default_where_transformers_has_it(name, tokenizer, tmp_path):
    teacher = Teacher.load(save(tmp_path, CONFIGS[name], tokenizer, **NLI))
    assert teacher._model.config._attn_implementation == "sdpa"


def test_debertas_attention_implementations(tokenizer, tmp_path):
    path = save(tmp_path, CONFIGS["v2 buckets"], tokenizer, **NLI)
    with pytest.raises(
        InputError, match="'flash_attention_2' is unknown to DeBERTa; expected one of eager, sdpa, flashd"
    ):
        Teacher.load(path, attn_implementation="flash_attention_2")
    with pytest.raises(
        InputError, match=r"'flashdeberta' (is not installed|computes in bfloat16 or float16|needs a GPU)"
    ):
        Teacher.load(path, attn_implementation="flashdeberta")


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("name", ["v1 c2p p2c", "v2 buckets", "v2 share_att_key p2c", "v2 absolute positions, types"])
def test_flashdeberta_is_handed_what_it_reads(name, padding_side, tokenizer, monkeypatch):
    """Its kernel wants padding on the right and embeddings of every slot; the maps are those of SDPA."""
    calls = []

    def attention(q, k, v, mask, *, position_buckets, max_relative_positions, **arguments):
        calls.append(position_buckets)
        assert torch.equal(mask.long().argmin(1), mask.sum(1) % mask.shape[1])
        tokens, buckets = mask.shape[1], max(position_buckets, 0)
        delta = torch.arange(-tokens, tokens + 1)
        if buckets:
            delta = deberta.make_log_bucket_position(delta, buckets, max_relative_positions).long()
        span = buckets or max_relative_positions
        slots = (delta + span).clamp(0, 2 * span - 1)
        return deberta.sdpa_in_row_chunks(q, k, v, mask, slot_of_delta=slots, **arguments)

    monkeypatch.setattr(deberta, "flashdeberta", attention)
    config, lengths = {**CONFIGS, **OTHERS}[name], [(20, 31), (9, 4)]
    inputs = interaction_inputs(config, lengths, padding_side)
    expected = Teacher(build(config), tokenizer, [-1]).attention(inputs)
    assert not calls
    monkeypatch.setattr(deberta, "flashdeberta_obstacle", lambda dtype, head_dim, device: None)
    for implementation, used in ((None, True), ("flashdeberta", True), ("sdpa", False), ("eager", False)):
        calls.clear()
        (attention,) = Teacher(build(config), tokenizer, [-1], implementation).attention(inputs)
        assert bool(calls) == used
        torch.testing.assert_close(attention.q, expected[0].q, rtol=0, atol=1e-10)


@pytest.mark.skipif(sys.platform != "linux", reason="flashdeberta, of the test extra, needs Triton, which is for Linux")
@pytest.mark.parametrize(
    ("name", "padding_side"),
    [
        *((name, "left") for name in DEBERTAS if not name.endswith(("plain", "no terms"))),
        *((name, "right") for name in ("v1 c2p p2c", "v2 buckets")),
    ],
)
def test_flashdeberta_gives_the_queries_of_eager_attention(name, padding_side, tokenizer, monkeypatch):
    """The real kernel, without a GPU in Triton's interpreter, behind the attention of two blocks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
        monkeypatch.setattr(deberta, "flashdeberta_obstacle", lambda dtype, head_dim, device: None)
    config = copy.deepcopy(CONFIGS[name])
    config.update({"num_attention_heads": 2})  # of size 16, the least that its products take
    inputs = interaction_inputs(config, [(20, 31), (9, 4)], padding_side)
    for field, value in vars(inputs).items():
        setattr(inputs, field, value.to(device) if isinstance(value, torch.Tensor) else value)

    def queries(implementation, dtype):
        rounded = build(config).half().to(device, dtype)
        return Teacher(rounded, tokenizer, [-1], implementation).attention(inputs)[0].q

    keys = ("eager", torch.float64), ("eager", torch.float16), ("flashdeberta", torch.float16)
    exact, eager, kernel = (queries(*key) for key in keys)
    assert (kernel.double() - exact).abs().max() <= error_bound(eager, exact, torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["v1 c2p p2c", "v2 buckets"])
def test_deberta_in_the_dtypes_of_training_errs_no_more_than_transformers(name, dtype, tokenizer):
    """The queries of the last block, behind the attention of two: by the error rule, eager's being the same dtype's."""
    inputs = interaction_inputs(CONFIGS[name], [(60, 75), (9, 4)])

    def queries(implementation, dtype):
        rounded = build(CONFIGS[name]).to(torch.bfloat16).to(dtype)
        return Teacher(rounded, tokenizer, [-1], implementation).attention(inputs)[0].q

    exact, eager, chunked = (queries(*key) for key in (("eager", torch.float64), ("eager", dtype), ("sdpa", dtype)))
    assert (chunked.double() - exact).abs().max() <= error_bound(eager, exact, torch.finfo(dtype).eps)


def test_the_position_settings_of_deberta_v3_large_at_2_x_300_tokens(tokenizer):
    """256 buckets of differences up to 512, which the joint input exceeds."""
    sizes = {"max_position_embeddings": 512, "position_buckets": 256, "max_relative_positions": -1}
    config = DebertaV2Config(**V2 | sizes | {"share_att_key": True, "pos_att_type": ["p2c", "c2p"]})
    inputs, layout = interaction_inputs(config, [(300, 300)]), layout_of([(300, 300)])
    (attention,) = Teacher(build(config), tokenizer).attention(inputs)
    rows = [0, 137, 299, 300, 599]
    expected = dense_probabilities(config, inputs)[-1][0][:, rows]
    ours = attention_map_rows(attention, layout, rows, normalization="joint", num_head_groups=HEADS, teacher_side=True)
    torch.testing.assert_close(torch.stack(ours, dim=1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "modernbert", "v1 c2p p2c", "v2 buckets"])
def test_no_maps_are_held_on_long_inputs(name, tokenizer, monkeypatch):
    """The peak of a forward pass is below the maps of one block, of which eager attention holds one or several."""
    in_small_chunks = functools.partial(deberta.sdpa_in_row_chunks, workspace_bytes=1 << 20)
    monkeypatch.setattr(deberta, "sdpa_in_row_chunks", in_small_chunks)
    config = copy.deepcopy(CONFIGS[name])
    heads, tokens = 16, 500
    # More heads, and the tables shorter than the input: what is left to grow with its square is the maps alone.
    fields = ({"n_heads": heads} if name == "distilbert" else {"num_attention_heads": heads}) | {"hidden_size": 32}
    config.update(fields | {"max_position_embeddings": 1024, "position_buckets": 16, "max_relative_positions": 32})
    inputs = interaction_inputs(config, [(248, tokens - 251), (9, 4)])
    peaks = {}
    for implementation in (None, "eager"):
        torch.manual_seed(0)
        teacher = Teacher(AutoModel.from_config(copy.deepcopy(config)), tokenizer, [-1], implementation)
        run = functools.partial(teacher.attention, inputs)
        run()
        peaks[implementation] = peak_bytes(run)
    one_block = 2 * heads * tokens**2 * 4
    assert peaks["eager"] > one_block
    assert peaks[None] < one_block / 2


@pytest.mark.parametrize("name", ["bert", "modernbert", "v1 c2p p2c", "v2 buckets"])
def test_a_checkpoint_that_asks_for_maps_gets_none(name, tokenizer, tmp_path):
    path = save(tmp_path, CONFIGS[name], tokenizer, **NLI)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, "output_attentions": True}))
    teacher = Teacher.load(path, attn_implementation="eager")
    blocks = teacher._family.blocks(teacher._model)
    kept = []
    for block in blocks:
        block.register_forward_hook(
            lambda module, args, kwargs, output: kept.append((kwargs, output)), with_kwargs=True
        )
    teacher.attention(interaction_inputs(CONFIGS[name], [(9, 4)]))
    assert len(kept) == len(blocks)
    for kwargs, output in kept:
        assert not kwargs.get("output_attentions")
        outputs = output if isinstance(output, tuple) else (output,)
        assert not [value for value in outputs if torch.is_tensor(value) and value.dim() == 4]


MODERN = ModernBertConfig(**SIZES | {"num_hidden_layers": 5}, local_attention=8, **MODERN_TOKENS)


@pytest.mark.parametrize(("layers", "named"), [([-1], "4 (-1)"), ([-2, -3], "2 (-3)"), ([0, 1], "1 (-4)")])
def test_a_local_layer_of_modernbert_is_refused_with_the_global_ones(layers, named, tokenizer):
    with pytest.raises(InputError) as refusal:
        Teacher(build(MODERN), tokenizer, layers)
    assert str(refusal.value) == (
        f"teacher: layer {named} is local, with a window of 8 tokens; give --teacher_layers -2, the last of the global "
        "ones: 0 (-5), 3 (-2)"
    )


def test_layers_of_modernbert_above_the_highest_supervised_one_are_left_out(tokenizer):
    model = build(MODERN)
    teacher = Teacher(model, tokenizer, [-2, 0])
    assert teacher.layers == (3, 0)
    assert len(model.layers) == 4
    assert len(teacher.attention(interaction_inputs(MODERN, [(20, 30)]))) == 2


@pytest.mark.parametrize(
    ("auto_class", "fields"),
    [(AutoModelForSequenceClassification, {}), (AutoModel, NLI)],
    ids=["other labels", "base checkpoint"],
)
def test_a_teacher_that_is_no_nli_classifier_gets_a_warning(auto_class, fields, tokenizer, tmp_path, caplog):
    path = save(tmp_path, CONFIGS["bert"], tokenizer, auto_class, **fields)
    Teacher.load(path)
    assert "is no NLI classifier" in caplog.text


def test_loading_under_a_zero3_configuration_leaves_the_weights_whole(tokenizer, tmp_path):
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, deepspeed_config, is_deepspeed_zero3_enabled

    path = save(tmp_path, CONFIGS["bert"], tokenizer, **NLI)
    configured = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    teacher = Teacher.load(path)
    assert is_deepspeed_zero3_enabled()
    assert deepspeed_config() is configured.config
    (attention,) = teacher.attention(interaction_inputs(CONFIGS["bert"], [(9, 4)]))
    assert attention.q.shape == (13, HEADS, 8)


def test_an_unsupported_family_is_refused_by_name(tokenizer, tmp_path):
    MPNetConfig(**NLI).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"'mpnet' is not supported; expected one of bert, .*roberta.* deberta-v2, modernbert$"
    ):
        Teacher.load(str(tmp_path))


def test_a_slow_tokenizer_is_refused(tokenizer, tmp_path):
    path = save(tmp_path, CONFIGS["bert"], ByT5Tokenizer(), **NLI)
    with pytest.raises(InputError, match="ByT5Tokenizer is a slow tokenizer"):
        Teacher.load(path)


def test_a_missing_tokenizer_is_refused(tokenizer, tmp_path):
    path = save(tmp_path, CONFIGS["bert"], tokenizer, **NLI)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match=r"expected a tokenizer beside the weights|cannot load a fast tokenizer"):
        Teacher.load(path)


def test_a_pickled_checkpoint_is_refused(tokenizer, tmp_path):
    path = save(tmp_path, CONFIGS["bert"], tokenizer, **NLI)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load the model from safetensors weights") as refusal:
        Teacher.load(path)
    assert "\n" not in str(refusal.value)


def test_a_checkpoint_that_lacks_encoder_weights_is_refused(tokenizer, tmp_path):
    path = save(tmp_path, CONFIGS["bert"], tokenizer, **NLI)
    deeper = copy.deepcopy(CONFIGS["bert"])
    deeper.update({"num_hidden_layers": 4, "architectures": ["BertForSequenceClassification"]})
    deeper.save_pretrained(path)
    with pytest.raises(InputError, match=r"lacks 16 weights of BertModel, among them encoder\.layer\.3"):
        Teacher.load(path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        Teacher.load(str(tmp_path / "nothing"))
