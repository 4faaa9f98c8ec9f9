"""Files are whole or absent, and look like any other new file."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from batchnorm.files import finite, remove_temporary, write_atomic, write_json


@pytest.fixture
def umask():
    """Sets the umask, and puts it back."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o000])
def test_mode_is_that_of_an_ordinary_new_file(tmp_path: Path, umask, mask: int):
    umask(mask)
    write_atomic(tmp_path / "atomic", b"x")
    (tmp_path / "ordinary").write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == 0o666 & ~mask
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert os.umask(mask) == mask


def test_new_contents_replace_old_ones(tmp_path: Path):
    write_atomic(tmp_path / "file", b"a longer old text")
    write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_failure_keeps_the_old_file_and_leaves_no_temporary_one(tmp_path: Path, monkeypatch, call: str):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"No space left on device.*file'"):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_interrupt_keeps_the_old_file_and_leaves_no_temporary_one(tmp_path: Path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_file_and_folder_are_synced_around_the_rename(tmp_path: Path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def logged_replace(old: str, new: Path) -> None:
        events.append("replace")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    write_atomic(tmp_path / "file", b"x")
    assert events == ["file", "replace", "folder"]


def test_missing_folder_is_an_os_error(tmp_path: Path):
    with pytest.raises(OSError, match=r"No such file or directory.*nowhere"):
        write_atomic(tmp_path / "nowhere" / "file", b"x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_what_json_does_not_have(tmp_path: Path, value: float):
    with pytest.raises(ValueError, match=f"not JSON compliant: {value}"):
        write_json(tmp_path / "record.json", {"value": [value]})
    assert os.listdir(tmp_path) == []


def test_json_does_not_depend_on_the_order_of_the_fields(tmp_path: Path):
    write_json(tmp_path / "a.json", {"a": 1, "b": [2.5]})
    write_json(tmp_path / "b.json", {"b": [2.5], "a": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1, "b": [2.5]}


def test_finite_replaces_nan_and_infinity_at_any_depth():
    nan, inf = float("nan"), float("inf")
    record = {"a": nan, "b": [1.0, [inf, {"c": -inf}]], "d": "nan", "e": None, "f": 3, "g": True}
    assert finite(record) == {"a": None, "b": [1.0, [None, {"c": None}]], "d": "nan", "e": None, "f": 3, "g": True}


def test_what_a_killed_write_leaves_is_removed_and_nothing_else(tmp_path: Path):
    (tmp_path / "work").mkdir()
    for name in (".claims.json.abc.tmp", "work/.bn.checkpoint.abc.tmp", "kept.tmp", ".lock"):
        (tmp_path / name).touch()
    remove_temporary(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [".lock", "kept.tmp", "work"]
