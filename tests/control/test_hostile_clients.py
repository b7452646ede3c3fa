"""Those who connect to do harm: nothing raises, blocks, or stays; on fakes."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.logger import capturedLogs

from relayd.control.exchange import MAX_WORKS
from relayd.control.site import (
    MAX_BODY,
    MAX_CLIENTS,
    MAX_HEAD,
    MAX_READERS,
    MAX_STRANGERS,
    TIMEOUT,
)
from relayd.control.steering import Asker
from tests.control.bench import (
    OPERATOR,
    READER,
    STRANGER,
    Answer,
    Bench,
    Client,
    request,
)
from tests.control.fake_steering import PART

STATUS = request("GET", "/v1/status")
SESSIONS = request("GET", "/v1/sessions?limit=100000")
STOP = "/v1/relays/web/stop"


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.over()


# -- slow


@pytest.mark.parametrize("sent", [0, 10, len(STATUS) - 1])
def test_half_a_request_has_its_time(bench: Bench, sent: int) -> None:
    client = bench.client()
    if sent:
        client.send(STATUS[:sent])
    bench.clock.advance(TIMEOUT - 0.1)
    assert not client.gone
    with capturedLogs() as logged:
        bench.clock.advance(0.1)
    assert client.transport.aborted
    assert not client.said
    assert not logged
    # One that has said nothing was idle, not slow.
    assert bench.site.timeouts == bool(sent)


def test_a_byte_now_and_then_is_no_request(bench: Bench) -> None:
    """Headers, and a body: the time is that of the whole."""
    whole = request("POST", STOP, {"cut": True})
    for head in (b"", whole[:-8]):
        client = bench.client()
        client.send(head)
        for byte in whole[len(head) :][:9]:
            bench.clock.advance(TIMEOUT / 8)
            client.send(bytes([byte]))
        assert client.transport.aborted
    assert bench.site.timeouts == 2
    assert not bench.steering.calls


def test_the_next_request_of_a_connection_has_its_time_as_well(bench: Bench) -> None:
    client = bench.client()
    for _ in range(3):
        client.transport.clear()
        bench.clock.advance(TIMEOUT - 1)
        client.send(STATUS[:9])
        bench.clock.advance(TIMEOUT - 1)
        client.send(STATUS[9:])
        assert Answer(client.said).status == 200
    bench.clock.advance(TIMEOUT)
    assert client.transport.aborted
    assert not bench.site.timeouts


def places(bench: Bench) -> int:
    """For long answers of those who may change things."""
    return bench.site.exchanges.works["change"].tokens


def pause(client: Client) -> None:
    """What waits for it is as much as may."""
    client.transport.producer.pauseProducing()


def resume(client: Client) -> None:
    client.transport.producer.resumeProducing()


def test_a_client_that_does_not_read(bench: Bench) -> None:
    """It is given no more, and reset after some time."""
    bench.steering.count = 50 * PART
    client = bench.client()
    client.channel.dataReceived(SESSIONS)
    bench.turn()
    pause(client)
    bench.turns()
    said = len(client.said)
    bench.clock.advance(TIMEOUT - 0.1)
    bench.turns()
    assert len(client.said) == said
    assert not client.gone
    bench.clock.advance(0.1)
    assert client.transport.aborted
    assert bench.ask("GET", "/v1/limits").json["limits"][-1]["hits"] == 1


def test_a_client_that_reads_a_little_at_a_time(bench: Bench) -> None:
    """The time that it is waited for counts together, and that alone."""
    bench.steering.count = 200 * PART
    client = bench.client()
    client.channel.dataReceived(SESSIONS)
    for _ in range(4):
        bench.turn()
        pause(client)
        bench.clock.advance(TIMEOUT / 5)
        resume(client)
        bench.clock.rightNow += TIMEOUT
        assert not client.gone
    pause(client)
    bench.clock.advance(TIMEOUT / 5)
    assert client.transport.aborted


@pytest.mark.parametrize("close", [False, True])
def test_the_last_bytes_have_to_be_taken_as_well(bench: Bench, close: bool) -> None:
    client = bench.client()
    more = {"connection": "close"} if close else {}
    client.send(request("GET", "/v1/status", **more))
    assert client.transport.disconnecting == close
    bench.clock.advance(TIMEOUT)
    assert client.transport.aborted


# -- huge


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"GET /" + b"x" * MAX_HEAD + b" HTTP/1.1\r\n", 414),
        (b"GET /" + b"x" * MAX_HEAD, 414),
        (b"\x16\x03\x01" * MAX_HEAD, 414),
        (STATUS[:-2] + b"x: " + b"y" * MAX_HEAD + b"\r\n\r\n", 431),
        (STATUS[:-2] + b"x: " + b"y" * MAX_HEAD, 431),
        (STATUS[:-2] + b"x: y\r\n" * (MAX_HEAD // 4) + b"\r\n", 431),
        (request("POST", STOP, b"{}", content_length=str(MAX_BODY + 1)), 413),
        (request("POST", STOP, b"{}", content_length="1" + "0" * 400), 413),
        (request("POST", STOP, b"{}", content_length="9" * 5000), 400),
        (request("POST", STOP, b" " * (MAX_BODY + 1)), 413),
        (
            request(
                "POST",
                STOP,
                b"2\r\n{}\r\n0\r\n\r\n",
                content_length=None,
                transfer_encoding="chunked",
            ),
            411,
        ),
    ],
)
def test_what_is_too_long(bench: Bench, text: bytes, status: int) -> None:
    client = bench.client()
    client.send(text)
    answer = Answer(client.said)
    assert answer.status == status
    assert answer.problem
    assert answer.headers["connection"] == "close"
    assert not answer.rest
    assert client.transport.disconnecting
    assert not bench.steering.calls
    bench.clock.advance(TIMEOUT)
    assert client.transport.aborted


def test_it_does_not_matter_in_which_pieces(bench: Bench) -> None:
    client = bench.client()
    text = STATUS[:-2] + b"x: y\r\n" * (MAX_HEAD // 4)
    for at in range(0, len(text), 100):
        client.send(text[at : at + 100])
    assert Answer(client.said).status == 431


def test_the_longest_body(bench: Bench) -> None:
    body = json.dumps({"cut": True}).encode()
    answer = bench.ask("POST", STOP, body.ljust(MAX_BODY))
    assert answer.status == 200


def test_a_long_answer_is_no_memory(bench: Bench) -> None:
    """However many requests follow each other on a connection that is not read."""
    client = bench.client()
    client.channel.dataReceived(request("GET", "/openapi.json") * 200)
    size = len(client.said)
    for _ in range(200):
        bench.turn()
        grown, size = len(client.said) > size, len(client.said)
        if grown and not client.channel.full:
            pause(client)
    assert size < 1 << 17
    bench.clock.advance(TIMEOUT)
    assert client.transport.aborted


# -- wrong


@pytest.mark.parametrize(
    "body",
    [
        b"[",
        b"null",
        b"[]",
        b'"x"',
        b"{} {}",
        b'{"cut": true, "cut": true}',
        b'{"cut": 1}',
        b'{"cut": "true"}',
        b'{"cut": NaN}',
        b'{"cut": Infinity}',
        b'{"cut": 1e999}',
        b'{"cut": ' + b"1" * 5000 + b"}",
        b'{"no": 1}',
        b"\xff",
        b"\xef\xbb\xbf{}",
        b'{"\\ud800": 1}',
        b'{"cut": "\\udfff"}',
        b"\x00",
        b"[" * 30_000,
        b'{"x":' * 10_000,
        b'{"cut": ' + b"[" * 20 + b"]" * 20 + b"}",
        "{}".encode("utf-16"),
    ],
)
def test_a_body_that_is_none(bench: Bench, body: bytes) -> None:
    answer = bench.ask("POST", STOP, body)
    assert answer.status == 400
    assert answer.problem.isprintable()
    assert len(answer.problem) < 200
    assert not bench.steering.calls


@pytest.mark.parametrize(
    "kind",
    [
        *("text/plain", "application/x-www-form-urlencoded", "application/json5", ""),
        *("multipart/form-data; boundary=x", "application/json; charset=latin-1"),
        "application/json, text/plain",
    ],
)
def test_a_body_that_is_something_else(bench: Bench, kind: str) -> None:
    answer = bench.ask("POST", STOP, b"--x\r\n\r\n", content_type=kind)
    assert answer.status == 415
    assert not bench.steering.calls


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON; charset=UTF-8"]
)
def test_types_that_are_json(bench: Bench, kind: str) -> None:
    assert bench.ask("POST", STOP, b"{}", content_type=kind).status == 200


def test_a_body_where_there_is_none(bench: Bench) -> None:
    assert bench.ask("GET", "/v1/status", {}).problem == (
        "there is a body: expected none"
    )
    assert bench.ask("PATCH", "/v1/relays/web").problem == (
        "there is no body: expected an object of JSON"
    )


@pytest.mark.parametrize(
    "said",
    [
        b"\0" * 100 + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nx y: z\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: relayd\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\0b\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_http(bench: Bench, said: bytes) -> None:
    client = bench.client()
    client.send(said)
    answer = Answer(client.said)
    assert (answer.status, answer.problem) == (400, "the request is not HTTP/1.1")
    assert client.transport.disconnecting


# -- many


def test_there_are_only_so_many_clients(bench: Bench) -> None:
    """One more is told so; those who may less take nobody's place."""
    readers = [bench.client(READER) for _ in range(MAX_READERS)]
    strangers = [bench.client(STRANGER) for _ in range(MAX_STRANGERS)]
    clients = [bench.client() for _ in range(MAX_CLIENTS)]
    for uid in (OPERATOR, READER, STRANGER):
        more = bench.client(uid)
        answer = Answer(more.said)
        assert answer.status == 503
        assert answer.problem == "there are too many clients: try again later"
        assert more.transport.disconnecting
        # It counts no more, though its connection is not closed yet.
    assert not any(each.gone for each in (*clients, *readers, *strangers))
    clients[0].leave()
    bench.clients.remove(clients[0])
    limits = bench.ask("GET", "/v1/limits").json["limits"]
    own = {each["what"]: (each["now"], each["hits"]) for each in limits}
    # Those that are being closed are there as well.
    assert own["control_clients"] == (MAX_CLIENTS + 1, 1)
    assert own["control_readers"] == (MAX_READERS + 1, 1)
    assert own["control_strangers"] == (MAX_STRANGERS + 1, 1)


