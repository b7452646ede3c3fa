"""The command `relayctl` itself: its exit codes, and what it imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import relayd
from relayd.ctl import main as entry
from relayd.ctl.commands import COMMANDS, relayctl
from relayd.ctl.exits import MEANING, Exit
from relayd.ctl.main import main
from relayd.ctl.shell_commands import SHELLS

RELAY = '[tcp.web]\nlisten = "8080"\ndest = "10.0.0.5:80"\n'

#: A program that prints much.
EXAMPLE = "import sys; from relayd.ctl.main import main; sys.exit(main(['example']))"

Captured = pytest.CaptureFixture[str]


def python(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Another interpreter runs a program, which has `main`."""
    program = f"import sys\nfrom relayd.ctl.main import main\n{program}"
    return subprocess.run(
        [sys.executable, "-c", program, *args],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1"},
    )


def imported_by(*args: str) -> set[str]:
    """The packages that a command imports."""
    done = python(
        "sys.stdout = sys.stderr\nmain(sys.argv[1:])\n"
        "print(*sys.modules, file=sys.__stdout__)",
        *args,
    )
    return set(done.stdout.split())


def test_the_help_lists_every_command(capsys: Captured) -> None:
    assert main(["--help"]) == Exit.DONE
    said = capsys.readouterr().out
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z].*\.$", said, re.MULTILINE), name
        assert main([name, "--help"]) == Exit.DONE


def test_the_version(capsys: Captured) -> None:
    assert main(["--version"]) == Exit.DONE
    assert capsys.readouterr().out == f"relayctl {relayd.__version__}\n"


@pytest.mark.parametrize(
    "args", [["chek"], ["check"], ["check", "a", "b"], ["show", "--yaml", "x"], ["-x"]]
)
def test_a_wrong_command_line(args: list[str], capsys: Captured) -> None:
    assert main(args) == Exit.USAGE
    said = capsys.readouterr()
    assert said.out == ""
    assert "Error: " in said.err


def test_every_exit_code_is_explained() -> None:
    assert set(MEANING) == set(Exit)
    assert [code.value for code in Exit] == [0, 1, 2, 3, 4, 5, 6, 130]


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    """Ctrl-C ends it with the status that shells know, and no traceback."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("relayd.ctl.checking.read_layers", interrupt)
    assert main(["check", os.devnull]) == Exit.INTERRUPTED
    assert capsys.readouterr().err.strip() == ""
    # Before click can see it, too.
    monkeypatch.setattr(entry, "_run", interrupt)
    assert main(["check", os.devnull]) == Exit.INTERRUPTED


def test_a_reader_that_has_gone(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                EXAMPLE,
            ],
            stdout=writing,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (Exit.FAILED, b"")


@pytest.mark.parametrize("command", [["example"], ["--help"], ["check", "FILE"]])
def test_a_disk_that_is_full(command: list[str], tmp_path: Path) -> None:
    path = tmp_path / "relayd.toml"
    path.write_text(RELAY)
    command = [str(path) if each == "FILE" else each for each in command]
    program = "import sys; from relayd.ctl.main import main; sys.exit(main())"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program, *command],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    why = b"relayctl: No space left on device\n"
    assert (done.returncode, done.stderr) == (Exit.FAILED, why)


def test_messages_that_nobody_can_read(tmp_path: Path) -> None:
    """The exit code is what a script goes by."""
    reading, writing = os.pipe()
    os.close(reading)
    program = "import sys; from relayd.ctl.main import main; sys.exit(main())"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, "check", str(tmp_path / "none.toml")],
            stderr=writing,
            check=False,
        )
    finally:
        os.close(writing)
    assert done.returncode == Exit.NOT_FOUND


@pytest.mark.parametrize("lacks", entry.NEEDS)
def test_without_the_extra(lacks: str) -> None:
    done = python(f"sys.modules[{lacks!r}] = None\nsys.exit(main(['--help']))")
    assert done.returncode == Exit.FAILED
    assert done.stdout == ""
    assert done.stderr == "relayctl needs click and rich: pip install 'relayd[ctl]'\n"


def test_the_help_imports_next_to_nothing() -> None:
    found = imported_by("--help")
    assert "click" in found
    assert not {"attrs", "twisted", "cattrs", "rich.console"} & found
    assert "relayd.configuring" not in found


def test_a_check_imports_no_twisted_for_short_forms(tmp_path: Path) -> None:
    """Importing it takes longer than reading a thousand relays."""
    path = tmp_path / "relayd.toml"
    path.write_text(RELAY)
    found = imported_by("check", str(path))
    assert "relayd.configuring" in found
    assert not {"twisted", "zope.interface", "rich.console", "jsonschema"} & found
    path.write_text(RELAY.replace('"8080"', '"tcp:8080"'))
    found = imported_by("check", str(path))
    assert "twisted.internet.endpoints" in found
    # And never the global reactor.
    assert "twisted.internet.reactor" not in found


@pytest.mark.parametrize("shell", SHELLS)
def test_completion(shell: str, capsys: Captured) -> None:
    assert main(["completion", shell]) == Exit.DONE
    assert "_RELAYCTL_COMPLETE" in capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-c", "from relayd.ctl.main import main; main()"],
        env={
            **os.environ,
            "_RELAYCTL_COMPLETE": f"{shell}_complete",
            "COMP_WORDS": "relayctl ch",
            "COMP_CWORD": "ch" if shell == "fish" else "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert "check" in done.stdout
    assert "show" not in done.stdout


def test_help_lines_are_sentences() -> None:
    context = click.Context(relayctl)
    for name in COMMANDS:
        command = relayctl.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert command.help
        assert not command.get_short_help_str(1000).endswith("...")
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help
                assert option.help.endswith(".")


def test_the_name_of_a_file_can_not_steer_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nor make two lines of one."""
    assert main(["check", "\x1b[31m\nx"]) == Exit.NOT_FOUND
    assert capsys.readouterr().err == (
        "\\x1b[31m\\nx: there is no such file or folder\n"
    )
