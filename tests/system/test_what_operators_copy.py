"""The lines that operators copy from the manuals of HAProxy and nginx, and ours.

The README has them in one table.  Each is run here, in all three where all three have
it, before the same servers; and the same becomes of the same clients.  Checks that
speak are in `test_checks`, names that move in `test_names_that_move`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest

from tests.support.ports import free_port
from tests.support.process import PATIENCE, RelayProcess, eventually, relay
from tests.system.datagrams import serving
from tests.system.named_servers import NamedServers, hold, named_servers, who
from tests.system.programs import lacking, listens, program

pytestmark = pytest.mark.system

HOST = "127.0.0.1"

HAPROXY = """
global
  nbthread 1
defaults
  mode tcp
  timeout connect {dial}
  timeout client 30s
  timeout server 30s
  timeout queue 1s
listen all
  bind 127.0.0.1:{port}
"""

#: Debian's own, whose `stream` is a module.
STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")

NGINX = """
load_module {module};
daemon off;
master_process off;
error_log {folder}/errors;
pid {folder}/pid;
events {{}}
stream {{
  upstream all {{
    {lines}
  }}
  server {{
    listen 127.0.0.1:{port};
    proxy_connect_timeout 1s;
    proxy_pass all;
  }}
}}
"""

#: One server of ours is checked as often as one of HAProxy's.
CHECKED = "check inter 100ms rise 2 fall 2"
FAST = ("--check", "tcp", "--check-every", "100ms", "--rise", "2", "--fall", "2")


@attrs.frozen
class Trio:
    """Relays to the same servers; the port of each, by its name."""

    folder: Path
    stack: ExitStack
    ports: dict[str, int] = attrs.field(factory=dict)

    def relayd(self, *options: str) -> RelayProcess:
        args = ("-l", f"{HOST}:0", *options)
        running = self.stack.enter_context(relay(*args))
        self.ports["relayd"] = running.port
        return running

    def haproxy(self, *lines: str, dial: str = "1s") -> None:
        port = self.ports["haproxy"] = free_port()
        config = self.folder / "haproxy.cfg"
        text = HAPROXY.format(port=port, dial=dial)
        config.write_text(text + "".join(f"  {line}\n" for line in lines))
        self._serve(port, program("haproxy"), "-db", "-f", config)

    def nginx(self, *lines: str) -> None:
        if not STREAM.exists():
            lacking("libnginx-mod-stream is not there; `make system-deps` installs it")
        port = self.ports["nginx"] = free_port()
        config = self.folder / "nginx.conf"
        words = {"folder": self.folder, "module": STREAM, "port": port}
        config.write_text(
            NGINX.format(lines="\n    ".join(f"{line};" for line in lines), **words)
        )
        self._serve(port, program("nginx"), "-c", config, "-p", self.folder)

    def _serve(self, port: int, *command: str | Path) -> None:
        self.stack.enter_context(serving(*command))
        eventually(lambda: listens(port), f"{command[0]} listens")

    def each(self, found: Callable[[int], object]) -> dict[str, object]:
        """What is found at each."""
        return {name: found(port) for name, port in self.ports.items()}

    def all_have(self, expected: object, found: Callable[[int], object]) -> None:
        """The same is found at each."""
        assert self.each(found) == dict.fromkeys(self.ports, expected)

    def come_to_have(self, expected: object, found: Callable[[int], object]) -> None:
        """Before long, it is."""
        same = dict.fromkeys(self.ports, expected)
        eventually(lambda: self.each(found) == same, f"{expected} at each")


@pytest.fixture
def trio(tmp_path: Path) -> Iterator[Trio]:
    with ExitStack() as stack:
        yield Trio(tmp_path, stack)


@attrs.frozen
class Place:
    """Where a server is, which comes and goes."""

    name: str
    port: int

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def server(self) -> NamedServers:
        return named_servers({(HOST, self.port): self.name})


def places(names: str = "abc") -> list[Place]:
    return [Place(name, free_port()) for name in names]


def served(count: int) -> Callable[[int], Counter[str]]:
    """Which servers so many clients of a relay come to, one after the other."""
    return lambda port: Counter(who(port) for _ in range(count))


# -- fewest sessions


def test_fewest_sessions(trio: Trio) -> None:
    """Six stay; those of one server leave; the next two go there."""
    where = places()
    trio.haproxy(
        "balance leastconn", *(f"server {each.name} {each.address}" for each in where)
    )
    trio.nginx("least_conn", *(f"server {each.address}" for each in where))
    to = [part for each in where for part in ("-d", each.address)]
    trio.relayd("--balance", "least-sessions", *to)
    with ExitStack() as stack:
        # A number of sessions of each relay's own: another is asked after it.
        servers = [stack.enter_context(each.server()) for each in where]

        def held() -> Counter[str]:
            return sum((each.held for each in servers), Counter())

        def story(port: int) -> tuple[Counter[str], Counter[str]]:
            clients = [hold(port) for _ in range(6)]
            try:
                first = Counter(name for _, name in clients)
                for client, name in clients:
                    if name == "b":
                        client.close()
                eventually(lambda: held()["b"] == 0)
                clients += [hold(port) for _ in range(2)]
                return first, Counter(name for _, name in clients[6:])
            finally:
                for client, _ in clients:
                    client.close()
                eventually(lambda: not any(held().values()))

        trio.all_have(({"a": 2, "b": 2, "c": 2}, {"b": 2}), story)


# -- by client


def test_the_same_server_for_a_client(trio: Trio) -> None:
    """Of those whose server goes, and no others, each has another; until it is back."""
    where = places()
    servers = [f"server {each.name} {each.address} {CHECKED}" for each in where]
    trio.haproxy("balance source", "hash-type consistent", *servers)
    trio.nginx(
        "hash $remote_addr consistent",
        *(f"server {each.address} max_fails=0" for each in where),
    )
    to = [part for each in where for part in ("-d", each.address)]
    trio.relayd("--balance", "client-hash", *FAST, *to)
    sources = [f"127.0.0.{number}" for number in range(2, 62)]

    def each_client(port: int) -> dict[str, str]:
        return {source: who(port, source) for source in sources}

    def without_c(port: int) -> bool:
        return "c" not in set(each_client(port).values())

    with ExitStack() as stack:
        for place in where[:2]:
            stack.enter_context(place.server())
        with where[2].server():
            # All are up, as the first checks have found.
            trio.come_to_have({"a", "b", "c"}, lambda p: set(each_client(p).values()))
            before = {name: each_client(port) for name, port in trio.ports.items()}
        for found in before.values():
            # Each has its part: none has fewer than a sixth of the clients.
            assert min(Counter(found.values()).values()) >= 5, Counter(found.values())
            assert set(found.values()) == {"a", "b", "c"}
        trio.come_to_have(True, without_c)
        for name, port in trio.ports.items():
            now, had = each_client(port), before[name]
            moved = {source for source in sources if now[source] != had[source]}
            assert moved == {source for source in sources if had[source] == "c"}, name
            # Not all of them to one.
            assert {now[source] for source in moved} == {"a", "b"}
        with where[2].server():
            eventually(lambda: trio.each(each_client) == before, "all are back")


# -- weights


def test_weights(trio: Trio) -> None:
    where = places()
    weights = dict(zip("abc", (3, 2, 1), strict=True))
    trio.haproxy(
        "balance roundrobin",
        *(f"server {w.name} {w.address} weight {weights[w.name]}" for w in where),
    )
    trio.nginx(*(f"server {w.address} weight={weights[w.name]}" for w in where))
    to = [f"-d{w.address},weight={weights[w.name]}" for w in where]
    trio.relayd(*to)
    with ExitStack() as stack:
        for place in where:
            stack.enter_context(place.server())
        trio.all_have({"a": 30, "b": 20, "c": 10}, served(60))


# -- backup


def test_a_backup(trio: Trio) -> None:
    """It is used while the other is down, and then no more."""
    first, backup = places("ab")
    trio.haproxy(
        f"server a {first.address} {CHECKED}",
        f"server b {backup.address} backup {CHECKED}",
    )
    trio.nginx(f"server {first.address} max_fails=0", f"server {backup.address} backup")
    trio.relayd(*FAST, "-d", first.address, "-d", f"{backup.address},backup")
    with backup.server():
        with first.server():
            trio.come_to_have({"a": 6}, served(6))
        trio.come_to_have({"b": 6}, served(6))
        with first.server():
            trio.come_to_have({"a": 6}, served(6))


# -- a limit of sessions


def test_a_limit_of_sessions(trio: Trio) -> None:
    """One that is full is passed over."""
    first, second = places("ab")
    trio.haproxy(
        "balance roundrobin",
        f"server a {first.address} maxconn 2",
        f"server b {second.address}",
    )
    trio.nginx(f"server {first.address} max_conns=2", f"server {second.address}")
    trio.relayd("-d", f"{first.address},max=2", "-d", second.address)

    def story(port: int) -> Counter[str]:
        clients = [hold(port) for _ in range(10)]
        for client, _ in clients:
            client.close()
        return Counter(name for _, name in clients)

    with first.server(), second.server():
        trio.all_have({"a": 2, "b": 8}, story)


# -- another server if a dial fails


def test_another_server_if_a_dial_fails(trio: Trio) -> None:
    """One of two refuses, which nobody knows before: no client notices."""
    dead, alive = places("ab")
    trio.haproxy(
        "balance roundrobin",
        "retries 2",
        "option redispatch",
        f"server a {dead.address}",
        f"server b {alive.address}",
        # HAProxy asks the same one again, after as long as this at most.
        dial="100ms",
    )
    trio.nginx(f"server {dead.address}", f"server {alive.address}")
    trio.relayd("--retries", "2", "-d", dead.address, "-d", alive.address)

    def story(port: int) -> Counter[str]:
        with ThreadPoolExecutor(10) as clients:
            return Counter(clients.map(lambda _: who(port), range(20)))

    with alive.server():
        trio.all_have({"b": 20}, story)


# -- slow start


def test_slow_start(trio: Trio, record_property: Callable[[str, object], None]) -> None:
    """One that comes up has little at first, and its share in the end."""
    steady, new = places("ab")
    with steady.server():
        # This one is up from the start, and has its whole weight.
        trio.haproxy(
            "balance roundrobin",
            f"default-server {CHECKED} slowstart 3s",
            f"server a {steady.address}",
            f"server b {new.address}",
        )
        to = ("-d", steady.address, "-d", new.address)
        running = trio.relayd(*FAST, "--slow-start", "3", *to)
        running.wait_for(f"{new.address} is down")
        trio.come_to_have({"a": 6}, served(6))
        with new.server():
            with ThreadPoolExecutor() as clients:
                found = list(clients.map(growing, trio.ports.values()))
            for name, shares in zip(trio.ports, found, strict=True):
                record_property(name, shares)
                print(name, shares)
                assert shares[0] < 0.35, name
                assert shares[0] < shares[len(shares) // 2] < 0.5, name
            trio.come_to_have({"a": 20, "b": 20}, served(40))


def growing(port: int) -> list[float]:
    """The share of `b` in clients as they come, from its first one to a whole one."""
    eventually(lambda: who(port) == "b")
    shares = [0.0]
    limit = time.monotonic() + PATIENCE
    while shares[-1] < 0.5:
        assert time.monotonic() < limit, shares
        shares.append(sum(who(port) == "b" for _ in range(40)) / 40)
        time.sleep(0.2)
    return shares[1:]
