"""Rules of netfilter that a relay looks after itself, in namespaces with a real nft.

They take root, nft, ip and a kernel with nft_tproxy, nft_socket and nft_nat.
"""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from relayd.netfilter.documents import PRIORITY
from tests.support.process import (
    START,
    TWIST,
    TWISTD,
    RelayProcess,
    command,
    eventually,
    read_all,
    relay,
)
from tests.system.gateway import RELAYCTL, V4, Gateway, gateway
from tests.system.namespaces import Machine, made
from tests.system.operators import Operator
from tests.system.programs import lacking, program, run

pytestmark = pytest.mark.system

#: Of everything that a machine has that rules could be in.
STATE = (
    *("nft list ruleset", "ip -4 rule", "ip -6 rule"),
    *("ip -4 route show table all", "ip -6 route show table all"),
)

#: A relay that is transparent, and one that clients are brought to.
WEB = """\
[tcp.web]
listen = ":16000"
dest = "192.168.0.1:80"
transparent = true
intercept = "192.168.0.2:80"
"""
MAIL = """\
[tcp.mail]
listen = ":16001"
dest = "192.168.0.1:25"
intercept = "192.168.0.2:25"
"""
DNS = """\
[udp.dns]
listen = ":16053"
dest = "192.168.0.1:53"
transparent = true
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """One that has rules and routes of its own, which nobody may touch."""
    program("nft")
    with made("alone") as [there]:
        for words in (
            "nft add table inet mine",
            "nft add chain inet mine relayd { type filter hook input priority 0; }",
            "nft add rule inet mine relayd tcp dport 22 accept",
            "ip rule add fwmark 0x20 lookup 32",
            "ip route add local default dev lo table 32",
        ):
            run(*there.runs(*words.split()))
        yield there


def state(machine: Machine) -> str:
    return "".join(run(*machine.runs(*words.split())) for words in STATE)


def chains(machine: Machine) -> list[str]:
    """Those of our table."""
    listed = subprocess.run(
        machine.runs("nft", "list", "table", "inet", "relayd"),
        capture_output=True,
        text=True,
        check=False,
    )
    return re.findall(r"^\tchain (\S+) ", listed.stdout, re.MULTILINE)


@contextmanager
def managing(machine: Machine, *args: str, **options: Any) -> Iterator[RelayProcess]:
    given = ("--manage-netfilter", *args)
    with relay(*given, twistd=machine.twistd, **options) as running:
        yield running


def ended(running: RelayProcess) -> None:
    """It is told to stop, and does."""
    running.signal()
    assert running.wait() == 0, running.lines


@pytest.fixture
def operator(tmp_path: Path) -> Operator:
    made = Operator(tmp_path)
    made.writes(WEB + MAIL + DNS)
    return made


@contextmanager
def steered(
    machine: Machine, operator: Operator, *args: str, **options: Any
) -> Iterator[RelayProcess]:
    control = f"unix:{operator.socket}"
    given = ("--config", str(operator.file), "--control", control, *args)
    with managing(machine, *given, **options) as running:
        yield running


ALL = ["divert-web", "redirect-web", "redirect-mail", "divert-dns"]


# -- while it runs


def test_they_are_there_while_it_runs(machine: Machine, operator: Operator) -> None:
    before = state(machine)
    with steered(machine, operator) as running:
        there = state(machine)
        assert sorted(chains(machine)) == sorted(ALL)
        assert {*before.splitlines()} < {*there.splitlines()}
        assert f"from all fwmark 0x1000/0x1000 lookup {0x1000}" in there
        status = operator.asks("status")["netfilter"]
        assert status == {
            "managed": True,
            "mark": 0x1000,
            "relays": ["dns", "mail", "web"],
            "failures": 0,
            "lost": 0,
            "problems": [],
        }
        ended(running)
    assert state(machine) == before


def test_a_daemon_and_another_mark(machine: Machine, tmp_path: Path) -> None:
    """It forks before it applies them."""
    before = state(machine)
    args = ("--listen", ":16000", "--dest", "192.168.0.1:80", "--transparent")
    given = ("--manage-netfilter", "--netfilter-mark", "0x40", *args)
    pid = tmp_path / "pid"
    log = tmp_path / "log"
    run(
        *machine.runs(TWISTD),
        *("--pidfile", pid, "--logfile", log, "relayd", *given),
        cwd=tmp_path,
    )
    try:
        eventually(lambda: "fwmark 0x40/0x40 lookup 64" in state(machine), "a rule")
    finally:
        run("kill", pid.read_text())
    eventually(lambda: state(machine) == before, "it is gone")


def test_they_follow_the_relays(machine: Machine, operator: Operator) -> None:
    before = state(machine)
    with steered(machine, operator) as running:
        full = state(machine)
        operator.runs("stop", "web")
        assert sorted(chains(machine)) == ["divert-dns", "redirect-mail"]
        operator.runs("stop", "dns")
        # Nothing is marked any more.
        assert chains(machine) == ["redirect-mail"]
        assert "0x1000" not in state(machine)
        assert operator.asks("status")["netfilter"]["relays"] == ["mail"]
        operator.runs("start", "web")
        operator.runs("start", "dns")
        assert sorted(state(machine).splitlines()) == sorted(full.splitlines())
        operator.runs("set", "mail", "intercept=192.168.0.2:587")
        there = state(machine)
        assert "dport 587" in there
        assert "dport 25 " not in there
        operator.runs("drain", "mail")
        assert sorted(chains(machine)) == ["divert-dns", "divert-web", "redirect-web"]
        operator.writes(WEB.replace("192.168.0.2:80", "192.168.0.2:8080") + MAIL)
        operator.runs("reload", "--discard")
        assert sorted(chains(machine)) == [
            *("divert-web", "redirect-mail", "redirect-web")
        ]
        assert "dport 8080" in state(machine)
        full = state(machine)
        # As a restart of nftables.service does, but for others' rules.
        run(*machine.runs("nft", "delete", "table", "inet", "relayd"))
        running.signal(signal.SIGHUP)
        eventually(lambda: state(machine) == full, "they are there again")
        operator.writes("nothing")
        running.signal(signal.SIGHUP)
        running.wait_for("nothing has changed")
        assert "dport 8080" in state(machine)
        ended(running)
    assert state(machine) == before


@pytest.mark.parametrize(
    "does",
    [
        # As a restart of nftables.service does, but for the rules of others here.
        "nft delete table inet relayd",
        "nft flush chain inet relayd redirect-mail",
        # As systemd-networkd does with those that it does not know.
        f"ip rule del pref {PRIORITY}",
    ],
)
def test_what_others_remove_is_there_again(
    does: str, machine: Machine, operator: Operator
) -> None:
    before = state(machine)
    with steered(machine, operator) as running:
        full = sorted(state(machine).splitlines())
        run(*machine.runs(*does.split()))
        running.wait_for(r"netfilter rules of .* were changed by others")
        eventually(lambda: sorted(state(machine).splitlines()) == full, "all is there")
        status = operator.asks("status")["netfilter"]
        assert status["lost"] == 1
        assert status["problems"] == []
        ended(running)
    assert state(machine) == before


def test_a_crash_leaves_nothing_twice(machine: Machine, operator: Operator) -> None:
    before = state(machine)
    with steered(machine, operator) as running:
        there = state(machine)
        running.signal(signal.SIGKILL)
        assert running.wait() != 0
    # As nobody has removed them.
    assert state(machine) == there
    for _ in range(2):
        with steered(machine, operator) as running:
            assert sorted(state(machine).splitlines()) == sorted(there.splitlines())
            running.signal(signal.SIGKILL)
            running.wait()
    with steered(machine, operator) as running:
        ended(running)
    assert state(machine) == before


def test_what_a_crash_has_left_of_one_that_needs_none_goes(
    machine: Machine, operator: Operator
) -> None:
    before = state(machine)
    with steered(machine, operator) as running:
        running.signal(signal.SIGKILL)
        running.wait()
    assert chains(machine) == ALL
    operator.writes('[tcp.web]\nlisten = ":16000"\ndest = "192.168.0.1:80"\n' + MAIL)
    with steered(machine, operator) as running:
        assert chains(machine) == ["redirect-mail", "divert-dns"]
        ended(running)
    # Of one that is no more, it is not its own to remove.
    assert chains(machine) == ["divert-dns"]
    relayctl = (*machine.runs(RELAYCTL), "netfilter", "remove")
    assert run(*relayctl, "dns") == "dns: removed\n"
    assert state(machine) == before


def test_routing_rules_of_others_that_come_first_are_told(
    machine: Machine, operator: Operator
) -> None:
    """As they come, and until they go."""
    ip = machine.runs("ip", "rule")
    with steered(machine, operator) as running:
        # Without a place, it is put before all others.
        run(*ip, "add", "lookup", "33")
        running.wait_for(
            r"routing rules of others \(ip -4 rule: pref 4094\) come before"
        )
        assert len(operator.asks("status")["netfilter"]["problems"]) == 1
        run(*ip, "del", "pref", "4094")
        eventually(lambda: operator.asks("status")["netfilter"]["problems"] == [])
        ended(running)


# -- what can't be


def start(machine: Machine, *args: str, before: tuple[str, ...] = ()) -> str:
    """What a relay says that can't start, without what twistd writes before."""
    done = subprocess.run(
        machine.runs(*before, *command(), *args),
        capture_output=True,
        text=True,
        check=False,
        timeout=START,
        cwd="/",
    )
    assert done.returncode == 1, (done.stdout, done.stderr)
    said = (done.stdout + done.stderr).strip().splitlines()
    return said[-1]


