"""A day in an operator's life: everything that can be steered, under a steady load.

Clients of TCP, UDP and SOCKS4 come from the first change to the last.  No request fails
that need not, each is answered by whom the settings name at that moment, those who stay
stay with their server; and in the evening the log, the metrics and the API agree with
the clients.
"""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.ports import free_port
from tests.support.process import RelayProcess, eventually, relay
from tests.system.operators import Metrics, Operator, Totals
from tests.system.steady_load import (
    EVERY,
    LENGTH,
    NOBODY,
    ONCE,
    Stays,
    SteadyLoad,
    Target,
)

pytestmark = pytest.mark.system

#: How many requests are waited for after each change, of each target that it is about.
SOME = 20

STREAMS = ("web", "api", "proxy")
FLOWS = ("dns", "ntp")

HEAD = """\
control = "unix:{socket}"
metrics = "127.0.0.1:{metrics}"
drain_timeout = "5s"

[defaults]
# Longer than a busy machine keeps a server from answering.
udp_timeout = "5s"
udp_unreplied_timeout = "5s"
"""


class Day:
    """The relays, the load, and who looks after them.

    :ivar ports: where clients come to, by the name of the relay that is there at first.
    :ivar servers: the port of each, by its name.
    :ivar targets: the load of each of these ports.
    :ivar stay: who stays there.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.operator = Operator(folder)
        self.load = stack.enter_context(SteadyLoad())
        streams, flows = ("a", "b", "c", "d", "e", "f"), ("u", "v")
        self.servers = {name: self.load.server(name) for name in streams}
        self.servers |= {name: self.load.server(name, "udp") for name in flows}
        self.ports = {
            name: free_port() for name in (*STREAMS, *FLOWS, "extra", "metrics")
        }
        #: The tables of the file: where each relay listens, and what else it has.
        self.listens = {name: self.ports[name] for name in (*STREAMS, *FLOWS)}
        self.dest = {
            "web": ["a", "b"],
            "api": ["c"],
            "dns": ["u"],
            "ntp": ["v"],
        }
        self.write()
        self.relay: RelayProcess
        self.targets: dict[str, Target] = {}
        self.stay: dict[str, Stays] = {}

    def write(self, mistake: str = "") -> None:
        """Write the file, as it is to be now."""
        socket = self.operator.socket
        text = HEAD.format(socket=socket, metrics=self.ports["metrics"])
        for name, port in self.listens.items():
            kind = "udp" if name in FLOWS else "tcp"
            text += f"\n[{'socks4' if name == 'proxy' else kind}.{name}]\n"
            text += f'listen = "127.0.0.1:{port}"\n'
            if name in self.dest:
                servers = [
                    f"{self.dest_of(each)},name={each}" for each in self.dest[name]
                ]
                text += f"dest = {servers}\n"
        self.operator.writes(text + mistake)

    def dest_of(self, server: str) -> str:
        return f"127.0.0.1:{self.servers[server]}"

    def serves(self) -> None:
        """Everybody's requests go on."""
        self.load.next(SOME, *self.targets.values())

    def told_of(self, target: Target) -> list[str]:
        """What the metrics say of datagrams that were dropped, for who looks."""
        [name] = [n for n, port in self.ports.items() if port == target.port]
        lines = Metrics(self.ports["metrics"]).text.splitlines()
        dropped = [each for each in lines if "_dropped_total{" in each]
        return [name, *(each for each in dropped if not each.endswith(" 0.0"))]

    def served(self, name: str) -> int:
        """How many requests were answered where this relay was at first."""
        port = self.ports[name]
        targets = [each for each in self.load.targets if each.port == port]
        return sum(bool(asked.answer) for each in targets for asked in each.asked)

    def begin(self) -> None:
        """The clients come."""
        for name in STREAMS:
            kind = "socks4" if name == "proxy" else "tcp"
            by = self.dest.get(name, ["d"])
            target = self.load.target(
                kind, self.ports[name], by, server=self.servers["d"]
            )
            self.targets[name] = target
        for name in FLOWS:
            self.targets[name] = self.load.target(
                "udp", self.ports[name], self.dest[name]
            )
        for name, target in self.targets.items():
            self.stay[name] = self.load.stays(target)
        self.stay["victim"] = self.load.stays(self.targets["web"])
        self.serves()


