"""The wheel, in a clean environment, is all of relayd, nothing else, and works."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import relayd
from tests.support.process import Server, connect, read_all, relay
from tests.system.programs import run

pytestmark = pytest.mark.system

CHECKOUT = Path(__file__).parents[2]

#: What is in a checkout and is not its source.
MADE = (".*", "__pycache__", "*.egg-info", "build", "dist", "dropin.cache")

#: Programs look into their own environment and nowhere else: pip would take a
#: relayd that it finds elsewhere for the one to install.
CLEAN = {"PYTHONPATH": ""}

#: Imports each module of the installed relayd, and of each argument the names that it
#: imports from relayd: an example, or a page that shows some.
IMPORTS = r"""
import pkgutil, re, sys
from pathlib import Path
import relayd
assert Path(relayd.__file__).is_relative_to(sys.prefix)
for module in pkgutil.walk_packages(relayd.__path__, "relayd."):
    # Its commands need an extra.
    if module.name.startswith("relayd.ctl."):
        continue
    try:
        __import__(module.name)
    except ModuleNotFoundError as problem:
        # So do the metrics.
        if "metrics" not in module.name or problem.name != "prometheus_client":
            raise
shown = re.compile(r"^ *(from relayd\b\S* import (?:\([^)]*\)|[^\n(]*))", re.MULTILINE)
for page in sys.argv[1:]:
    for line in shown.findall(Path(page).read_text()):
        exec(line)
        print(line)
"""

#: Each program up to the plugin's name.  `twist` logs JSON to what is no terminal.
COMMANDS = {
    "twistd": ("-n", "--pidfile="),
    "twist": ("--log-format=text",),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, as a build leaves things in what it builds."""
    copy = tmp_path_factory.mktemp("checkout") / "source"
    return shutil.copytree(CHECKOUT, copy, ignore=shutil.ignore_patterns(*MADE))


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    """The wheel that is built from the checkout."""
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
        *("--wheel-dir", source.parent, source),
    )
    [built] = source.parent.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel and what that asks for."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", environment, env=CLEAN)
    run(environment / "bin" / "pip", "install", "--quiet", wheel, env=CLEAN)
    return environment / "bin"


def test_contents(source: Path, wheel: Path) -> None:
    """The package with its type marker, the plugin file, the licence, the manual.

    And no more:

    `twisted` and `twisted/plugins` are Twisted's own: an `__init__.py` of ours
    would take the place of what is installed there.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    about = f"relayd-{relayd.__version__}.dist-info/"
    data = f"relayd-{relayd.__version__}.data/data/share/man/"
    own = {name for name in names if not name.startswith((about, data))}
    manual = {name.removeprefix(data) for name in names if name.startswith(data)}
    assert manual == {"man1/relayctl.1", "man5/relayd.toml.5", "man8/relayd.8"}
    package = (path for path in (source / "relayd").rglob("*") if path.is_file())
    assert own == {
        "twisted/plugins/relayd_plugin.py",
        *(str(path.relative_to(source)) for path in package),
    }
    assert "relayd/py.typed" in own
    assert any(name.endswith("/LICENSE") for name in names - own)


def test_all_that_is_shown_imports(programs: Path, tmp_path: Path) -> None:
    """Whatever README and the examples import, and each module, without an extra."""
    pages = [CHECKOUT / "README.md", *sorted((CHECKOUT / "examples").glob("*.py"))]
    python = (programs / "python", "-c", IMPORTS)
    printed = run(*python, *pages, cwd=tmp_path, env=CLEAN)
    for page in pages:
        # One is a module of checks, which imports nothing of ours.
        assert "relayd" in page.read_text()
    for module in ("tcp", "socks4", "udp_nat", "endpoints", "testing"):
        assert f"from relayd.{module} import " in printed


def test_relayctl_needs_its_extra(programs: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [programs / "relayctl", "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, **CLEAN},
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == ("relayctl needs click and rich: pip install 'relayd[ctl]'\n")


def test_relayctl(wheel: Path, tmp_path: Path) -> None:
    """With its extra, and nothing else, every command works; the manual is there."""
    environment, path = tmp_path / "environment", tmp_path / "relayd.toml"
    run(sys.executable, "-m", "venv", environment, env=CLEAN)
    run(environment / "bin" / "pip", "install", "--quiet", f"{wheel}[ctl]", env=CLEAN)

    def relayctl(*args: str | Path) -> str:
        return run(environment / "bin" / "relayctl", *args, cwd=tmp_path, env=CLEAN)

    path.write_text(relayctl("example"))
    assert relayctl("check", path) == f"{path}: 3 relays, no problems\n"
    assert "tcp.web.listen " in relayctl("show", path)
    assert '"$schema"' in relayctl("schema")
    shell = 'eval "$("$0" completion bash)" && complete -p relayctl'
    completing = run("bash", "-c", shell, environment / "bin" / "relayctl", env=CLEAN)
    assert completing.endswith(" relayctl\n")
    for page in ("man1/relayctl.1", "man5/relayd.toml.5", "man8/relayd.8"):
        assert (environment / "share" / "man" / page).is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_plugins_are_listed(programs: Path, tmp_path: Path, command: str) -> None:
    """`twistd` and `twist` offer both services next to Twisted's own."""
    listed = run(programs / command, "--help", cwd=tmp_path, env=CLEAN)
    for plugin in ("relayd", "socks4", "web"):
        assert re.search(rf"^ +{plugin} ", listed, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_relays(programs: Path, tmp_path: Path, command: str) -> None:
    """Both programs relay a stream each way, with its ends, and stop when told."""
    question, answer = bytes(range(256)) * 256, b"an answer, " * 5000
    with (
        Server() as server,
        relay(
            *("--listen", "127.0.0.1:0", "--dest", server.address),
            twistd=(str(programs / command), *COMMANDS[command]),
            env=CLEAN,
            cwd=tmp_path,
        ) as running,
    ):
        with connect(running.port) as client, server.accept() as served:
            client.sendall(question)
            client.shutdown(socket.SHUT_WR)
            assert read_all(served) == question
            served.sendall(answer)
            served.close()
            assert read_all(client) == answer
        [session] = running.ended("done")
        assert session["code"] == "--"
        assert int(session["up"]) == len(question)
        assert int(session["down"]) == len(answer)
        running.signal()
        assert running.wait() == 0
