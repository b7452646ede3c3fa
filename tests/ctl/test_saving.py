"""Writing a file: there is always a whole one, and it stays whose it was."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from relayd.ctl.exits import CommandFailed, Exit
from relayd.ctl.saving import write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "relayd.toml"
    path.write_text("old")
    path.chmod(0o640)
    return path


def refused(path: Path) -> str:
    with pytest.raises(CommandFailed) as caught:
        write(str(path), "new")
    assert caught.value.exit == Exit.FAILED
    [line] = caught.value.lines
    assert line.startswith(f"{path} can't be written: ")
    return line


def test_a_new_file_is_its_owner_s_alone(tmp_path: Path) -> None:
    path = tmp_path / "new"
    write(str(path), "é\r\nx\n")
    assert path.read_bytes() == "é\r\nx\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_it_keeps_mode_and_attributes_and_has_a_new_time(path: Path) -> None:
    os.utime(path, (1, 1))
    try:
        os.setxattr(path, "user.of", b"mine")
    except OSError:
        kept: list[str] = []
    else:
        kept = ["user.of"]
    write(str(path), "new")
    assert path.read_text() == "new"
    found = path.stat()
    assert stat.S_IMODE(found.st_mode) == 0o640
    assert found.st_mtime > 1e9
    assert [each for each in os.listxattr(path) if each == "user.of"] == kept
    assert os.listdir(path.parent) == [path.name]


def test_another_name_of_it_has_the_old_one(path: Path) -> None:
    """It is not written into, so that whoever reads it now has it whole."""
    with open(path) as reading:
        write(str(path), "new")
        assert reading.read() == "old"


def test_a_link_stays(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path.name)
    write(str(link), "new")
    assert link.is_symlink()
    assert path.read_text() == "new"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_it_keeps_its_owner(path: Path) -> None:
    os.chown(path, 65534, 65533)
    write(str(path), "new")
    found = path.stat()
    assert (found.st_uid, found.st_gid) == (65534, 65533)
    assert stat.S_IMODE(found.st_mode) == 0o640


def test_an_owner_that_can_t_be_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = os.stat_result((0o100640, 0, 0, 1, 12, 34, 3, 0, 0, 0))
    really = os.stat

    def denied(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(
        os, "stat", lambda each, **k: other if each == str(path) else really(each, **k)
    )
    monkeypatch.setattr(os, "fchown", denied)
    assert refused(path).endswith(
        "it belongs to uid 12, gid 34, and only root may write it anew for them"
    )
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == [path.name]


def test_what_can_t_be_written(tmp_path: Path, path: Path) -> None:
    assert refused(tmp_path).endswith("it is no file; say which file in it")
    assert refused(Path("/dev/null")).endswith("it is no file; say which file in it")
    assert refused(tmp_path / "none" / "x").endswith("No such file or directory")
    assert refused(path / "x").endswith("Not a directory")
    assert refused(tmp_path / ("x" * 300)).endswith("File name too long")
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_a_step_that_fails_leaves_the_old_one(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    assert refused(path).endswith("No space left on device")
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == [path.name]


def test_what_others_can_read_gets_no_secrets(path: Path) -> None:
    path.chmod(0o644)
    with pytest.raises(CommandFailed) as caught:
        write(str(path), "new", secret=True)
    [line] = caught.value.lines
    assert line == (
        f"{path} can't be written: others can read it, and it would have in clear what"
        " not everybody may read: chmod o-r, or write a new file"
    )
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == [path.name]
    path.chmod(0o640)
    write(str(path), "new", secret=True)
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    new = path.with_name("new")
    write(str(new), "new", secret=True)
    assert stat.S_IMODE(new.stat().st_mode) == 0o600