@pytest.fixture
def day(tmp_path: Path) -> Iterator[Day]:
    with ExitStack() as stack:
        day = Day(tmp_path, stack)
        said = day.operator.runs("check", str(day.operator.file))
        assert "5 relays, no problems" in said
        day.relay = stack.enter_context(relay("--config", str(day.operator.file)))
        day.relay.listening(5)
        yield day


def test_a_day(day: Day, record_property: Callable[[str, object], None]) -> None:
    """Zero failed requests that need not fail, and everything agrees."""
    day.begin()
    for each in (
        watch,
        add_a_relay,
        change_a_destination,
        swap_ports,
        stop_and_start,
        take_a_server_out_and_back,
        pause_and_resume,
        read_the_nat_table,
        kill_one,
        explain,
        a_broken_reload,
        hang_up,
        a_reload_that_goes_back,
        save_what_was_changed,
        remove_a_relay,
    ):
        each(day)
        day.serves()
        right(day, each.__name__)
    day.load.leave(*day.targets.values())
    agree(day)
    answered = [x for each in day.load.targets for x in each.asked if x.answer]
    record_property("answered requests", len(answered))
    # They were held, some of them.
    slowest = max(each.seconds for each in answered)
    longest = max(each.longest for each in day.stay.values())
    record_property("slowest, and longest of who stays", (slowest, longest))
    print(
        f"{len(answered)} answers in {slowest:.3f} s at most; who stays {longest:.3f}"
    )
    go_home(day)


def right(day: Day, what: str) -> None:
    """All has been as it should so far."""
    for target in day.load.targets:
        over = [each for each in target.wrong() if each.over]
        if over:
            print("DROPPED", day.told_of(target), over)
        assert not over, (what, day.told_of(target), over[:10], target.phases)
    for name, each in day.stay.items():
        assert not each.problem or name == "victim", (what, name, each)


# -- the day


def watch(day: Day) -> None:
    status = day.operator.asks("status")
    assert status["state"] == "running"
    assert status["relays"] == 5
    shown = day.operator.watches("relays")
    assert all(name in shown for name in day.listens)
    [one] = day.operator.asks("sessions", "--client", host(day.stay["api"]))["sessions"]
    assert (one["relay"], one["client"]) == ("api", day.stay["api"].address)
    assert day.operator.asks("limits")["limits"]


def host(one: Stays) -> str:
    return one.address.rpartition(":")[0]


def add_a_relay(day: Day) -> None:
    day.listens["extra"], day.dest["extra"] = day.ports["extra"], ["e"]
    day.write()
    answer = day.operator.asks("reload")
    assert (answer["added"], answer["unchanged"]) == (["extra"], 5)
    day.targets["extra"] = day.load.target("tcp", day.ports["extra"], "e")


def change_a_destination(day: Day) -> None:
    with day.targets["api"].changes("f"):
        day.operator.runs("set", "api", f"dest={day.dest_of('f')},name=f")
    # A server of datagrams: a flow stays with the one that it has.
    with day.targets["ntp"].changes("u"):
        day.operator.runs("set", "ntp", f"dest={day.dest_of('u')},name=u")
    day.operator.runs("set", "proxy", "idle_timeout=20m", "max_sessions=500")
    day.serves()
    assert day.stay["api"].who == "c"
    assert day.stay["ntp"].who == "v"
    assert day.operator.relay("api")["older_sessions"] == 1
    with day.targets["ntp"].changes("v"):
        day.operator.runs("set", "ntp", "dest=")


