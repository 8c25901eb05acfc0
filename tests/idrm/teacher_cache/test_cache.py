"""What is stored of a batch, under which key, and how much of it."""

import errno
import logging
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertModel, DebertaV2Model

from idrm.alignment import PairEncoder, encode_preferences
from idrm.capture import Teacher
from idrm.collator import PairCollator
from idrm.errors import InputError
from idrm.preference import load_preferences
from idrm.teacher_cache import CachedTeacher, ReleaseTeacher, TeacherCache
from idrm_kernels import attention_map_rows

LAYERS = (-1, 0)


@pytest.fixture(scope="module")
def pairs(student_tokenizer, teacher_tokenizer, pairs_path):
    encoder = PairEncoder(student_tokenizer, teacher_tokenizer, max_length=128, teacher_max_length=128)
    return encode_preferences(load_preferences(str(pairs_path))[0], encoder)[0]


@pytest.fixture
def make_teacher(teacher_path, teacher_tokenizer, encoder_config):
    """make_teacher("bert" or "deberta", layers): the tiny BERT, or a DeBERTa with both position terms."""

    def make(kind="bert", layers=LAYERS):
        if kind == "bert":
            return Teacher(BertModel.from_pretrained(teacher_path), teacher_tokenizer, layers)
        torch.manual_seed(0)
        config = encoder_config("deberta-v2", position_buckets=8, max_relative_positions=64, norm_rel_ebd="layer_norm")
        return Teacher(DebertaV2Model(config), teacher_tokenizer, layers)

    return make


@pytest.fixture
def collate(student_tokenizer, teacher_tokenizer):
    def of(cache, pairs):
        return PairCollator(student_tokenizer, teacher_tokenizer, cache=cache)([*pairs])["interaction"]

    return of


def read_and_store(teacher, cache, inputs):
    cached = CachedTeacher(teacher, cache)
    attention = cached.attention(inputs)
    cached.store()
    return attention


def no_forward(*_):
    raise AssertionError("the teacher ran")


@pytest.mark.parametrize("normalization", ["block", "joint"])
@pytest.mark.parametrize("kind", ["bert", "deberta"])
def test_maps_are_those_of_the_teacher_in_bfloat16(kind, normalization, make_teacher, pairs, collate, tmp_path):
    teacher = make_teacher(kind)
    options = {"normalization": normalization, "num_head_groups": 2}
    cache = TeacherCache(tmp_path, teacher, "maps", **options)
    batch = [pairs[0], {**pairs[1], "num_units": [0, 0], "teacher_tokens": 0}, pairs[2]]
    empty = {"student_positions", "student_units", "teacher_positions", "teacher_units", "teacher_places"}
    batch[1].update({name: [[], []] for name in empty})
    inputs = collate(cache, batch)
    computed = read_and_store(teacher, cache, inputs)
    layout = inputs.layout
    assert [maps.maps.shape for maps in computed] == [(3, 2, layout.max_units, layout.max_units)] * 2
    live = teacher.attention(collate(None, batch))
    for stored, block in zip(computed, live, strict=True):
        assert stored.maps.dtype == torch.bfloat16
        rows = attention_map_rows(block, layout, range(layout.total_units), teacher_side=True, **options)
        units = [sum(pair["num_units"]) for pair in batch]
        expected = torch.zeros(stored.maps.shape)
        for example, count in enumerate(units):
            for row in range(count):
                expected[example, :, row, :count] = rows[sum(units[:example]) + row]
        # A pair read by itself is not padded: equal up to rounding.
        torch.testing.assert_close(stored.maps.float(), expected, rtol=2**-8, atol=1e-6)
    teacher.attention = no_forward
    found = CachedTeacher(teacher, cache)
    for ours, theirs in zip(found.attention(collate(cache, batch)), computed, strict=True):
        assert torch.equal(ours.maps, theirs.maps)
    assert (found.found, found.computed) == (2, 0)


