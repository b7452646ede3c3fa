"""The SOCKS4 proxy over real sockets: `twistd socks4`, and plain clients and servers.

One proxy for each kind of connections serves most of the tests, which find their own
lines in its log by their client's port; those that set an option start their own.
"""

from __future__ import annotations

import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relayd.preludes.socks4 import (
    REPLY_SIZE,
    Code,
    Command,
    Reply,
    read_reply,
    write_request,
)
from tests.support.live_relays import full_backlog, refused_address
from tests.support.process import (
    PATIENCE,
    TRANSPORTS,
    RelayProcess,
    Server,
    connect,
    eventually,
    read_all,
    read_exactly,
    relay,
    reset,
    transport,
)
from tests.support.segments import directly, segments

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

LISTEN = ("--listen", "127.0.0.1:0")

#: For a test that need not run on each kind of connections.
once = pytest.mark.parametrize("proxy", TRANSPORTS[:1], indirect=True)


@pytest.fixture(autouse=True, params=TRANSPORTS, scope="module")
def proxy(request: pytest.FixtureRequest) -> Iterator[RelayProcess]:
    """A proxy for this machine's programs; others get the same connections."""
    # Deadlines are looked at in eighths of the shortest: every half second.
    options = (*LISTEN, "--handshake-timeout", "4")
    with transport(request.param), relay(*options, plugin="socks4") as running:
        yield running


@pytest.fixture(autouse=True)
def own_lines(proxy: RelayProcess) -> None:
    """The log has no line of another test's session."""
    proxy.forget_sessions()


def port_of(server: Server) -> int:
    port: int = server.socket.getsockname()[1]
    return port


def reply(client: socket.socket) -> Reply:
    """The next reply that the proxy sends."""
    found = read_reply(read_exactly(client, REPLY_SIZE))
    assert found is not None
    return found


def joined(
    proxy: RelayProcess, server: Server
) -> tuple[socket.socket, socket.socket, str]:
    """A client that was granted CONNECT; the server's end; what its log line has."""
    client = connect(proxy.port)
    client.sendall(write_request(Command.CONNECT, "127.0.0.1", port_of(server), b"joe"))
    upstream = server.accept()
    assert reply(client) == Reply(Code.GRANTED, "127.0.0.1", port_of(server))
    return client, upstream, mark(client)


def bound(proxy: RelayProcess, data: bytes = b"") -> tuple[socket.socket, Reply]:
    """A client that waits for a peer from 127.0.0.1, and where that has to connect."""
    client = connect(proxy.port)
    client.sendall(write_request(Command.BIND, "127.0.0.1", 20) + data)
    where = reply(client)
    assert (where.code, where.address) == (Code.GRANTED, "127.0.0.1")
    return client, where


def mark(client: socket.socket) -> str:
    """What the log line of this client has, and no other."""
    return f"client=127.0.0.1:{client.getsockname()[1]} "


def log_line(proxy: RelayProcess, mark: str) -> str:
    """The log line of a session that has ended, or is about to."""
    found = [each.string for each in proxy.wait_for(f"{mark}.*ending=.*")]
    assert len(found) == 1, found
    return found[0]