def swap_ports(day: Day) -> None:
    """Two pairs, in one step; what was said at run time stays with its relay."""
    web, api, dns, ntp = (day.targets[name] for name in ("web", "api", "dns", "ntp"))
    for one, other in (("web", "api"), ("dns", "ntp")):
        day.listens[one], day.listens[other] = day.listens[other], day.listens[one]
    day.write()
    for name in FLOWS:
        # A flow is where its client sends to.
        day.stay[name].may = frozenset("uv")
    with web.changes("f"), api.changes("ab"), dns.changes("v"), ntp.changes("u"):
        answer = day.operator.asks("reload")
    assert sorted(answer["changed"]) == ["api", "dns", "ntp", "web"]
    assert (answer["overlay"], answer["unchanged"]) == (3, 2)
    day.serves()
    for one, other in (("web", "api"), ("dns", "ntp")):
        day.listens[one], day.listens[other] = day.listens[other], day.listens[one]
    day.write()
    with web.changes("ab"), api.changes("f"), dns.changes("u"), ntp.changes("v"):
        day.operator.runs("reload")


def stop_and_start(day: Day) -> None:
    """Who is with a relay stays there; who comes meanwhile is refused."""
    for name in ("api", "dns", "proxy"):
        target, before = day.targets[name], day.stay[name].count
        with target.changes(target.by, meanwhile={NOBODY}):
            day.operator.runs("stop", name)
            assert day.operator.relay(name)["state"] == "stopped"
            begun = len(target.asked)
            if name in FLOWS:
                # Nobody says that there is no answer.
                day.load.next(
                    SOME, *[each for each in day.targets.values() if each is not target]
                )
            else:
                assert not any(each.answer for each in target.next(SOME))
            assert not any(each.answer for each in target.asked[begun:])
            day.operator.runs("start", name)
        target.next(SOME)
        assert day.stay[name].count > before + SOME * EVERY


def take_a_server_out_and_back(day: Day) -> None:
    web = day.targets["web"]
    steps: list[tuple[str, str]] = [
        ("drain", "b"),
        ("auto", "ab"),
        ("down", "b"),
        ("up", "ab"),
        ("auto", "ab"),
    ]
    for word, by in steps:
        with web.changes(by):
            day.operator.runs("server", "web/a", word)
        assert {each.answer for each in web.next(SOME)} <= set("ab")
    day.operator.runs("server", "web/a", "weight=3")
    shares = Counter(each.answer for each in web.next(5 * SOME)[SOME:])
    assert shares["a"] == pytest.approx(3 * SOME, abs=2), shares
    day.operator.runs("server", "web/a", "auto")
    day.operator.runs("server", "web/a", "weight=1")


def pause_and_resume(day: Day) -> None:
    """New clients wait, and are served in the end; nobody is refused."""
    for name in ("web", "dns", "proxy"):
        target = day.targets[name]
        day.operator.runs("pause", name)
        assert day.operator.relay(name)["state"] == "paused"
        begun = len(target.asked)
        eventually(lambda: len(target.asked) >= begun + SOME)  # noqa: B023
        assert not any(each.over for each in target.asked[begun:])
        day.operator.runs("resume", name)
        target.next(SOME)
    day.operator.runs("pause", "api", "--for", "0.5")
    day.targets["api"].next(SOME)
    assert day.operator.relay("api")["state"] == "running"


def read_the_nat_table(day: Day) -> None:
    entries = day.operator.asks("nat", "--limit", "10000")["entries"]
    found = {each["client"]: each for each in entries}
    for name, protocol in (("web", "tcp"), ("proxy", "tcp"), ("ntp", "udp")):
        entry = found[day.stay[name].address]
        assert (entry["protocol"], entry["relay"]) == (protocol, name)
        server = f"127.0.0.1:{day.servers[day.stay[name].who]}"
        assert entry["server"].endswith(server), entry
    metrics = Metrics(day.ports["metrics"])
    assert metrics("relayd_sessions_active", relay="web") >= 2
    assert metrics("relayd_udp_flows_active", relay="dns") >= 1