def test_one_of_whom_nobody_knows_who_it_is(bench: Bench) -> None:
    """It has left, as the kernel was asked."""

    def gone(transport: object) -> Asker:
        raise OSError("closed")

    bench.site.peer = gone
    client = bench.client()
    assert client.transport.aborted
    assert not bench.site.channels


def test_requests_that_follow_each_other(bench: Bench) -> None:
    """Without waiting for the answers: they come in order, after changes as well."""
    client = bench.client()
    client.send(
        request("POST", STOP)
        + request("GET", "/v1/relays/web")
        + request("POST", "/v1/relays/web/start")
        + request("GET", "/no")
        + b"no http\r\n\r\n"
        + request("POST", STOP)
    )
    said, answers = client.said, []
    while said:
        answers.append(Answer(said))
        said = answers[-1].rest
    assert [each.status for each in answers] == [200, 200, 200, 404, 400]
    states = [each.json["state"] for each in answers[:3]]
    assert states == ["stopped", "stopped", "running"]
    assert [each[0] for each in bench.steering.calls] == ["stop", "start"]


def test_long_answers_wait_for_each_other(bench: Bench) -> None:
    """So many are made at once; those who leave meanwhile are not in the way."""
    bench.steering.count = 10 * PART
    clients = [bench.client() for _ in range(MAX_WORKS + 3)]
    for each in clients:
        each.channel.dataReceived(SESSIONS)
        bench.turn()
        if each.channel.transport.producer:
            pause(each)
    *slow, waits, leaves, last = clients
    bench.turns()
    assert not any(each.said for each in (waits, leaves, last))
    # Short ones do not wait.
    assert bench.ask("GET", "/v1/status").status == 200
    bench.clients.remove(leaves)
    leaves.leave()
    for each in slow:
        each.leave()
        bench.clients.remove(each)
    for each in (waits, last):
        resume(each)
    bench.turns()
    assert len(Answer(waits.said).json["sessions"]) == 10 * PART
    assert len(Answer(last.said).json["sessions"]) == 10 * PART
    assert places(bench) == MAX_WORKS


