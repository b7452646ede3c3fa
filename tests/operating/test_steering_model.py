"""Whatever is changed, in whatever order: what runs is the file with the overlay.

A model has both as plain tables, and configures what they are together; a relayd with
real listeners, on a reactor that stands still, must have just that, or have refused.
"""

from __future__ import annotations

import io
import json
import socket
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from relayd.configuring.config import Config
from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.control.steering import Refusal
from relayd.core.errors import ConfigError
from relayd.operating.overlay import RUN_TIME
from tests.support.steered import HOST, ME, Relayd, at, datagrams, result

Tables = dict[str, Any]

NAMES = ("a", "b", "c")
PORTS = (20001, 20002, 20003, 20004)
#: Somebody else has it.
BUSY = 20009
#: Seconds, as of a pause.
SHORT = 5.0

_ADDRESSES = st.sampled_from([*map(at, PORTS), at(BUSY)])
_LISTEN = st.one_of(_ADDRESSES, st.lists(_ADDRESSES, min_size=1, max_size=2))
_DEST = st.sampled_from(
    [
        "10.0.0.1:80",
        ["10.0.0.1:80", "10.0.0.2:80"],
        ["10.0.0.1:80,weight=2", "10.0.0.2:80,backup"],
        ["10.0.0.3:80", "10.0.0.2:80", "10.0.0.1:80,disabled"],
    ]
)
#: Relays with several pools; of those of names some have the same servers.
_POOLS = st.fixed_dictionaries(
    {
        "dest": st.sampled_from(
            [
                ["10.0.0.1:80", "10.0.0.1:80,pool=b"],
                ["10.0.0.2:80,pool=b", "10.0.0.1:80,pool=b,name=x", "10.0.0.1:80"],
                ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.2:80,pool=b"],
            ]
        ),
        "sni": st.sampled_from(
            [
                ["=default", "b.example=b"],
                ["=default", "*.example=b", "c.example=10.0.0.1:80"],
                [
                    *("c.example=10.0.0.1:80", "c.example=10.0.0.2:80,weight=2"),
                    *("=b", "a.example=default"),
                ],
                # The servers of `b` are nobody's: it is refused.
                ["=default"],
            ]
        ),
    }
)
_SHARED = {
    "enabled": st.booleans(),
    "clients": st.sampled_from([[], ["allow 127.0.0.0/8"]]),
}
_KEYS: Mapping[str, dict[str, st.SearchStrategy[Any]]] = {
    "tcp": {
        **_SHARED,
        "dest": _DEST,
        "idle_timeout": st.sampled_from([60, 600]),
        "max_sessions": st.sampled_from([1, 5]),
        "check": st.just("tcp"),
    },
    "udp": {
        **_SHARED,
        "dest": _DEST,
        "udp_timeout": st.sampled_from([60, 600]),
        "max_flows": st.sampled_from([9, 10]),
    },
    "socks4": {
        **_SHARED,
        "idle_timeout": st.sampled_from([60, 600]),
        "destinations": st.lists(st.just("deny *:25"), max_size=1),
    },
}
#: What no relay can have.
_WRONG = {"idle_timeout": "soon", "no_such_key": 1, "listen": "nowhere:at:all"}


@st.composite
def _relay(draw: st.DrawFn, kind: str) -> Tables:
    table = draw(st.fixed_dictionaries({}, optional=_KEYS[kind]))
    table["listen"] = draw(_LISTEN)
    if kind != "socks4":
        table["dest"] = draw(_DEST)
    if kind == "tcp" and draw(st.booleans()):
        table.update(draw(_POOLS))
    return table


@st.composite
def _file(draw: st.DrawFn) -> Tables:
    tables: Tables = {"transport": "twisted"}
    for name in draw(st.sets(st.sampled_from(NAMES), min_size=1)):
        kind = draw(st.sampled_from(["tcp", "tcp", "udp", "socks4"]))
        tables.setdefault(kind, {})[name] = draw(_relay(kind))
    return tables