def kill_one(day: Day) -> None:
    victim = day.stay["victim"]
    [one] = day.operator.asks("sessions", "--client", host(victim))["sessions"]
    assert day.operator.asks("kill", str(one["id"])) == {"killed": 1}
    day.load.until(lambda: victim.over, lambda: "it lives")
    assert victim.problem


def explain(day: Day) -> None:
    answer = day.operator.asks("explain", "--relay", "web", "--client", "10.0.0.5")
    assert answer["admitted"]
    # By the way of its pool, as it is now.
    assert answer["server"].partition("/")[0] in {"a", "b"}


def a_broken_reload(day: Day) -> None:
    """It says what is wrong, and nothing has changed."""
    before = day.operator.asks("diff"), day.operator.runs("save")
    listened = len(day.relay.listening())
    day.listens["extra"] += 1
    day.write(mistake="[tcp.more]\ndesst = 1\n")
    said = day.operator.runs("reload", code=5)
    assert "tcp.more.desst" in said
    assert not day.operator.asks("status")["last_reload"]["ok"]
    assert before == (day.operator.asks("diff"), day.operator.runs("save"))
    # One that can't be had, though it is right: another program has the port.
    day.listens["extra"] = day.servers["a"]
    day.write()
    assert "in use" in day.operator.runs("reload", code=5)
    assert before == (day.operator.asks("diff"), day.operator.runs("save"))
    day.listens["extra"] = day.ports["extra"]
    assert len(day.relay.listening()) == listened


def hang_up(day: Day) -> None:
    day.dest["extra"] = ["d"]
    day.write()
    with day.targets["extra"].changes("d"):
        day.relay.signal(signal.SIGHUP)
        day.relay.wait_for(r"reloaded: .*changed extra")


def a_reload_that_goes_back(day: Day) -> None:
    day.dest["extra"] = ["e"]
    day.write()
    extra = day.targets["extra"]
    extra.may("de")
    day.operator.runs("reload", "--confirm", "0.5")
    day.relay.wait_for("was not confirmed in time: going back")
    eventually(lambda: day.operator.relay("extra")["dest"] == [day.dest_of("d")])
    extra.may("d")
    extra.next(SOME)
    with extra.changes("e"):
        day.operator.runs("reload", "--confirm", "60")
        day.operator.runs("confirm")


def save_what_was_changed(day: Day) -> None:
    """The file with it in is as good as what runs."""
    changes = day.operator.asks("diff")["changes"]
    said = {(each["relay"], each["key"]) for each in changes}
    assert {("api", "dest"), ("proxy", "idle_timeout")} <= said
    saved = day.operator.folder / "saved.toml"
    day.operator.runs("save", "--to", str(saved))
    assert "6 relays, no problems" in day.operator.runs("check", str(saved))
    day.operator.writes(saved.read_text())
    answer = day.operator.asks("reload", "--discard")
    assert (answer["added"], answer["removed"]) == ([], [])
    assert answer["overlay"] == 0
    assert day.operator.asks("diff") == {"changes": []}
    assert day.operator.runs("save") == saved.read_text()


def remove_a_relay(day: Day) -> None:
    """Its last clients have gone; the others notice nothing."""
    day.load.leave(day.targets.pop("extra"))
    text = day.operator.file.read_text()
    head, _, rest = text.partition("[tcp.extra]")
    day.operator.writes(head + "".join(rest.partition("\n[")[1:]))
    assert day.operator.asks("reload")["removed"] == ["extra"]


# -- the evening


