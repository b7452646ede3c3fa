"""The page about transparent relaying: its commands, run in their order, print that.

They are run on the three machines of its drawing, which have the addresses that it
says.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.process import command, read_all, relay
from tests.system.gateway import Gateway
from tests.system.namespaces import Machine
from tests.system.programs import program, run
from tests.system.test_operating_page import pattern

PAGE = (Path(__file__).parents[2] / "docs" / "transparent.md").read_text()

#: The longest that one command may take, in seconds.
PATIENCE = 60

#: Where the page has the file, and the control socket.
FILE, CONTROL = "/etc/relayd/relayd.toml", "/run/relayd/control.sock"


def blocks(kind: str) -> list[str]:
    """The blocks of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str, str]]:
    """Of each command the machine, the command, and what it prints."""
    found: list[tuple[str, str, str]] = []
    for block in blocks("console"):
        parts = re.split(r"^(client|gateway|server)# ", block, flags=re.MULTILINE)
        assert parts[0] == "", block
        for machine, part in zip(parts[1::2], parts[2::2], strict=True):
            command, _, output = part.partition("\n")
            found.append((machine, command, output))
    return found


@contextmanager
def cleared(machines: dict[str, Machine]) -> Iterator[None]:
    """What runs on these machines is ended behind a block."""
    before = {name: pids_of(each) for name, each in machines.items()}
    try:
        yield
    finally:
        for name, each in machines.items():
            for pid in pids_of(each) - before[name]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def pids_of(machine: Machine) -> set[int]:
    return {int(each) for each in run("ip", "netns", "pids", machine.name).split()}


@pytest.mark.system
def test_the_page_is_true(network: Gateway, tmp_path: Path) -> None:
    for name in ("curl", "dig", "dnsmasq"):
        program(name)
    file, control = tmp_path / "relayd.toml", tmp_path / "control.sock"

    def moved(text: str) -> str:
        return text.replace(FILE, str(file)).replace(CONTROL, str(control))

    [settings] = blocks("toml")
    file.write_text(moved(settings))
    shown = commands()
    assert len(shown) > 35
    bin_ = Path(sys.executable).parent
    env = {
        **os.environ,
        "PATH": f"{bin_}:{os.environ['PATH']}:/usr/sbin:/sbin",
        "RELAYD_CONTROL": f"unix:{control}",
        "LC_ALL": "C",
    }
    machines = {
        "client": network.client,
        "gateway": network.relay,
        "server": network.server,
    }
    with cleared(machines):
        for machine, command, output in shown:
            done = subprocess.run(
                machines[machine].runs("bash", "-c", moved(command)),
                cwd=tmp_path,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
            assert pattern(moved(output)).fullmatch(done.stdout), (
                f"{machine}# {command}\n{done.stdout}\n{logs(tmp_path)}"
            )


def logs(folder: Path) -> str:
    """What everybody has said, for who must find out."""
    return "\n".join(
        f"-- {path.name}\n{path.read_text(errors='replace')}"
        for path in sorted(folder.glob("*.log"))
    )


def test_all_blocks_are_read() -> None:
    assert len(blocks("toml")) == 1
    kinds = ("toml", "console")
    assert PAGE.count("\n```") == 2 * sum(len(blocks(kind)) for kind in kinds)


# -- when it does not work

WRONG = """
drain_timeout = "0"

[defaults]
connect_timeout = "2s"

[tcp.web]
listen = "192.168.0.2:16000"
dest = "192.168.0.1:80"
transparent = true

[tcp.six]
listen = "[fd00:192::2]:16000"
dest = "192.168.0.1:80"
transparent = true

[tcp.any]
listen = "16001"
dest = "original"

[udp.one]
listen = "192.168.0.2:16002"
dest = "192.168.0.1:53"
transparent = true

[udp.other]
listen = "192.168.0.2:16003"
dest = "192.168.0.1:53"
transparent = true
"""

#: What the page quotes, and a client has to do for it.  What is wrong with datagrams is
#: logged once a second: there are two seconds between those.
SYMPTOMS = [
    (
        (
            "no socket for a flow of 10.0.0.1: another flow of 10.0.0.1:5353 has the"
            " same server already"
        ),
        lambda _, sends: (sends(5353, 16002), sends(5353, 16003)),
    ),
    (
        "ending=connect_timeout code=sC detail='no connection in 2 s'",
        lambda asks, _: asks("192.168.0.2", 16000),
    ),
    (
        (
            "ending=connect_failed code=SC detail=\"transparent: the client's address"
            " fd00:10::1 is IPv6, and the server's IPv4\""
        ),
        lambda asks, _: asks("fd00:192::2", 16000),
    ),
    (
        (
            "ending=loop code=PR detail='it came to the listener itself, and was not"
            " redirected'"
        ),
        lambda asks, _: asks("192.168.0.2", 16001),
    ),
    (
        (
            "no socket for a flow of 10.0.0.1: another program of this machine has"
            " 10.0.0.1:5354"
        ),
        lambda _, sends: sends(5354, 16003),
    ),
]


@pytest.mark.system
def test_what_is_wrong_is_said_so(network: Gateway, tmp_path: Path) -> None:
    """There are no rules, and a program of the gateway's has a client's port."""

    def asks(host: str, port: int) -> None:
        with network.client.inside():
            client = socket.create_connection((host, port), PATIENCE)
        with client, suppress(ConnectionResetError):
            assert read_all(client) == b""

    def sends(own: int, port: int) -> None:
        with network.client.inside(), socket.socket(type=socket.SOCK_DGRAM) as client:
            client.bind(("10.0.0.1", own))
            client.sendto(b"?", ("192.168.0.2", port))

    file = tmp_path / "relayd.toml"
    file.write_text(WRONG)
    with network.relay.inside():
        program = socket.socket(type=socket.SOCK_DGRAM)
    with (
        program,
        relay("--config", str(file), namespace=network.relay.name) as running,
    ):
        program.bind(("", 5354))
        running.listening(6)
        for said, does in SYMPTOMS:
            assert said in PAGE
            does(asks, sends)
            running.wait_for(re.escape(said))


NO_RIGHTS = ("--inh-caps=-all", "--bounding-set=-all")
NET_RAW = ("--inh-caps=-all,+net_raw", "--bounding-set=-all,+net_raw")


@pytest.mark.system
@pytest.mark.parametrize(
    ("rights", "options", "said"),
    [
        (
            NO_RIGHTS,
            "-d 192.168.0.1:80 --transparent",
            "relayd: transparent takes the right CAP_NET_RAW",
        ),
        (
            NET_RAW,
            "-d 192.168.0.1:80 --transparent --manage-netfilter",
            (
                "not applied: rules of netfilter can't be seen or changed: that takes"
                " the right CAP_NET_ADMIN"
            ),
        ),
    ],
)
def test_without_the_right(
    network: Gateway, rights: tuple[str, ...], options: str, said: str
) -> None:
    assert said in PAGE
    words = ("relayd", "-l", "192.168.0.2:16000", *options.split())
    done = subprocess.run(
        network.relay.runs(program("setpriv"), *rights, *command(), *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 1
    assert said in done.stdout