def in_thread(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def send(sock: socket.socket, data: bytes) -> None:
    """All of it, and that this is all."""
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


# -- CONNECT


def test_a_whole_session(proxy: RelayProcess, server: Server) -> None:
    client, upstream, own = joined(proxy, server)
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    assert read_all(upstream) == b"question"
    upstream.sendall(b"the answer")
    upstream.close()
    assert read_all(client) == b"the answer"
    client.close()
    line = log_line(proxy, own)
    assert " up=8 down=10 ending=done code=-- command=connect user='joe' " in line
    assert f" requested=127.0.0.1:{port_of(server)} reply=90" in line


def test_the_server_ends_its_side_first(proxy: RelayProcess, server: Server) -> None:
    client, upstream, own = joined(proxy, server)
    upstream.sendall(b"that is all")
    upstream.shutdown(socket.SHUT_WR)
    assert read_all(client) == b"that is all"
    client.sendall(b"not from me")
    client.close()
    assert read_all(upstream) == b"not from me"
    upstream.close()
    assert " up=11 down=11 ending=done " in log_line(proxy, own)


def test_a_mebibyte_each_way_at_once(proxy: RelayProcess, server: Server) -> None:
    up, down = (random.Random(seed).randbytes(1 << 20) for seed in (1, 2))
    client, upstream, own = joined(proxy, server)
    received: list[bytes] = []
    work = [
        in_thread(lambda: send(client, up)),
        in_thread(lambda: send(upstream, down)),
        in_thread(lambda: received.append(read_all(upstream))),
    ]
    assert read_all(client) == down
    for each in work:
        each.join()
    assert received == [up]
    client.close()
    upstream.close()
    assert f" up={1 << 20} down={1 << 20} ending=done " in log_line(proxy, own)


def test_much_data_right_behind_the_request(
    proxy: RelayProcess, server: Server
) -> None:
    # The proxy reads it in pieces of its own, some with the request, some during
    # the dial, the rest when the connection stands.
    data = random.Random(3).randbytes(1 << 20)
    with connect(proxy.port) as client:
        request = write_request(Command.CONNECT, "localhost", port_of(server))
        sender = in_thread(lambda: send(client, request + data))
        upstream = server.accept()
        assert read_all(upstream) == data
        upstream.close()
        assert reply(client).code == Code.GRANTED
        assert read_all(client) == b""
        sender.join()


def test_early_data_comes_with_the_handshakes_ack(
    proxy: RelayProcess, server: Server
) -> None:
    """One segment less than of a client that connects to the server and then sends."""
    request = write_request(Command.CONNECT, "127.0.0.1", port_of(server), b"joe")
    with connect(proxy.port) as client:
        client.sendall(request + b"early")
        with server.accept() as upstream:
            assert read_exactly(upstream, 5) == b"early"
            assert segments(upstream) == directly(server, b"early") - 1


def test_a_request_byte_by_byte(proxy: RelayProcess, server: Server) -> None:
    with connect(proxy.port) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in write_request(Command.CONNECT, "localhost", port_of(server)):
            client.sendall(bytes([byte]))
        upstream = server.accept()
        assert reply(client) == Reply(Code.GRANTED, "127.0.0.1", port_of(server))
        client.sendall(b"hello")
        assert read_exactly(upstream, 5) == b"hello"
        upstream.close()


def test_a_server_that_speaks_first(proxy: RelayProcess, server: Server) -> None:
    with connect(proxy.port) as client:
        client.sendall(write_request(Command.CONNECT, "127.0.0.1", port_of(server)))
        upstream = server.accept()
        upstream.sendall(b"220 ready\r\n")
        assert reply(client).code == Code.GRANTED
        assert read_exactly(client, 11) == b"220 ready\r\n"
        upstream.close()


@pytest.mark.parametrize("resets", ["client", "server"])
def test_a_reset_is_passed_on(proxy: RelayProcess, server: Server, resets: str) -> None:
    client, upstream, own = joined(proxy, server)
    one, other, word = client, upstream, "downstream_reset"
    if resets == "server":
        one, other, word = upstream, client, "upstream_reset"
    one.sendall(b"last words")
    assert read_exactly(other, 10) == b"last words"
    reset(one)
    with pytest.raises(ConnectionResetError):
        other.recv(1)
    other.close()
    assert f" ending={word} " in log_line(proxy, own)


def test_an_ipv6_destination(proxy: RelayProcess) -> None:
    with Server(socket.AF_INET6) as server, connect(proxy.port) as client:
        client.sendall(write_request(Command.CONNECT, "::1", port_of(server)))
        upstream = server.accept()
        assert reply(client) == Reply(Code.GRANTED, "0.0.0.0", port_of(server))
        upstream.sendall(b"six")
        assert read_exactly(client, 3) == b"six"
        upstream.close()
        client.shutdown(socket.SHUT_WR)
        line = log_line(proxy, mark(client))
        assert f" upstream={server.address} " in line
        assert f" requested={server.address} " in line


def test_an_ipv4_destination_in_ipv6_s_clothes(
    proxy: RelayProcess, server: Server
) -> None:
    with connect(proxy.port) as client:
        there = write_request(Command.CONNECT, "::ffff:127.0.0.1", port_of(server))
        client.sendall(there)
        upstream = server.accept()
        assert reply(client) == Reply(Code.GRANTED, "127.0.0.1", port_of(server))
        upstream.sendall(b"four")
        assert read_exactly(client, 4) == b"four"
        upstream.close()


def test_a_server_that_refuses(proxy: RelayProcess) -> None:
    where = refused_address()
    with connect(proxy.port) as client:
        port = int(where.rpartition(":")[2])
        client.sendall(write_request(Command.CONNECT, "127.0.0.1", port) + b"data")
        assert reply(client).code == Code.REJECTED
        assert read_all(client) == b""
        own = mark(client)
    assert " ending=connect_refused " in log_line(proxy, own)


def test_a_name_without_an_address(proxy: RelayProcess) -> None:
    with connect(proxy.port) as client:
        client.sendall(write_request(Command.CONNECT, "no-such-host.invalid", 80))
        assert reply(client).code == Code.REJECTED
        assert read_all(client) == b""
        own = mark(client)
    assert " ending=unresolved " in log_line(proxy, own)


@pytest.mark.parametrize("greeting", [b"\5\1\0", b"GET / HTTP/1.1\r\n\r\n"])
def test_those_who_mistake_the_port(proxy: RelayProcess, greeting: bytes) -> None:
    with connect(proxy.port) as client:
        client.sendall(greeting)
        assert reply(client).code == Code.REJECTED
        assert read_all(client) == b""
        own = mark(client)
    line = log_line(proxy, own)
    assert " ending=bad_request " in line
    assert ("SOCKS5" in line) == (greeting[0] == 5)


# -- BIND


def test_a_whole_bind(proxy: RelayProcess) -> None:
    client, where = bound(proxy, b"early, ")
    client.sendall(b"late")
    peer = connect(where.port, where.address)
    second = reply(client)
    here = peer.getsockname()
    assert second == Reply(Code.GRANTED, "127.0.0.1", here[1])
    assert read_exactly(peer, 11) == b"early, late"
    with pytest.raises(ConnectionRefusedError):
        connect(where.port)
    data = random.Random(4).randbytes(1 << 20)
    sender = in_thread(lambda: send(peer, data))
    assert read_all(client) == data
    sender.join()
    client.sendall(b" thanks")
    own = mark(client)
    client.close()
    assert read_all(peer) == b" thanks"
    peer.close()
    line = log_line(proxy, own)
    assert f" upstream=127.0.0.1:{here[1]} " in line
    assert f" up=18 down={1 << 20} ending=done code=-- command=bind " in line


def test_a_peer_that_resets(proxy: RelayProcess) -> None:
    client, where = bound(proxy)
    peer = connect(where.port)
    assert reply(client).code == Code.GRANTED
    reset(peer)
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    client.close()


def test_another_peer_than_the_expected(proxy: RelayProcess) -> None:
    with connect(proxy.port) as client:
        client.sendall(write_request(Command.BIND, "127.0.0.2", 20))
        where = reply(client)
        assert where.code == Code.GRANTED
        with connect(where.port, where.address) as stranger:
            assert reply(client).code == Code.REJECTED
            assert read_all(client) == b""
            assert read_all(stranger) == b""
        own = mark(client)
    line = log_line(proxy, own)
    assert " ending=wrong_peer " in line
    assert line.endswith("came instead of 127.0.0.2'")


@pytest.mark.parametrize(
    ("sent", "leaves"),
    [
        (0, "closes"),
        (0, "resets"),
        # Whose connection is not read any longer, which hides a reset.
        (200_000, "resets"),
        (5, "ends its side and resets"),
    ],
)
def test_the_listener_goes_with_the_client(
    proxy: RelayProcess, sent: int, leaves: str
) -> None:
    client, where = bound(proxy)
    own = mark(client)
    if sent:
        client.sendall(bytes(sent))
        # Once another is answered, what was sent before has been looked at.
        with connect(proxy.port) as other:
            other.sendall(b"?")
            reply(other)
    if leaves == "ends its side and resets":
        client.shutdown(socket.SHUT_WR)
    if leaves == "closes":
        client.close()
    else:
        reset(client)
    assert " ending=client_left " in log_line(proxy, own)
    with pytest.raises(ConnectionRefusedError):
        connect(where.port)


# -- options


def test_deadlines(server: Server) -> None:
    times = [
        *("--handshake-timeout", "0.3", "--connect-timeout", "0.3"),
        *("--bind-timeout", "0.3", "--idle-timeout", "0.3"),
    ]
    with full_backlog() as silent, relay(*LISTEN, *times, plugin="socks4") as proxy:
        before = proxy.descriptors
        mute, dialling = connect(proxy.port), connect(proxy.port)
        port = int(silent.rpartition(":")[2])
        dialling.sendall(write_request(Command.CONNECT, "127.0.0.1", port))
        waiting, where = bound(proxy)
        idle, upstream, _ = joined(proxy, server)
        for client in (mute, dialling, waiting):
            assert reply(client).code == Code.REJECTED
            assert read_all(client) == b""
            client.close()
        with pytest.raises(ConnectionRefusedError):
            connect(where.port)
        for end in (idle, upstream):
            with pytest.raises(ConnectionResetError):
                end.recv(1)
            end.close()
        for word in ("handshake_timeout", "connect_timeout", "bind_timeout", "idle"):
            proxy.ended(word)
        eventually(lambda: proxy.descriptors == before, "all descriptors closed")


def test_sigterm_lets_sessions_finish(server: Server) -> None:
    with relay(*LISTEN, "--drain-timeout", "1000", plugin="socks4") as proxy:
        client, upstream, _ = joined(proxy, server)
        binding, where = bound(proxy)
        port = proxy.port
        proxy.signal(signal.SIGTERM)
        proxy.wait_for("2 sessions may finish")
        with pytest.raises(ConnectionRefusedError):
            connect(port)
        client.sendall(b"goodbye")
        assert read_exactly(upstream, 7) == b"goodbye"
        # A peer that was waited for is let in, too.
        with connect(where.port) as peer:
            assert reply(binding).code == Code.GRANTED
            peer.sendall(b"at last")
        assert read_all(binding) == b"at last"
        binding.close()
        upstream.close()
        assert read_all(client) == b""
        client.close()
        assert proxy.wait() == 0
        proxy.ended("done", 2)


def test_sigterm_does_not_wait_for_ever(server: Server) -> None:
    with relay(*LISTEN, "--drain-timeout", "0.3", plugin="socks4") as proxy:
        client, upstream, _ = joined(proxy, server)
        binding, _ = bound(proxy)
        mute = connect(proxy.port)
        mute.sendall(b"\4")
        proxy.signal(signal.SIGTERM)
        for end in (client, upstream, binding, mute):
            with pytest.raises(ConnectionResetError):
                end.recv(1)
            end.close()
        assert proxy.wait() == 0
        assert not any("Traceback" in line for line in proxy.lines)


def test_listeners_of_ipv6_and_unix(server: Server, tmp_socket: Path) -> None:
    listen = ("--listen", "[::1]:0", "--listen", f"unix:{tmp_socket}")
    with relay(*listen, plugin="socks4") as proxy:
        proxy.listening(2)
        unix = socket.socket(socket.AF_UNIX)
        unix.settimeout(PATIENCE)
        unix.connect(str(tmp_socket))
        for client in (connect(proxy.port, "::1"), unix):
            there = write_request(Command.CONNECT, "127.0.0.1", port_of(server))
            client.sendall(there + b"hello")
            upstream = server.accept()
            assert reply(client) == Reply(Code.GRANTED, "127.0.0.1", port_of(server))
            assert read_exactly(upstream, 5) == b"hello"
            client.shutdown(socket.SHUT_WR)
            assert read_all(upstream) == b""
            upstream.sendall(b"answer")
            upstream.close()
            assert read_all(client) == b"answer"
            client.close()
        # Neither has an IPv4 address that faces it; a peer on the way has.
        with connect(proxy.port, "::1") as client:
            client.sendall(write_request(Command.BIND, "127.0.0.1", 20))
            where = reply(client)
            assert (where.code, where.address) == (Code.GRANTED, "127.0.0.1")
            with connect(where.port) as peer:
                assert reply(client).port == peer.getsockname()[1]
        proxy.ended("done", 3)
        assert not any("Traceback" in line for line in proxy.lines)


@once
def test_the_addresses_that_bind_uses() -> None:
    options = ("--bind-any", "--bind-address", "0.0.0.0")
    external = ("--external-address", "203.0.113.1")
    request = write_request(Command.BIND, "0.0.0.0", 20)
    with relay(*LISTEN, *options, plugin="socks4") as proxy:
        with connect(proxy.port) as client:
            client.sendall(request)
            where = reply(client)
            assert where.address == "127.0.0.1", "as the client calls it"
            with connect(where.port, "127.0.0.3") as peer:
                assert reply(client).port == peer.getsockname()[1]
                peer.sendall(b"hi")
                assert read_exactly(client, 2) == b"hi"
    with relay(*LISTEN, *options, *external, plugin="socks4") as proxy:
        with connect(proxy.port) as client:
            client.sendall(request)
            where = reply(client)
            assert where.address == "203.0.113.1"
            with connect(where.port) as peer:
                assert reply(client).port == peer.getsockname()[1]
