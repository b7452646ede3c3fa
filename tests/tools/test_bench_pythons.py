"""The benchmark's other Python: which it is, and how it is called."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from attrs import evolve

from bench import pythons
from bench.children import CannotMeasure
from bench.pythons import Python, _requirements, ask, find

SYSTEM = Python("/usr", (3, 11, 2))


def a_python(home: Path, prefix: str, version: tuple[int, int, int]) -> Path:
    """A program below `home` that says it is this Python."""
    folder = home / prefix
    file = folder / "bin" / "python3"
    file.parent.mkdir(parents=True)
    said = f'["{folder}", {list(version)}, "--prefix={folder}"]'
    file.write_text(f"#!/bin/sh\necho '{said}'\n")
    file.chmod(0o755)
    return file


def test_a_python_tells_its_prefix_version_and_options() -> None:
    told = ask(sys.executable)
    assert told is not None
    assert told.prefix == sys.base_prefix
    assert told.version == tuple(sys.version_info[:3])


@pytest.mark.parametrize("script", ["exit 1", "echo no", "echo '[1]'"])
def test_what_tells_nothing_is_no_python(script: str, tmp_path: Path) -> None:
    file = tmp_path / "python3"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    assert ask(str(file)) is None
    assert ask(str(tmp_path / "missing")) is None


def test_the_python_of_path_comes_first(tmp_path: Path) -> None:
    a_python(tmp_path, ".pyenv/versions/3.13.0", (3, 13, 0))
    shim = a_python(tmp_path, "elsewhere", (3, 12, 1))
    environ = {"PATH": str(shim.parent)}
    assert find(environ, tmp_path, SYSTEM).version == (3, 12, 1)
    # The one that runs the benchmark is no other one.
    this = Python(str(tmp_path / "elsewhere"), (3, 12, 1))
    assert find(environ, tmp_path, this).version == (3, 13, 0)


def test_the_newest_of_the_version_managers_is_taken(tmp_path: Path) -> None:
    a_python(tmp_path, ".pyenv/versions/3.9.18", (3, 9, 18))
    a_python(tmp_path, ".local/share/uv/python/cpython-3.12.1", (3, 12, 1))
    a_python(tmp_path, "mise/installs/python/3.13.0", (3, 13, 0))
    environ = {"PATH": str(tmp_path)}
    assert find(environ, tmp_path, SYSTEM).version == (3, 12, 1)
    environ["MISE_DATA_DIR"] = str(tmp_path / "mise")
    assert find(environ, tmp_path, SYSTEM).version == (3, 13, 0)


def test_none_that_relayd_runs_under_is_said(tmp_path: Path) -> None:
    a_python(tmp_path, ".pyenv/versions/3.9.18", (3, 9, 18))
    with pytest.raises(CannotMeasure, match="there is no Python of a version manager"):
        find({"PATH": str(tmp_path)}, tmp_path, SYSTEM)


def test_the_variable_decides(tmp_path: Path) -> None:
    a_python(tmp_path, ".pyenv/versions/3.13.0", (3, 13, 0))
    old = a_python(tmp_path, "old", (3, 9, 18))
    wanted = a_python(tmp_path, "wanted", (3, 11, 7))
    environ = {"PATH": str(tmp_path), "BENCH_OTHER_PYTHON": str(wanted)}
    assert find(environ, tmp_path, SYSTEM).version == (3, 11, 7)
    for file, why in ((old, "is older than Python 3.11"), (tmp_path, "is no Python")):
        environ["BENCH_OTHER_PYTHON"] = str(file)
        with pytest.raises(CannotMeasure, match=why):
            find(environ, tmp_path, SYSTEM)


@pytest.mark.parametrize(
    ("prefix", "options", "text"),
    [
        ("/usr", "", "3.11.7 (the system's)"),
        (
            "/root/.pyenv/versions/3.11.7",
            "'--enable-shared'",
            "3.11.7 (pyenv's, configured without --enable-optimizations)",
        ),
        (
            "/home/a/.local/share/uv/python/cpython-3.11.7",
            "'--enable-optimizations' '--with-lto'",
            "3.11.7 (uv's, configured with --enable-optimizations)",
        ),
        (
            "/usr/local",
            "'--enable-optimizations'",
            "3.11.7 (not the system's, configured with --enable-optimizations)",
        ),
    ],
)
def test_a_python_is_named_with_where_it_is_from(
    prefix: str, options: str, text: str
) -> None:
    assert str(Python(prefix, (3, 11, 7), options)) == text


def test_all_that_relayd_requires_is_installed_for_the_other() -> None:
    found = _requirements("relayd")
    assert {"attrs", "twisted", "zope-interface", "automat"} <= set(found)
    # Nothing of the tests, or of an extra.
    assert not {"pytest", "matplotlib", "relayd"} & set(found)


def test_the_other_python_is_not_looked_for_on_an_empty_path(tmp_path: Path) -> None:
    assert not list(tmp_path.iterdir())
    with pytest.raises(CannotMeasure, match="BENCH_OTHER_PYTHON may name one"):
        find({}, tmp_path, SYSTEM)


def test_the_other_pythons_environment_is_set_up_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again when it is no longer the right one."""
    place = tmp_path / "env"
    ran: list[tuple[str, ...]] = []

    def run(*argv: str) -> None:
        ran.append(argv)
        if "venv" in argv:
            (place / "lib" / "python3.11" / "site-packages").mkdir(parents=True)

    python = Python("/opt/python", (3, 11, 7))
    monkeypatch.setattr(pythons, "PLACE", place)
    monkeypatch.setattr(pythons, "_run", run)
    monkeypatch.setattr(pythons, "other_python", lambda: python)
    for _ in range(2):
        # Past its cache, as in another run.
        assert pythons.other_twistd.__wrapped__() == str(place / "bin" / "twistd")
    (venv, pip) = ran
    assert venv[0] == "/opt/python/bin/python3.11"
    assert f"twisted=={version('twisted')}" in pip
    [found] = place.rglob("relayd.pth")
    assert (Path(found.read_text().strip()) / "relayd" / "tcp.py").exists()
    monkeypatch.setattr(
        pythons, "other_python", lambda: evolve(python, version=(3, 11, 8))
    )
    pythons.other_twistd.__wrapped__()
    assert len(ran) == 4


def test_an_environment_that_cannot_be_set_up_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import sys; sys.exit('looking\\nfor it\\nERROR: no such thing')"
    with pytest.raises(CannotMeasure) as caught:
        pythons._run(sys.executable, "-c", script)
    assert str(caught.value) == "the other Python's environment: ERROR: no such thing"
    with pytest.raises(CannotMeasure, match="environment: .*No such file"):
        pythons._run(str(tmp_path / "missing"))
    monkeypatch.setattr(pythons, "SET_UP", 0.05)
    with pytest.raises(CannotMeasure, match="not within 0 seconds"):
        pythons._run("sleep", "5")
