"""The Containerfile in contrib/: what it says, and that its commands make what it runs.

No registry is asked for the image that it begins with.  Its commands are run here with
other paths; what they make is run as a container runs it: as process 1, as a user that
has nothing but a number, with a root that can't be written to.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.process import (
    PATIENCE,
    RelayProcess,
    Server,
    connect,
    eventually,
    read_all,
    read_exactly,
)
from tests.system.programs import lacking, program, run
from tests.system.test_container import handles

pytestmark = pytest.mark.system

PROJECT = Path(__file__).parents[2]

#: What is in a checkout and is not its source.
MADE = shutil.ignore_patterns("__pycache__", "dropin.cache")

#: Makes a root at /mnt that can't be written to, and runs in it what follows $2.  The
#: interpreter, at $1, may be in a home that others can't enter, $2.
_SCRIPT = r"""
set -e
python=$1 home=$2
shift 2
if [ -n "$home" ]; then
    mkdir -p "$TMPDIR/kept"
    mount --bind "$python" "$TMPDIR/kept"
    mount -t tmpfs -o mode=755 none "$home"
    mkdir -p "$python"
    mount --bind "$TMPDIR/kept" "$python"
fi
mount --bind / /mnt
mount --bind /proc /mnt/proc
mount -o remount,bind,ro /mnt
for part in "$TMPDIR" ${home:+"$python"}; do
    mount --bind "$part" "/mnt$part"
    mount -o remount,bind,ro "/mnt$part"
done
"""


def instructions() -> list[tuple[str, str]]:
    """Each instruction of the Containerfile, and what follows it."""
    text = (PROJECT / "contrib/Containerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(word, " ".join(rest.split())) for word, rest in lines]


def all_of(word: str) -> list[str]:
    return [rest for each, rest in instructions() if each == word]


def test_what_runs_is_nobody_and_writes_nothing() -> None:
    """The facts that orchestrators and scanners look for."""
    *_, last = (
        number for number, (word, _) in enumerate(instructions()) if word == "FROM"
    )
    final = dict(instructions()[last:])
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", final["USER"])
    assert final["STOPSIGNAL"] == "SIGTERM"
    assert final["HEALTHCHECK"] == "NONE"
    # No shell between, which would keep signals to itself.
    command = json.loads(final["ENTRYPOINT"])
    assert command[1:] == ["--nodaemon", "--pidfile=", "relayd"]
    assert json.loads(final["CMD"]) == ["--config", "/etc/relayd/relayd.toml"]
    assert "RUN" not in final
    assert all(image.startswith("docker.io/") for image in all_of("FROM"))


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    """What the build makes, in a folder that everybody may enter."""
    with tempfile.TemporaryDirectory(prefix="relayd-image-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "source").mkdir()
        for line in all_of("COPY")[:-1]:
            *sources, target = line.split()
            there = folder / target.lstrip("/")
            for source in sources:
                if (PROJECT / source).is_dir():
                    shutil.copytree(PROJECT / source, there, ignore=MADE)
                else:
                    shutil.copy(PROJECT / source, there)
        for line in all_of("RUN"):
            here = line.replace("/opt/relayd", f"{folder}/opt/relayd")
            here = here.replace("/source", f"{folder}/source")
            here = re.sub(r"^python ", f"{sys.executable} ", here)
            run("sh", "-c", f"umask 022; {here}", env={"PYTHONPATH": ""})
        yield folder


@contextmanager
def container(image: Path, *args: str) -> Iterator[tuple[RelayProcess, int]]:
    """The image's relay as process 1, and its number out here."""
    if os.geteuid() != 0:
        lacking("a pid namespace takes root")
    user = all_of("USER")[-1].split(":")[0]
    [entry] = all_of("ENTRYPOINT")
    command = [
        each.replace("/opt/relayd", f"{image}/opt/relayd") for each in json.loads(entry)
    ]
    prefix = Path(sys.base_prefix).resolve()
    homes = [home for home in ("/root", "/home") if prefix.is_relative_to(home)]
    limited = (
        *(program("setpriv"), f"--reuid={user}", f"--regid={user}", "--clear-groups"),
        *("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"),
    )
    script = _SCRIPT + 'exec chroot /mnt "$@"\n'
    running = RelayProcess(
        *args,
        twistd=(
            *(program("unshare"), "--mount", "--pid", "--fork", "--mount-proc"),
            *("--kill-child", "sh", "-c", script, "sh"),
            *(str(prefix), homes[0] if homes else "", *limited, *command[:-1]),
        ),
        plugin=command[-1],
        env={"TMPDIR": str(image), "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    try:
        children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}")
        eventually(lambda: (children / "children").read_text().strip(), "it is forked")
        pid = int((children / "children").read_text())
        try:
            yield running, pid
        finally:
            # It outlives `unshare`, as it is another user's.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    finally:
        running.stop()


def files(folder: Path) -> dict[Path, int]:
    """What is in a folder, and when it was written."""
    return {each: each.lstat().st_mtime_ns for each in sorted(folder.rglob("*"))}


def test_the_list_of_plugins_is_made_at_build_time(image: Path) -> None:
    [cache] = (image / "opt").rglob("dropin.cache")
    assert b"relayd_plugin" in cache.read_bytes()


def test_what_was_built_runs_as_a_container_does(image: Path) -> None:
    """It relays, stops at SIGTERM, and has written nothing anywhere."""
    before = files(image / "opt")
    with (
        Server() as server,
        container(
            image,
            *("--listen", "127.0.0.1:0", "--dest", server.address),
            *("--shutdown-delay", "0.1"),
        ) as (running, pid),
    ):
        port = running.port
        status = Path(f"/proc/{pid}/status").read_text()
        assert re.search(r"^Uid:\s+65532\s+65532", status, re.MULTILINE)
        assert re.search(r"^NSpid:\s+\d+\s+1$", status, re.MULTILINE)
        assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
        # Whoever is root in there can't write to it either.
        for part in ("", "tmp", str(image).lstrip("/") + "/opt"):
            path = f"/proc/{pid}/root/{part}"
            assert os.statvfs(path).f_flag & os.ST_RDONLY, part
        with connect(port) as client, server.accept() as there:
            client.sendall(b"question")
            assert read_exactly(there, 8) == b"question"
            there.sendall(b"answer")
            there.close()
            assert read_all(client) == b"answer"
        running.ended("done")
        eventually(lambda: handles(pid, signal.SIGCHLD))
        os.kill(pid, signal.SIGTERM)
        assert running.wait(PATIENCE) == 0
        running.wait_for("SIGTERM: stopping")
        said = "\n".join(running.lines)
        assert "Traceback" not in said
        assert "Unable" not in said
    assert files(image / "opt") == before