def agree(day: Day) -> None:
    """What clients have seen, the log, the metrics and the API are the same."""
    rows: dict[str, Any] = {}

    def only_those_who_stay() -> bool:
        rows.update(
            {each["name"]: each for each in day.operator.asks("relays")["relays"]}
        )
        return {name: each["sessions"] for name, each in rows.items()} == {
            **dict.fromkeys((*STREAMS, *FLOWS), 1)
        }

    rows.clear()
    eventually(only_those_who_stay, "only those who stay are left")
    metrics = Metrics(day.ports["metrics"])
    logged = {name: Totals.logged(day.relay, name) for name in (*STREAMS, "extra")}
    for name in STREAMS:
        measured = Totals.measured(metrics, name)
        assert measured.endings == logged[name].endings, name
        opened = metrics("relayd_sessions_opened_total", relay=name)
        assert opened == measured.endings.total() + 1
        # Those who stay go on meanwhile.
        row = rows[name]
        assert logged[name].up < row["bytes_up"] <= measured.up, name
        assert logged[name].down < row["bytes_down"] <= measured.down, name
        assert row["refused"] == 0
    # Each had some of the other's clients, when their ports were swapped.
    victim = day.stay["victim"]
    for names in (("web", "api"), ("proxy",), ("extra",)):
        served = sum(map(day.served, names))
        endings = Counter(done=served)
        down, up = served * LENGTH, served * len(ONCE)
        if "web" in names:
            endings["killed"] = 1
            down, up = down + victim.count * LENGTH, up + victim.count * len(ONCE)
        total = sum((logged[name] for name in names), Totals())
        assert total.endings == endings, names
        # The victim may have been asking.
        assert 0 <= total.down - down <= LENGTH, names
        assert 0 <= total.up - up <= len(ONCE), names
    agree_of_flows(day)


def agree_of_flows(day: Day) -> None:
    """Each request had a flow; those who stay were in both relays for a while."""
    served = sum(map(day.served, FLOWS))

    def carried() -> int:
        return served + sum(day.stay[name].count for name in FLOWS)

    before = carried()
    metrics = Metrics(day.ports["metrics"])
    after = carried() + len(FLOWS)
    rows = [day.operator.relay(name) for name in FLOWS]
    for direction, size in (("up", len(ONCE)), ("down", LENGTH)):
        labels = {"direction": direction}
        datagrams = sum(
            metrics("relayd_udp_datagrams_total", relay=name, **labels)
            for name in FLOWS
        )
        measured = sum(
            metrics("relayd_udp_bytes_total", relay=name, **labels) for name in FLOWS
        )
        assert before <= datagrams <= after, direction
        assert measured == datagrams * size, direction
        told = sum(row[f"bytes_{direction}"] for row in rows)
        assert measured <= told <= (carried() + len(FLOWS)) * size, direction
    ended = sum((Totals.of_flows(day.relay, name) for name in FLOWS), Totals())
    # Of those who stay, each had a flow in the other relay, and maybe a new one after.
    assert ended.endings.keys() == {"expired"}
    assert len(FLOWS) <= ended.endings.total() - served <= 2 * len(FLOWS)
    assert served * LENGTH < ended.down < before * LENGTH


def go_home(day: Day) -> None:
    """A relay is drained; then all are, and those who stay may finish."""
    day.operator.runs("drain", "api", "--within", "0.2")
    day.relay.ended("drained")
    day.load.until(lambda: day.stay["api"].over, lambda: "it was not drained")
    day.relay.signal()
    day.relay.wait_for("sessions may finish")
    staying = {name: each for name, each in day.stay.items() if not each.over}
    assert staying.keys() == {"web", "proxy", "dns", "ntp"}
    had = {name: each.count for name, each in staying.items()}
    day.load.until(
        lambda: all(each.count > had[name] + 3 for name, each in staying.items()),
        lambda: f"they are cut off: {staying}",
    )
    day.load.end()
    assert day.relay.wait() == 0
    assert [each.problem for each in staying.values()] == [""] * 4
    assert not [each for each in day.relay.lines if re.search("Traceback|#crit", each)]
    for name in ("web", "proxy"):
        one = day.stay[name]
        [line] = [
            each for each in day.relay.sessions(0) if each["client"] == one.address
        ]
        had_all = {"ending": "done", "down": str(one.count * LENGTH)}
        assert had_all.items() <= line.items()
