"""Servers whose name has other addresses now, asked of a name server of our own.

The relay runs in a namespace whose /etc/resolv.conf is its own, as ip-netns(8) has it.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from twisted.names import dns

from tests.support.process import RelayProcess, connect, eventually, relay
from tests.system.datagrams import serving
from tests.system.name_server import NameServer, name_server
from tests.system.named_servers import NamedServers, named_servers, who
from tests.system.namespaces import Machine, machines
from tests.system.programs import program

pytestmark = pytest.mark.system

NAME, SERVICE = "db.test", "_postgres._tcp.test"

#: The servers' addresses, which are their names, and their port.
HOSTS = ("127.0.1.1", "127.0.1.2", "127.0.1.3")
PORT, RELAY, HAPROXY = 5432, 8080, 8081

#: Looked up so often that a test need not wait long.
OFTEN = ("--resolve-every", "200ms")


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """Whose name server is on itself."""
    with machines() as three:
        folder = Path("/etc/netns") / three.proxy.name
        folder.mkdir(parents=True)
        try:
            (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
            yield three.proxy
        finally:
            shutil.rmtree(folder)


@pytest.fixture
def names(machine: Machine) -> Iterator[NameServer]:
    with name_server(machine) as made:
        yield made


@pytest.fixture
def servers(machine: Machine) -> Iterator[NamedServers]:
    """Three, at each of the addresses, which say where they are."""
    with machine.inside():
        made = named_servers({(host, PORT): host for host in HOSTS})
    with made as them:
        yield them


@contextmanager
def relaying(machine: Machine, *options: str) -> Iterator[RelayProcess]:
    args = ("-l", f"127.0.0.1:{RELAY}", *options)
    with relay(*args, twistd=machine.twistd) as running:
        yield running


def found(machine: Machine, port: int = RELAY, count: int = 6) -> Counter[str]:
    """Which servers so many clients come to."""
    with machine.inside():
        return Counter(who(port) for _ in range(count))


def come_to(machine: Machine, *hosts: str, port: int = RELAY) -> None:
    """Before long, clients come to these in turn, and to no others."""
    even = dict.fromkeys(hosts, 6 // len(hosts))
    eventually(lambda: found(machine, port) == even, f"clients come to {hosts}")


def test_addresses_are_followed(
    machine: Machine, names: NameServer, servers: NamedServers
) -> None:
    one, two, three = HOSTS
    names.addresses(NAME, one, two)
    with relaying(machine, *OFTEN, "-d", f"dns:{NAME}:{PORT}") as running:
        come_to(machine, one, two)
        with machine.inside():
            kept = connect(RELAY)
        names.addresses(NAME, two, three)
        come_to(machine, two, three)
        running.wait_for(f"{three}:{PORT} joins")
        running.wait_for(f"{one}:{PORT} leaves")
        # A session goes on with a server that has left.
        with kept:
            kept.sendall(b"?")
            assert kept.recv(100).decode() in (one, two)
        names.addresses(NAME, one)
        come_to(machine, one)


def test_the_ttl_says_how_long_an_answer_holds(
    machine: Machine, names: NameServer, servers: NamedServers
) -> None:
    """The shortest is a second: it is asked for both families."""
    one, two, _ = HOSTS
    names.addresses(NAME, one, ttl=0)
    with relaying(machine, "-d", f"dns:{NAME}:{PORT}"):
        come_to(machine, one)
        names.addresses(NAME, two, ttl=3600)
        come_to(machine, two)
        asked = names.asked
        names.addresses(NAME, one)
        # It holds for an hour.
        with pytest.raises(AssertionError):
            eventually(lambda: names.asked > asked, patience=1.5)
        come_to(machine, two)


def test_nobody_knows_and_there_are_none(
    machine: Machine, names: NameServer, servers: NamedServers
) -> None:
    """Silence and failures change nothing; no address does, after the grace."""
    one, two, _ = HOSTS
    names.addresses(NAME, one, two)
    options = (*OFTEN, "--resolve-grace", "1s", "-d", f"dns:{NAME}:{PORT}")
    with relaying(machine, *options) as running:
        come_to(machine, one, two)
        names.failing = True
        running.wait_for("the name servers have failed; its servers stay")
        come_to(machine, one, two)
        names.failing, names.silent = False, True
        running.wait_for("the name servers don't answer; its servers stay")
        come_to(machine, one, two)
        names.silent = False
        # There is the name, and it has no address; then there is no such name.
        for records in ([dns.Record_TXT(b"no address", ttl=1)], None):
            if records is None:
                del names.zone[NAME]
                why = "there is no such name"
            else:
                names.zone[NAME] = records
                why = "it has no address"
            running.wait_for(f"{why}; its servers stay for 1 s")
            assert found(machine) == {one: 3, two: 3}
            running.wait_for(f"{why}; its servers leave")
            eventually(lambda: found(machine, count=1) == {"": 1})
            names.addresses(NAME, one, two)
            come_to(machine, one, two)


def test_a_mistake_in_a_zone_is_mended_within_the_grace(
    machine: Machine, names: NameServer, servers: NamedServers
) -> None:
    one, two, _ = HOSTS
    names.addresses(NAME, one, two)
    with relaying(machine, *OFTEN, "-d", f"dns:{NAME}:{PORT}") as running:
        come_to(machine, one, two)
        names.zone[NAME] = []
        running.wait_for("it has no address; its servers stay for 60 s")
        names.addresses(NAME, two)
        come_to(machine, two)


def test_an_answer_that_is_too_long_for_a_datagram(
    machine: Machine, names: NameServer
) -> None:
    """A hundred addresses: the question is asked again by TCP."""
    hosts = [f"127.0.2.{number}" for number in range(1, 101)]
    names.addresses(NAME, *hosts)
    with relaying(machine, *OFTEN, "-d", f"dns:{NAME}:{PORT}") as running:
        found = running.wait_for(rf"(127\.0\.2\.\d+):{PORT} joins", len(hosts))
        assert {each[1] for each in found} == set(hosts)
        assert names.by_tcp
        names.addresses(NAME, *hosts[:50])
        running.wait_for(f":{PORT} leaves", 50)


def test_no_name_server_when_the_relay_starts(
    machine: Machine, names: NameServer, servers: NamedServers
) -> None:
    """Clients wait for the first answer, as they do for a connection."""
    names.silent = True
    names.addresses(NAME, HOSTS[0])
    with relaying(machine, *OFTEN, "-d", f"dns:{NAME}:{PORT}"):
        with machine.inside():
            client = connect(RELAY)
        with client:
            client.sendall(b"?")
            names.silent = False
            assert client.recv(100).decode() == HOSTS[0]


def test_services_have_ports_priorities_and_weights(
    machine: Machine, names: NameServer, servers: NamedServers
) -> None:
    one, two, three = HOSTS
    for host, name in zip(HOSTS, ("one.test", "two.test", "three.test"), strict=True):
        names.addresses(name, host)
    first = [
        dns.Record_SRV(10, 20, PORT, b"one.test", ttl=1),
        dns.Record_SRV(10, 10, PORT, b"two.test", ttl=1),
    ]
    backup = dns.Record_SRV(20, 10, PORT, b"three.test", ttl=1)
    names.zone[SERVICE] = [*first, backup]
    options = (*OFTEN, "--resolve-grace", "0", "-d", f"srv:{SERVICE}")
    with relaying(machine, *options):
        eventually(lambda: found(machine) == {one: 4, two: 2})
        # Those of the first choice are gone.
        names.zone[SERVICE] = [backup]
        come_to(machine, three)
        names.zone[SERVICE] = [first[1], backup]
        come_to(machine, two)
        # RFC 2782: decidedly no such service.
        names.zone[SERVICE] = [dns.Record_SRV(0, 0, 0, b"", ttl=1)]
        eventually(lambda: found(machine, count=1) == {"": 1})


RESOLVERS = """
global
  nbthread 1