@st.composite
def _changes(draw: st.DrawFn, kind: str) -> Tables:
    """What is set of a relay: some values, some nulls, seldom what can't be."""
    keys = {**_KEYS[kind], "listen": _LISTEN}
    if draw(st.integers(0, 9)) == 0:
        key = draw(st.sampled_from(sorted(_WRONG)))
        return {key: _WRONG[key]}
    nulls = st.just(None)
    some = {key: st.one_of(value, value, nulls) for key, value in keys.items()}
    made: Tables = draw(
        st.fixed_dictionaries({}, optional=some).filter(bool)  # type: ignore[arg-type]
    )
    if kind == "tcp" and draw(st.booleans()):
        made |= draw(st.one_of(_POOLS, _POOLS, st.just({"dest": None, "sni": None})))
    return made


def kinds_of(tables: Tables) -> dict[str, str]:
    return {name: kind for kind in _KEYS for name in tables.get(kind, {})}


def merged(tables: Tables, overlay: Tables) -> Tables:
    both = deepcopy(tables)
    kinds = kinds_of(tables)
    for name, said in overlay.items():
        both[kinds[name]][name].update(said)
    return both


def config_of(tables: Tables) -> Config:
    """:raises ConfigError: it can't be."""
    text = json.dumps(tables).encode()
    return configure(read_layers("-", io.BytesIO(text)))


def by_name(config: Config) -> dict[str | None, Any]:
    return {each.name: each for each in config.relays}