@pytest.mark.parametrize("kind", ["bert", "deberta"])
def test_queries_and_keys_are_those_of_the_teacher_in_bfloat16(kind, make_teacher, pairs, collate, tmp_path):
    teacher = make_teacher(kind)
    cache = TeacherCache(tmp_path, teacher, "queries_and_keys")
    batch = [pairs[index] for index in range(3)]
    computed = read_and_store(teacher, cache, collate(cache, batch))
    for ours, theirs in zip(computed, teacher.attention(collate(None, batch)), strict=True):
        for name in ("q", "k"):
            expected = getattr(theirs, name)
            torch.testing.assert_close(getattr(ours, name).float(), expected, rtol=2**-8, atol=1e-5)
        assert (ours.position_bias is None) == (kind == "bert")
        if kind == "deberta":
            for name in ("c2p", "p2c"):
                bias, expected = getattr(ours.position_bias, name), getattr(theirs.position_bias, name)
                torch.testing.assert_close(bias.float(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
            assert torch.equal(ours.position_bias.positions, theirs.position_bias.positions)
    teacher.attention = no_forward
    for ours, theirs in zip(CachedTeacher(teacher, cache).attention(collate(cache, batch)), computed, strict=True):
        assert torch.equal(ours.q, theirs.q)
        assert torch.equal(ours.k, theirs.k)


@pytest.mark.parametrize("form", ["maps", "queries_and_keys"])
def test_only_missing_pairs_are_computed(form, make_teacher, pairs, collate, tmp_path):
    """A pair found among missing ones, and a damaged one, in other batches than the first time."""
    teacher = make_teacher()
    cache = TeacherCache(tmp_path, teacher, form)
    all_at_once = read_and_store(teacher, cache, collate(cache, [pairs[index] for index in range(4)]))
    files = sorted(tmp_path.glob("*/*.safetensors"))
    assert len(files) == 4
    damaged = files[0].read_bytes()
    files[0].write_bytes(damaged[:-1])
    files[1].unlink()
    cached = CachedTeacher(teacher, cache)
    read = []
    attention = teacher.attention
    teacher.attention = lambda inputs: read.append(len(inputs.teacher_input_ids)) or attention(inputs)
    again = cached.attention(collate(cache, [pairs[index] for index in range(4)]))
    cached.store()
    assert (cached.found, cached.computed, read) == (2, 2, [1, 1])
    for ours, theirs in zip(again, all_at_once, strict=True):
        for name in ("maps",) if form == "maps" else ("q", "k"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    cached.attention(collate(cache, [pairs[index] for index in range(4)]))
    assert (cached.found, cached.computed) == (6, 2)


def test_keys_follow_what_decides_the_values(make_teacher, pairs, collate, tmp_path):
    def files(teacher, form, pair, **options):
        folder = tmp_path / "one"
        shutil.rmtree(folder, ignore_errors=True)
        cache = TeacherCache(folder, teacher, form, **options)
        read_and_store(teacher, cache, collate(cache, [pair]))
        (path,) = folder.glob("*/*.safetensors")
        return path.name

    pair = pairs[0]
    bert = make_teacher()
    own = files(bert, "maps", pair)
    assert own == files(make_teacher(), "maps", pair)
    others = [
        files(bert, "maps", pairs[1]),
        files(bert, "maps", pair, normalization="joint"),
        files(bert, "maps", pair, num_head_groups=2),
        files(make_teacher(layers=[-1]), "maps", pair),
        files(make_teacher("deberta"), "maps", pair),
        files(bert, "queries_and_keys", pair),
    ]
    assert len({own, *others}) == 7
    # Queries and keys are the same whatever is made of them.
    assert files(bert, "queries_and_keys", pair, num_head_groups=2) == others[-1]


def test_the_smaller_form_is_taken_and_its_size_said(make_teacher, pairs, collate, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    teacher = make_teacher()
    forms = {}
    for groups in (1, 2):
        folder = tmp_path / str(groups)
        cache = TeacherCache.open(folder, teacher, [pairs, pairs], num_head_groups=groups)
        for first in range(0, len(pairs), 8):
            read_and_store(teacher, cache, collate(cache, [pairs[index] for index in range(first, first + 8)]))
        stored = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
        said = float(caplog.records[-1].getMessage().split(" take ")[1].split(" GB")[0]) * 10**9
        assert said == pytest.approx(stored, rel=0.05)
        forms[groups] = cache.form
        caplog.clear()
        assert TeacherCache.open(folder, teacher, [pairs], num_head_groups=groups).form == cache.form
        assert "48 of them are there" in caplog.text
    assert forms == {1: "maps", 2: "queries_and_keys"}


def test_a_cap_leaves_pairs_to_the_teacher(make_teacher, pairs, collate, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    teacher = make_teacher()
    TeacherCache.open(tmp_path, teacher, [pairs])
    needed = float(caplog.text.split(" take ")[1].split(" GB")[0])
    cache = TeacherCache.open(tmp_path, teacher, [pairs], max_gigabytes=needed / 2)
    batch = [pairs[index] for index in range(48)]
    cached = CachedTeacher(teacher, cache)
    first = cached.attention(collate(cache, batch))
    cached.store()
    files = sorted(tmp_path.glob("*/*.safetensors"))
    assert 12 < len(files) < 36
    assert f"{len(files)} of the 48 missing pairs are stored" in caplog.text
    cached.attention(collate(cache, batch))
    cached.store()
    assert (cached.found, cached.computed) == (len(files), 96 - len(files))
    assert sorted(tmp_path.glob("*/*.safetensors")) == files
    # Full already, also for another teacher: nothing more is stored, and what is there is found, or mended.
    again = TeacherCache.open(tmp_path, teacher, [pairs], max_gigabytes=needed / 2)
    content = files[0].read_bytes()
    files[0].write_bytes(content[:-1])
    inputs = collate(again, batch)
    assert inputs.cached.found == len(files) - 1
    read_and_store(teacher, again, inputs)
    assert sorted(tmp_path.glob("*/*.safetensors")) == files
    assert files[0].read_bytes() == content
    other = make_teacher("deberta")
    TeacherCache.open(tmp_path, other, [pairs], max_gigabytes=needed / 2)
    assert "by other entries; 0 of the 48 missing pairs are stored" in caplog.text
    assert first[0].maps.shape[0] == 48


@pytest.mark.parametrize(("error", "times"), [(errno.ENOSPC, 1), (errno.EMFILE, 4)])
def test_what_the_disk_refuses_stops_no_training(
    error, times, make_teacher, pairs, collate, tmp_path, monkeypatch, caplog
):
    teacher = make_teacher()
    cache = TeacherCache(tmp_path, teacher, "maps")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(error, os.strerror(error))))
    for _ in range(2):
        read_and_store(teacher, cache, collate(cache, [pairs[0], pairs[1]]))
    assert caplog.text.count("cannot be written") == times
    assert caplog.text.count("nothing more is stored") == (error == errno.ENOSPC)
    assert not list(tmp_path.glob("*/*"))


def test_a_folder_that_can_only_be_read_serves_what_it_has(make_teacher, pairs, collate, tmp_path, monkeypatch, caplog):
    teacher = make_teacher()
    first = TeacherCache.open(tmp_path, teacher, [pairs])
    read_and_store(teacher, first, collate(first, [pairs[0]]))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    cache = TeacherCache.open(tmp_path, teacher, [pairs])
    assert "can only be read" in caplog.text
    cached = CachedTeacher(teacher, cache)
    cached.attention(collate(cache, [pairs[0], pairs[1]]))
    cached.store()
    assert (cached.found, cached.computed) == (1, 1)
    assert len(list(tmp_path.glob("*/*"))) == 1


def test_refusals(make_teacher, pairs, tmp_path, monkeypatch):
    teacher = make_teacher()
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"--teacher_cache .*: cannot be made \("):
            TeacherCache.open(folder, teacher, [pairs])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"needs [\d.e-]+ GB more, and the disk has 1e-06 GB free; give another"):
        TeacherCache.open(tmp_path / "new", teacher, [pairs])
    with pytest.raises(ValueError, match="expected a batch of a collator with this teacher's cache"):
        CachedTeacher(teacher, TeacherCache(tmp_path, teacher, "maps")).attention(SimpleNamespace(cached=None))


def test_what_a_killed_process_left_is_removed(make_teacher, pairs, tmp_path):
    left = tmp_path / "ab" / ".writing-1"
    left.parent.mkdir()
    left.write_bytes(b"half")
    TeacherCache.open(tmp_path, make_teacher(), [pairs])
    assert left.exists()  # perhaps another process is at it
    os.utime(left, (0, 0))
    TeacherCache.open(tmp_path, make_teacher(), [pairs])
    assert not left.exists()


def test_workers_may_have_a_copy(make_teacher, pairs, collate, tmp_path):
    cache = TeacherCache.open(tmp_path, make_teacher(), [pairs], max_gigabytes=1)
    content = pickle.dumps(cache)
    assert len(content) < 20_000  # no weights
    inputs = collate(pickle.loads(content), [pairs[0]])
    assert len(inputs.cached.missing) == 1


def test_a_batch_moves_with_what_is_cached(make_teacher, pairs, collate, tmp_path):
    cache = TeacherCache(tmp_path, make_teacher(), "maps")
    moved = collate(cache, [pairs[0], pairs[1]]).to("meta")
    (maps,) = moved.cached.stored.values()
    tensors = [maps, moved.student_index, *(pair.inputs.teacher_input_ids for pair in moved.cached.missing)]
    assert len(tensors) == 4
    assert all(tensor.device.type == "meta" for tensor in tensors)


def test_a_teacher_is_released_after_an_epoch(make_teacher, tmp_path):
    teacher = make_teacher()
    moves = []
    teacher.to = moves.append
    ReleaseTeacher(CachedTeacher(teacher, TeacherCache(tmp_path, teacher, "maps"))).on_epoch_end(None, None, None)
    assert moves == ["cpu"]


def test_opening_a_folder_that_others_write_to(make_teacher, pairs, tmp_path, monkeypatch):
    """Files that go while they are looked at."""
    (tmp_path / "ab").mkdir()
    gone = tmp_path / "ab" / ".writing-1"
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([gone]))
    TeacherCache.open(tmp_path, make_teacher(), [pairs], max_gigabytes=1)
