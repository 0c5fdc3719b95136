"""A folder that is replaced at once: with the caller's permissions, and on the disk."""

import os
from pathlib import Path

import pytest

from probsae.models.files import atomic_write


@pytest.fixture
def umask():
    """Set the process's, and put it back."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0o002, 0o775)])
def test_permissions_are_the_callers(tmp_path, umask, mask, mode):
    umask(mask)
    for _ in range(2):  # new, and in the place of another
        with atomic_write(tmp_path / "run", ("a",)) as folder:
            (folder / "a").write_text("content")
        assert (tmp_path / "run").stat().st_mode & 0o777 == mode
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_takes_a_place_is_on_the_disk(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def synced(handle):
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def replaced(a, b):
        events.append(f"{Path(a).name} to {Path(b).name}")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    with atomic_write(tmp_path / "run") as folder:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text("content")
    assert events == ["model", "weights", "new", "new to run", tmp_path.name]


def test_an_error_leaves_what_was_there(tmp_path):
    def write(text, error=None):
        with atomic_write(tmp_path / "run") as folder:
            (folder / "a").write_text(text)
            if error is not None:
                raise error

    write("first")
    with pytest.raises(KeyboardInterrupt):
        write("second", KeyboardInterrupt())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "a").read_text() == "first"
