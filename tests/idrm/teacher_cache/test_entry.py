"""Files of entries: whole, and refused when they are not what was written."""

import multiprocessing
import os

import pytest
import torch

from idrm.teacher_cache.entry import DamagedEntry, load_entry, save_entry

TENSORS = {"q": torch.arange(12).view(2, 3, 2).bfloat16(), "k": torch.ones(2, 3, 2).bfloat16()}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


def load(path, key="key", shapes=SHAPES, dtype=torch.bfloat16):
    return load_entry(path, key, shapes, dtype)


def same(tensors):
    return tensors.keys() == TENSORS.keys() and all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_an_entry_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "ab" / "entry.safetensors"
    save_entry(path, "key", TENSORS)
    assert same(load(path))
    assert os.listdir(path.parent) == [path.name]
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "other.safetensors")
    content, mode = path.read_bytes(), path.stat().st_mode
    save_entry(path, "key", TENSORS)
    assert path.read_bytes() == content
    plain = tmp_path / "plain"
    plain.touch()
    assert mode == plain.stat().st_mode  # others may read it where they may read what is the user's


def test_an_entry_without_one_of_its_bytes_or_with_another_is_damaged(tmp_path):
    """Every byte of the file, removed and altered: what is read is refused, or (never here) what was written."""
    path = tmp_path / "entry.safetensors"
    save_entry(path, "key", TENSORS)
    content = path.read_bytes()
    for position in range(len(content)):
        altered = bytearray(content)
        altered[position] ^= 1
        for damaged in (content[:position] + content[position + 1 :], bytes(altered), content[:position]):
            path.write_bytes(damaged)
            with pytest.raises(DamagedEntry):
                load(path)
    header = b'{"__metadata__":null}   '
    for damaged in (content + b"\0", b"", len(header).to_bytes(8, "little") + header):
        path.write_bytes(damaged)
        with pytest.raises(DamagedEntry, match="damaged"):
            load(path)
    path.write_bytes(content)
    assert same(load(path))


def test_a_foreign_entry_is_damaged(tmp_path):
    path = tmp_path / "entry.safetensors"
    save_entry(path, "key", TENSORS)
    with pytest.raises(DamagedEntry, match="the entry of another key"):
        load(path, key="other")
    for arguments in ({"shapes": {**SHAPES, "k": (2, 2, 3)}}, {"shapes": {"q": (2, 3, 2)}}, {"dtype": torch.float16}):
        with pytest.raises(DamagedEntry, match="other names, shapes or dtypes"):
            load(path, **arguments)


def test_what_cannot_be_read_says_so(tmp_path):
    with pytest.raises(DamagedEntry, match="it cannot be read: Is a directory"):
        load(tmp_path)


def _write_often(path, value):
    for _ in range(100):
        save_entry(path, "key", {"q": torch.full((64, 64), value, dtype=torch.bfloat16)})


def test_processes_may_write_one_entry_at_once(tmp_path):
    path = tmp_path / "ab" / "entry.safetensors"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(path, float(value))) for value in range(2)]
    for writer in writers:
        writer.start()
    read = 0
    while any(writer.is_alive() for writer in writers) or not read:
        if path.exists():
            values = load(path, shapes={"q": (64, 64)})["q"]
            assert values.min() == values.max()
            read += 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert os.listdir(path.parent) == [path.name]


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save_entry(tmp_path / "entry.safetensors", "key", TENSORS)
    assert not os.listdir(tmp_path)