MANAGED = (
    *("relayd", "--manage-netfilter", "--listen", ":16001"),
    *("--dest", "192.168.0.1:25", "--intercept", "192.168.0.2:25", "--name", "mail"),
)
RIGHT = "takes the right CAP_NET_ADMIN"


def test_without_the_right(machine: Machine) -> None:
    before = state(machine)
    without = (program("setpriv"), "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    said = start(machine, *MANAGED, before=without)
    assert said.startswith("relayd: --manage-netfilter: ") or " relayd: " in said
    assert "netfilter rules of mail not applied: " in said
    assert RIGHT in said
    assert state(machine) == before


def test_the_right_goes_with_the_user(machine: Machine) -> None:
    """Before anything is changed, so that nothing is left."""
    before = state(machine)
    said = start(machine, "--uid", "65534", *MANAGED)
    assert RIGHT in said
    assert said.endswith("(as the user that it has become)")
    assert state(machine) == before


def test_a_user_who_keeps_the_right(machine: Machine, tmp_path: Path) -> None:
    """As a unit of systemd gives it, with AmbientCapabilities=."""
    before = state(machine)
    rights = "+net_admin,+net_raw"
    words = (
        *(program("setpriv"), "--reuid=65534", "--regid=65534", "--clear-groups"),
        *(f"--inh-caps={rights}", f"--ambient-caps={rights}"),
    )
    twistd = machine.runs(*words, *command())
    with relay(*MANAGED[1:], twistd=twistd, cwd="/") as running:
        assert chains(machine) == ["redirect-mail"]
        ended(running)
    assert state(machine) == before


def test_no_program_that_changes_them(machine: Machine) -> None:
    """One line says what to install; a relay that needs no rules needs none."""
    if shutil.which("unshare") is None:
        lacking("unshare is not on PATH")
    before = state(machine)
    hide = "for x in /usr/sbin /usr/local/sbin; do mount -t tmpfs none $x; done"
    words = f'{hide}; PATH=/usr/bin:/bin exec "$@"'
    hidden = ("unshare", "--mount", "sh", "-c", words, "sh")
    said = start(machine, *MANAGED, before=hidden)
    assert said.endswith("nft is not installed: it is of the package nftables")
    twistd = machine.runs(*hidden, *command())
    plain = ("--listen", ":16001", "--dest", "192.168.0.1:25", "--manage-netfilter")
    with relay(*plain, twistd=twistd) as running:
        ended(running)
    assert state(machine) == before


def test_another_part_that_cannot_start(machine: Machine) -> None:
    """`twist` starts everything at once: its listeners when the rules are there."""
    before = state(machine)
    with machine.inside():
        taken = socket.create_server(("0.0.0.0", 16001))
    with taken:
        done = subprocess.run(
            machine.runs(TWIST, *MANAGED),
            capture_output=True,
            text=True,
            check=False,
            timeout=START,
        )
    assert done.returncode == 1
    assert "can't listen on port 16001" in done.stdout + done.stderr
    assert state(machine) == before


def test_a_change_that_they_cannot_follow(
    machine: Machine, operator: Operator, tmp_path: Path
) -> None:
    """It stands; whoever asked, the log, the status and the metrics say so."""
    before = state(machine)
    folder = tmp_path / "bin"
    folder.mkdir()
    broken = tmp_path / "broken"
    wrapper = folder / "nft"
    wrapper.write_text(
        f"#!/bin/sh\n[ -e {broken} ] && echo Error: it is broken >&2 && exit 1\n"
        f'exec {program("nft")} "$@"\n'
    )
    wrapper.chmod(0o755)
    path = f"{folder}:/usr/bin:/bin:/usr/sbin:/sbin"
    port = 16999
    metrics = ("--metrics", f"127.0.0.1:{port}")
    with steered(machine, operator, *metrics, env={"PATH": path}) as running:
        broken.touch()
        said = operator.runs("set", "mail", "intercept=192.168.0.2:587", code=1)
        assert "mail is changed, and stays so, but:" in said
        assert "netfilter rules of mail not applied" in said
        assert "it is broken" in said
        [row] = operator.asks("diff")["changes"]
        assert row["relay"] == "mail"
        running.wait_for("netfilter rules of mail not applied")
        status = operator.asks("status")["netfilter"]
        assert status["failures"] == 1
        assert len(status["problems"]) == 1
        with machine.inside():
            url = f"http://127.0.0.1:{port}/metrics"
            with urllib.request.urlopen(url) as answer:
                assert b"\nrelayd_netfilter_failures_total 1.0\n" in answer.read()
        broken.unlink()
        # The next change has all follow.
        operator.runs("set", "web", "idle_timeout=7s")
        assert "dport 587" in state(machine)
        assert operator.asks("status")["netfilter"]["problems"] == []
        ended(running)
    assert state(machine) == before


# -- several processes


def test_two_processes_do_not_disturb_each_other(
    machine: Machine, operator: Operator
) -> None:
    before = state(machine)
    other = (*MANAGED[2:6], "--transparent", "--name", "b")
    with steered(machine, operator) as running:
        first = state(machine)
        listen = [each.replace("16001", "17001") for each in other]
        with managing(machine, *listen) as second:
            assert {*first.splitlines()} < {*state(machine).splitlines()}
            operator.runs("stop", "web")
            operator.runs("start", "web")
            assert "divert-b" in chains(machine)
            ended(second)
        assert sorted(state(machine).splitlines()) == sorted(first.splitlines())
        # One that others have is not taken away.
        said = start(machine, *[each.replace("16001", "17001") for each in MANAGED])
        assert said.endswith(
            "netfilter rules of mail not applied: another process manages the rules of"
            " a relay of this name: give this one another name"
        )
        assert sorted(state(machine).splitlines()) == sorted(first.splitlines())
        with managing(machine, *listen) as second:
            ended(running)
            assert chains(machine) == ["divert-b"]
            assert f"lookup {0x1000}" in state(machine)
            ended(second)
    assert state(machine) == before


def test_a_stranger_keeps_nobody_from_starting(machine: Machine) -> None:
    """Whoever may not change rules can claim none."""
    before = state(machine)
    claim = (
        "import socket; sock = socket.socket(socket.AF_UNIX);"
        " sock.bind('\\0relayd-netfilter-mail'); sock.listen();"
        " print(flush=True); input()"
    )
    other = (program("setpriv"), "--reuid=65534", "--clear-groups")
    with subprocess.Popen(
        machine.runs(*other, sys.executable, "-c", claim),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd="/",
    ) as stranger:
        assert stranger.stdin is not None
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == b"\n"
        with managing(machine, *MANAGED[2:]) as running:
            assert chains(machine) == ["redirect-mail"]
            ended(running)
        stranger.stdin.close()
    assert state(machine) == before


# -- sessions


@pytest.fixture(scope="module")
def network() -> Iterator[Gateway]:
    program("nft")
    with gateway() as there:
        yield there


@pytest.mark.parametrize("transparent", [False, True])
def test_sessions_live_on_when_their_relay_is_stopped(
    transparent: bool, network: Gateway, tmp_path: Path
) -> None:
    """New clients are not brought to it, and what belongs to these still is."""
    operator = Operator(tmp_path)
    operator.writes(WEB if transparent else WEB.replace("transparent = true", ""))
    seen = V4.client if transparent else V4.asked
    before = network.state()
    with ExitStack() as stack:
        with network.server.inside():
            server = stack.enter_context(socket.create_server((V4.server, 80)))
        server.settimeout(10)
        running = stack.enter_context(steered(network.relay, operator))

        def client() -> socket.socket:
            with network.client.inside():
                return socket.create_connection((V4.asked, 80), 10)

        with client() as mine:
            theirs, peer = server.accept()
            assert peer[0] == seen
            with theirs:
                theirs.settimeout(10)
                operator.runs("stop", "web")
                # For NAT, without a rule.
                assert "redirect-web" in chains(network.relay)
                assert "dport 80 " not in network.state()
                with pytest.raises(ConnectionRefusedError):
                    client()
                for data in (b"one", b"two"):
                    mine.sendall(data)
                    assert theirs.recv(9) == data
                    theirs.sendall(data)
                    assert mine.recv(9) == data
                theirs.shutdown(socket.SHUT_WR)
                assert read_all(mine) == b""
            mine.shutdown(socket.SHUT_WR)
            eventually(lambda: network.state() == before, "nothing is left")
        operator.runs("start", "web")
        with client() as mine:
            theirs, peer = server.accept()
            theirs.close()
            assert peer[0] == seen
            assert read_all(mine) == b""
        ended(running)
    assert network.state() == before


def test_flows_live_on_when_their_relay_is_stopped(
    network: Gateway, tmp_path: Path
) -> None:
    """By TPROXY, each datagram comes by the rule that brought the first."""
    operator = Operator(tmp_path)
    operator.writes(
        '[udp.dns]\nlisten = ":16053"\ndest = "original"\ntransparent = true\n'
        f'intercept = "{V4.server}:53"\n'
        'udp_timeout = "2s"\nudp_unreplied_timeout = "2s"\n'
    )
    before = network.state()
    with ExitStack() as stack:
        with network.server.inside():
            server = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            server.bind((V4.server, 53))
        with network.client.inside():
            mine = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            mine.connect((V4.server, 53))
        for each in (server, mine):
            each.settimeout(10)
        running = stack.enter_context(steered(network.relay, operator))
        there = network.state()
        own = mine.getsockname()
        for data in (b"one", b"two"):
            mine.send(data)
            assert server.recvfrom(9) == (data, own)
            server.sendto(data, own)
            assert mine.recv(9) == data
            if data == b"one":
                operator.runs("stop", "dns")
                assert network.state() == there
        # The flow has expired.
        eventually(lambda: network.state() == before, "nothing is left")
        ended(running)
    assert network.state() == before


def test_rules_are_there_until_it_has_drained(network: Gateway, tmp_path: Path) -> None:
    operator = Operator(tmp_path)
    operator.writes(WEB)
    before = network.state()
    with ExitStack() as stack:
        with network.server.inside():
            server = stack.enter_context(socket.create_server((V4.server, 80)))
        server.settimeout(10)
        running = stack.enter_context(steered(network.relay, operator))
        with network.client.inside():
            mine = socket.create_connection((V4.asked, 80), 10)
        with mine:
            theirs, _ = server.accept()
            with theirs:
                theirs.settimeout(10)
                running.signal()
                running.wait_for("1 sessions may finish within")
                mine.sendall(b"late")
                assert theirs.recv(9) == b"late"
                theirs.sendall(b"answer")
                assert mine.recv(9) == b"answer"
                assert network.state() != before
        assert running.wait() == 0
    assert network.state() == before