defaults
  mode tcp
  timeout connect 1s
  timeout client 30s
  timeout server 30s
resolvers own
  nameserver one 127.0.0.1:53
  resolve_retries 3
  timeout resolve 200ms
  timeout retry 200ms
  hold valid 200ms
  hold obsolete 200ms
listen all
  bind 127.0.0.1:{port}
  server-template db 3 {name}:{to} resolvers own init-addr none resolve-prefer ipv4
"""


def test_haproxy_follows_the_same(
    machine: Machine, names: NameServer, servers: NamedServers, tmp_path: Path
) -> None:
    """`resolvers` and `server-template` there, `dns:` here."""
    one, two, three = HOSTS
    names.addresses(NAME, one, two)
    config = tmp_path / "haproxy.cfg"
    config.write_text(RESOLVERS.format(port=HAPROXY, name=NAME, to=PORT))
    with ExitStack() as stack:
        stack.enter_context(
            serving(*machine.runs(program("haproxy"), "-db", "-f", config))
        )
        stack.enter_context(relaying(machine, *OFTEN, "-d", f"dns:{NAME}:{PORT}"))
        for hosts in ((one, two), (two, three), (three,), HOSTS):
            names.addresses(NAME, *hosts)
            for port in (HAPROXY, RELAY):
                come_to(machine, *hosts, port=port)