class Steering(RuleBasedStateMachine):
    """The model, beside what it is about."""

    def __init__(self) -> None:
        super().__init__()
        self.held_open = ExitStack()
        keep = self.held_open.enter_context
        self.folder = Path(keep(tempfile.TemporaryDirectory()))
        keep(socket.create_server((HOST, BUSY)))
        keep(datagrams(BUSY))
        self.relayd: Any = None

    @initialize(tables=_file())
    def begin(self, tables: Tables) -> None:
        try:
            if self.opens_busy(config_of(tables)):
                raise ConfigError("busy")
        except ConfigError:
            tables = {
                "transport": "twisted",
                "tcp": {"a": {"listen": at(PORTS[0]), "dest": "10.0.0.1:80"}},
            }
        #: What the file says on the disk, and what was read of it; "" is a broken one.
        self.disk: Any = tables
        self.file = deepcopy(tables)
        self.overlay: dict[str, Tables] = {}
        self.words: dict[tuple[str, str], str] = {}
        #: When clients that are held are served; None: not by themselves.
        self.held: dict[str, float | None] = {}
        #: What an unconfirmed reload goes back to, and when.
        self.back: Any = None
        self.relayd = Relayd(self.folder / "relayd.toml", tables)
        self.relayd.start()
        self.steered = self.relayd.steered

    # -- the model

    @property
    def now(self) -> float:
        return float(self.relayd.reactor.seconds())

    @property
    def kinds(self) -> dict[str, str]:
        return kinds_of(self.file)

    def opens_busy(self, config: Config) -> bool:
        return any(
            each.enabled and str(BUSY) in str(each.listeners) for each in config.relays
        )

    def wanted(self, tables: Any, overlay: dict[str, Tables]) -> Config | None:
        """What is to run; None: it can't."""
        if tables == "":
            return None
        try:
            config = config_of(merged(tables, overlay))
        except ConfigError:
            return None
        return None if self.opens_busy(config) else config

    def change(
        self, tables: Any, overlay: dict[str, Tables], act: Callable[[], Any]
    ) -> bool:
        """Do what makes these of what there is; whether it was done."""
        wanted = self.wanted(tables, overlay)
        try:
            act()
        except Refusal as refusal:
            assert wanted is None, refusal
            return False
        assert wanted is not None
        self.file, self.overlay = deepcopy(tables), overlay
        enabled = {each.name for each in wanted.relays if each.enabled}
        self.held = {name: at for name, at in self.held.items() if name in enabled}
        return True

    def having(self, name: str, said: Tables) -> dict[str, Tables]:
        own = {**self.overlay.get(name, {}), **said}
        own = {key: value for key, value in own.items() if value is not None}
        others = {key: value for key, value in self.overlay.items() if key != name}
        return {**others, name: own} if own else others

    # -- what is done

    @rule(tables=st.one_of(_file(), _file(), st.just("")))
    def write(self, tables: Any) -> None:
        self.disk = tables
        self.relayd.write(tables or "[tcp")

    @rule(data=st.data())
    def edit(self, data: st.DataObject) -> None:
        """The file gets other settings of the relays that it has."""
        tables = deepcopy(self.file)
        for name, kind in self.kinds.items():
            tables[kind][name].update(
                {
                    key: value
                    for key, value in data.draw(_changes(kind)).items()
                    if value is not None and key not in _WRONG
                }
            )
        self.write(tables)

    @rule()
    def swap(self) -> None:
        """Two relays of the file have each other's listeners."""
        tables = deepcopy(self.file)
        names = list(self.kinds)[:2]
        if len(names) == 2:
            one, two = (tables[self.kinds[name]][name] for name in names)
            one["listen"], two["listen"] = two["listen"], one["listen"]
            self.write(tables)

    @rule(discard=st.booleans(), confirm=st.sampled_from([None, None, SHORT]))
    def reload(self, discard: bool, confirm: float | None) -> None:
        if self.back is not None:
            try:
                self.relayd.reload()
            except Refusal as refusal:
                assert refusal.status == 409
                return
            raise AssertionError("there was one that waits")
        stays = {}
        if self.disk and not discard:
            before, after = self.kinds, kinds_of(self.disk)
            stays = {
                name: said
                for name, said in self.overlay.items()
                if after.get(name) == before[name]
            }
        before_it = self.file, self.overlay, self.words
        kinds = self.kinds
        if self.change(
            self.disk,
            stays,
            lambda: self.relayd.reload(discard=discard, confirm=confirm),
        ):
            self.words = {
                (name, server): word
                for (name, server), word in self.words.items()
                if not discard and self.kinds.get(name) == kinds[name]
            }
            if confirm is not None:
                self.back = *before_it, self.now + confirm

    @precondition(lambda self: self.back is not None)
    @rule()
    def confirm(self) -> None:
        self.steered.confirm(ME)
        self.back = None

    @rule(data=st.data())
    def set(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.kinds)))
        said = data.draw(_changes(self.kinds[name]))
        self.change(
            self.file,
            self.having(name, said),
            lambda: result(self.steered.set(name, said, ME)),
        )

    @rule(data=st.data(), what=st.sampled_from(["start", "stop", "drain"]))
    def enable(self, data: st.DataObject, what: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.kinds)))
        wanted = what == "start"
        in_file = self.file[self.kinds[name]][name].get("enabled", True)
        said = None if in_file == wanted else wanted
        self.change(
            self.file,
            self.having(name, {"enabled": said}),
            lambda: self.relayd.do(what, name),
        )

    @rule(data=st.data(), seconds=st.sampled_from([None, SHORT]))
    def pause(self, data: st.DataObject, seconds: float | None) -> None:
        name = data.draw(st.sampled_from(sorted(self.kinds)))
        enabled = self.relayd.unit(name).settings.enabled
        try:
            self.steered.pause(name, seconds, ME)
        except Refusal:
            assert not enabled
        else:
            self.held[name] = None if seconds is None else self.now + seconds

    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.kinds)))
        self.steered.resume(name, ME)
        self.held.pop(name, None)

    @rule(data=st.data(), word=st.sampled_from(["up", "down", "drain", "auto"]))
    def say(self, data: st.DataObject, word: Any) -> None:
        """Something of a server."""
        name = data.draw(st.sampled_from(sorted(self.kinds)))
        pools = self.relayd.unit(name).pools
        servers = [each.name for pool in pools for each in pool.servers]
        if servers:
            server = data.draw(st.sampled_from(servers))
            self.steered.set_server(name, server, word, None, None, ME)
            self.words = {**self.words, (name, server): word}
            if word == "auto":
                del self.words[name, server]

    @rule()
    def time_passes(self) -> None:
        self.relayd.reactor.advance(SHORT + 1)
        self.held = {
            name: at for name, at in self.held.items() if at is None or at > self.now
        }
        if self.back is not None:
            file, overlay, words, _ = self.back
            self.back = None
            self.change(file, overlay, lambda: None)
            self.words = words

    # -- what holds

    @invariant()
    def settings_are_those_of_the_file_and_the_overlay(self) -> None:
        wanted = self.wanted(self.file, self.overlay)
        assert wanted is not None
        assert by_name(self.relayd.relays.config) == by_name(wanted)
        assert {n: u.settings for n, u in self.relayd.relays.units.items()} == by_name(
            wanted
        )

    @invariant()
    def listeners_are_those_of_the_relays(self) -> None:
        service = self.relayd.service
        assert service.all_listening
        for name, unit in self.relayd.relays.units.items():
            expected = [] if not unit.settings.enabled else unit.settings.listeners
            found = service.addresses(name)
            assert sorted(found) == sorted(map(str, expected))
        assert len(service.ports) == len({id(each.listening) for each in service._open})

    @invariant()
    def clients_are_held_of_relays_that_are_paused(self) -> None:
        service = self.relayd.service
        assert service.held == set(self.held)
        read = 0
        for one in service._open:
            held = one.listening.factory.name in self.held
            if one.listening.flows:
                assert one.listening.factory._making._opener.held == held
                read += 1
            else:
                assert one.port.held == held
                read += not held
        assert len(self.relayd.reactor.readers) == read

    @invariant()
    def it_says_what_was_said(self) -> None:
        changes = self.steered.diff()["changes"]
        assert {(c["relay"], c["server"] or c["key"]) for c in changes} == {
            (name, key) for name, said in self.overlay.items() for key in said
        } | set(self.words)
        for name, said in self.overlay.items():
            told = self.steered.relay(name)["settings"]
            assert {
                key for key, each in told.items() if each["source"].startswith(RUN_TIME)
            } == {key for key, value in said.items() if value != []}

    @invariant()
    def the_merged_file_says_what_runs(self) -> None:
        path = self.folder / "merged.toml"
        path.write_text(self.steered.merged()["toml"])
        told = by_name(configure(read_layers(str(path))))
        of_words = {name for name, _ in self.words}
        for name, relay in by_name(self.relayd.relays.config).items():
            assert name in of_words or told[name] == relay

    @invariant()
    def servers_know_their_operators_word(self) -> None:
        for name, unit in self.relayd.relays.units.items():
            for pool in unit.pools:
                for each in pool.servers:
                    assert each.operator == self.words.get((name, each.name))

    @invariant()
    def nothing_is_left_of_before(self) -> None:
        relays = self.relayd.relays
        assert not relays._former
        assert not relays.service.former
        assert not relays.service._retired
        units = relays.units.values()
        running = [each for each in units if each.settings.enabled]
        tasks = {task for each in running for pool in each.pools for task in pool.tasks}
        assert set(relays.tasks._tasks) == tasks
        checked = sum(
            len(pool.servers)
            for each in running
            for pool in each.pools
            if each.settings.pool.check is not None
        )
        assert len(relays.checks.checker) == checked
        for each in units:
            for pool in each.pools:
                assert len(pool.listeners) <= 5
        assert len(self.steered._resumes) <= len(self.held)

    def teardown(self) -> None:
        self.held_open.close()
        if self.relayd is not None:
            self.relayd.stop()
            reactor = self.relayd.reactor
            reactor.turn()
            assert not reactor.readers
            assert not reactor.getDelayedCalls()


TestSteering = Steering.TestCase
TestSteering.settings = settings(
    max_examples=8,
    stateful_step_count=20,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
    report_multiple_bugs=False,
)