def test_who_may_only_see_is_not_in_the_way_of_who_may_change(bench: Bench) -> None:
    """Though they do not read their long answers."""
    bench.steering.count = 10 * PART
    for _ in range(MAX_WORKS + 1):
        reader = bench.client(READER)
        reader.channel.dataReceived(SESSIONS)
        bench.turn()
        pause(reader)
    killed = bench.ask("POST", "/v1/kill", {"relay": "web"})
    assert killed.json == {"killed": 10 * PART}


# -- who leave


def test_a_client_that_leaves_stops_the_work(bench: Bench) -> None:
    """In the middle, paused or not: nothing more is made for it."""
    bench.steering.count = 100 * PART
    for paused in (False, True):
        bench.steering.parts = bench.steering.closed = 0
        client = bench.client()
        client.channel.dataReceived(SESSIONS)
        bench.clock.rightNow += 1  # so that a turn is one part
        work = bench.turn
        for _ in range(3):
            work()
        if paused:
            pause(client)
        parts = bench.steering.parts
        bench.clients.remove(client)
        client.leave()
        bench.turns()
        assert bench.steering.parts == parts
        assert places(bench) == MAX_WORKS


def test_a_change_in_parts_that_is_left_is_logged(bench: Bench) -> None:
    bench.steering.count = 100 * PART
    bench.clock.seconds = iter(range(10**6)).__next__  # type: ignore[method-assign]
    client = bench.client()
    client.channel.dataReceived(request("POST", "/v1/kill", {"relay": "web"}))
    calls = [each for each in bench.clock.calls if each.func.__name__ == "_work"]
    for each in calls:
        bench.clock.calls.remove(each)
        each.called = 1
        each.func()
    bench.clients.remove(client)
    with capturedLogs() as logged:
        client.leave()
    assert bench.steering.closed == 1
    assert bench.steering.parts == 1
    [event] = logged
    assert event["outcome"] == "stopped: its client has left"
    for each in bench.clock.getDelayedCalls():
        each.cancel()


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(0, 3))
def test_whatever_is_sent(pieces: list[bytes], kind: int) -> None:
    """Nothing raises, and nothing is left."""
    bench = Bench()
    client = bench.client()
    start = [b"", b"GET /v1/", STATUS, request("POST", STOP, {"cut": True})][kind]
    for each in (start, *pieces):
        client.send(each)
    bench.clock.advance(TIMEOUT)
    assert client.transport.aborted or client.gone
    assert all(each[0] == "stop" for each in bench.steering.calls)
    bench.over()
