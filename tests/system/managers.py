"""A systemd of the test's own, which manages the relays of a test.

It is a user's instance in a mount, pid and cgroup namespace: what it mounts, whom it
starts and what it counts is seen nowhere else.  It has no units but the test's.  Root's
instance does nearly all that the machine's own does: users of its own, seccomp,
namespaces.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.process import PATIENCE, START
from tests.system.programs import lacking, program, run

PROJECT = Path(__file__).parent.parent.parent

#: Runs until its input ends.  $1 is a folder, $2 a word of its own, $3 systemd.
#: The nodes are what a unit sees instead of what it may not see.
_SCRIPT = r"""
set -e
cd "$1"
mkdir cg
mount -t cgroup2 none cg
own="$PWD/cg/relayd-test-$2"
mkdir "$own"
mount -t tmpfs none /run
mkdir -p /run/systemd/system /run/systemd/inaccessible/dir /run/own
cd /run/systemd/inaccessible
touch reg sock
mkfifo fifo
mknod chr c 0 0
mknod blk b 0 0
chmod 0 reg sock fifo chr blk dir
cd "$1"
export XDG_RUNTIME_DIR=/run/own SYSTEMD_UNIT_PATH="$1/units" HOME="$1"
echo $$ > "$own/cgroup.procs"
unshare --cgroup sh -c '
    mount -t cgroup2 none /sys/fs/cgroup
    exec "$0" --user --unit=basic.target
' "$3" &
echo $$ > cg/cgroup.procs
read -r _ || true
echo 1 > "$own/cgroup.kill"
wait || true
for _ in 1 2 3 4 5 6 7 8 9; do
    find "$own" -depth -type d -exec rmdir {} \; 2> /dev/null && break
    sleep 0.1
done
"""

#: The instances of this process: a group of control of one may outlive it for a while.
_numbers = itertools.count(1)


class Manager:
    """The instance, and its units.

    :param folder: of the test; has the units.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.units = folder / "units"
        self.units.mkdir()
        (self.units / "basic.target").write_text("[Unit]\nDescription=Nothing\n")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it has read its units then."""
        namespaces = ("--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(program("unshare"), *namespaces, "sh", "-c", _SCRIPT, "sh"),
                    *(
                        str(self.folder),
                        f"{os.getpid()}-{next(_numbers)}",
                        program("systemd"),
                    ),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        limit = time.monotonic() + START
        while "running" not in self.ask("is-system-running"):
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < limit
            time.sleep(0.02)
        # The machine's own manager listens to every user.
        run(*self._inside(), "chmod", "0777", "/run/own/systemd/notify")

    def stop(self) -> None:
        """End it, with all that it has started."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait(PATIENCE)

    def ask(self, *args: str) -> str:
        """What `systemctl` says, whether it succeeds or not."""
        done = subprocess.run(
            [
                # It answers nobody outside of its pid namespace.
                *self._inside(),
                *(program("systemctl"), "--user", "--no-pager", *args),
            ],
            env={
                **os.environ,
                # Not where a unit has a folder of its own.
                "XDG_RUNTIME_DIR": "/run/own",
                "DBUS_SESSION_BUS_ADDRESS": "",
            },
            capture_output=True,
            text=True,
            # To start a unit is to wait until its interpreter has started.
            timeout=START,
            check=False,
        )
        self.succeeded = done.returncode == 0
        return done.stdout + done.stderr

    def _inside(self) -> tuple[str, ...]:
        """What runs a command in its namespaces."""
        assert self.process is not None
        number = self.process.pid
        children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
        # While it starts, there is none yet.
        first = children[0] if children else str(number)
        return (program("nsenter"), "--target", first, "--mount", "--pid")

    def do(self, *args: str) -> None:
        """Have `systemctl` do something that must succeed."""
        says = self.ask(*args)
        assert self.succeeded, says + self.output()

    def show(self, unit: str, *names: str) -> list[str]:
        """Properties of a unit, in their own order."""
        return self.ask("show", unit, "-p", ",".join(names), "--value").splitlines()

    def output(self) -> str:
        """What the relay has logged."""
        path = self.folder / "output"
        return path.read_text() if path.exists() else ""

    def write(self, unit: str, text: str) -> None:
        """Write a unit, or a part of one."""
        path = self.units / unit
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def relay_part(folder: Path, *options: str, **settings: str) -> str:
    """What a test puts beside the unit of contrib.

    The relay runs from where its sandbox lets it see this interpreter and this project:
    they may be in somebody's home.

    :param options: of `twistd relayd`.
    :param settings: of `[Service]`.
    """
    interpreter = Path(sys.executable).resolve()
    there = f"/tmp/python/{interpreter.relative_to(sys.base_prefix)}"
    bound = {
        sys.base_prefix: "/tmp/python",
        sysconfig.get_path("purelib"): "/tmp/site",
        str(PROJECT): "/tmp/project",
        str(folder / "etc"): "/tmp/etc",
    }
    main = "from twisted.scripts.twistd import run; run()"
    lines = [
        "[Service]",
        "Environment=PYTHONPATH=/tmp/site:/tmp/project PYTHONUNBUFFERED=1",
        f"StandardOutput=append:{folder}/output",
        f"StandardError=append:{folder}/output",
        *(f"BindReadOnlyPaths={here}:{where}" for here, where in bound.items()),
        # Rules are beside the point here; and tried by the unit's own tests.
        *("ExecStartPre=", "ExecStopPost=", "ExecStart="),
        f'ExecStart={there} -c "{main}" -n --pidfile= relayd {" ".join(options)}',
        *(f"{name}={value}" for name, value in settings.items()),
    ]
    return "\n".join(lines) + "\n"


@contextmanager
def managed(folder: Path) -> Iterator[Manager]:
    """A manager that is stopped in the end; it is to be started within."""
    if os.geteuid() != 0:
        lacking("a systemd of one's own takes root")
    (folder / "etc").mkdir()
    manager = Manager(folder)
    try:
        yield manager
    finally:
        manager.stop()
