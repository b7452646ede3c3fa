"""What the control socket answers, and whom: on fakes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import jsonschema
import pytest
from twisted.internet.defer import Deferred
from twisted.logger import LogLevel, capturedLogs, eventAsText, formatEvent
from twisted.python.failure import Failure

from relayd.control.routes import ROUTES
from relayd.control.schemas import SCHEMAS
from relayd.control.steering import Asker, Conflict, Unfinished
from tests.conftest import LoggedFailures
from tests.control.bench import (
    OPERATOR,
    READER,
    STRANGER,
    Answer,
    Bench,
    request,
)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.over()


#: A request of each route: its path, and its body.
SAMPLES: dict[str, tuple[str, Any]] = {
    "status": ("/v1/status", None),
    "relays": ("/v1/relays", None),
    "relay": ("/v1/relays/web", None),
    "set": ("/v1/relays/web", {"settings": {"idle_timeout": "5m", "dest": None}}),
    "start": ("/v1/relays/web/start", None),
    "stop": ("/v1/relays/web/stop", {"cut": True}),
    "drain": ("/v1/relays/web/drain", {"within": 2.5}),
    "pause": ("/v1/relays/web/pause", {"seconds": None}),
    "resume": ("/v1/relays/web/resume", {}),
    "servers": ("/v1/servers?relay=web", None),
    "server": ("/v1/relays/web/servers/10.0.0.5:80", None),
    "set_server": (
        "/v1/relays/web/servers/db%2F1",
        {"state": "drain", "weight": 3, "within": 1},
    ),
    "sessions": (
        "/v1/sessions?relay=web&client=10.0.0.0/8&server=a&sort=age&limit=2",
        None,
    ),
    "flows": ("/v1/flows", None),
    "nat": ("/v1/nat?limit=100000", None),
    "kill": ("/v1/kill", {"sessions": [1, 2], "client": None}),
    "capture": ("/v1/sessions/7/capture?bytes=100", None),
    "limits": ("/v1/limits", None),
    "reload": ("/v1/reload", {"discard": True, "confirm": 30}),
    "confirm": ("/v1/confirm", None),
    "diff": ("/v1/diff", None),
    "merged": ("/v1/merged", None),
    "explain": ("/v1/explain", {"relay": "web", "client": "10.0.0.1"}),
    "log_levels": ("/v1/log-levels", None),
    "set_log_level": ("/v1/log-levels/relayd.udp", {"level": "debug"}),
}


def checked(answer: Answer, schema: str) -> Any:
    """An answer that is as its schema says."""
    whole = {"components": {"schemas": SCHEMAS}, **SCHEMAS[schema]}
    jsonschema.validate(answer.json, whole)
    return answer.json


@pytest.mark.parametrize("route", ROUTES, ids=lambda each: each.name)
def test_every_route_answers_what_its_schema_says(bench: Bench, route: Any) -> None:
    bench.steering.waits = True
    path, body = SAMPLES[route.name]
    answer = bench.ask(route.method, path, body)
    assert answer.status == 200, answer.body
    if route.streams:
        assert answer.body == b"blockits last"
    else:
        checked(answer, route.answer)
        assert answer.body.endswith(b"}\n")
    kind = route.streams or "application/json"
    assert answer.headers["content-type"] == kind
    assert answer.headers["cache-control"] == "no-store"
    assert ("etag" in answer.headers) == (route.tag is not None)


def test_what_is_asked_for_arrives(bench: Bench) -> None:
    """With who asks for it."""
    bench.steering.waits = True
    by = Asker(OPERATOR, 1, 4711)
    for route in ROUTES:
        if route.is_logged:
            bench.ask(route.method, *SAMPLES[route.name])
    assert bench.steering.calls == [
        ("set", "web", {"idle_timeout": "5m", "dest": None}, by),
        ("start", "web", by),
        ("stop", "web", True, by),
        ("drain", "web", 2.5, by),
        ("pause", "web", None, by),
        ("resume", "web", by),
        ("set_server", "web", "db/1", "drain", 3, 1.0, by),
        ("kill", "", [1, 2], None, None, None, by),
        ("capture", "", 7, 100, by),
        ("reload", "", True, 30.0, by),
        ("confirm", "", by),
        ("set_log_level", "", "relayd.udp", "debug", by),
    ]


def test_what_is_not_given_has_a_default(bench: Bench) -> None:
    for path in ("web/stop", "web/drain", "web/pause"):
        assert bench.ask("POST", f"/v1/relays/{path}").status == 200
    assert bench.ask("POST", "/v1/reload").status == 200
    said = [each[2:-1] for each in bench.steering.calls]
    assert said == [(False,), (None,), (None,), (False, None)]


def test_the_head_alone(bench: Bench) -> None:
    with capturedLogs() as logged:
        answer = bench.ask("HEAD", "/v1/relays/web")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["etag"] == '"1"'
    assert not logged


# -- who may


@pytest.mark.parametrize("route", ROUTES, ids=lambda each: each.name)
def test_who_may_ask_for_what(bench: Bench, route: Any) -> None:
    path, body = SAMPLES[route.name]
    bench.steering.waits = True
    with capturedLogs():
        answer = bench.ask(route.method, path, body, READER)
        kept = route.changes or route.secret
        assert answer.status == (403 if kept else 200)
        assert bench.ask(route.method, path, body, STRANGER).status == 403
        assert not bench.steering.calls
    for uid in (0, 499):
        bench.steering.waits = True
        assert bench.ask(route.method, path, body, uid).status == 200


def test_a_route_is_run_for_those_who_may_change_something(bench: Bench) -> None:
    """What it does beside deciding is a change."""
    path, body = SAMPLES["explain"]
    for uid, runs in ((READER, False), (OPERATOR, True)):
        [step] = bench.ask("POST", path, body, uid).json["steps"]
        assert step["why"] == f"it runs: {runs}"


def test_strangers_are_told_so_and_counted(bench: Bench) -> None:
    """Whatever they ask for; of a flood of them there is a line a second."""
    with capturedLogs() as logged:
        for path in ("/openapi.json", "/v1/status", "/no\x7f"):
            assert bench.ask("GET", path, uid=STRANGER).problem == (
                "uid 502, pid 4711 may not ask: see --control-uid"
            )
        answer = bench.ask("POST", "/v1/relays/web/stop", uid=READER)
        assert answer.problem == (
            "uid 501, pid 4711 may change nothing: see --control-read-uid"
        )
        bench.clock.advance(1)
        bench.ask("GET", "/no\x7f", uid=STRANGER)
    assert bench.site.exchanges.strangers == 5
    assert [formatEvent(each) for each in logged] == [
        "uid 502, pid 4711: GET /openapi.json: not allowed (1 so far)",
        "uid 502, pid 4711: GET /no\\x7f: not allowed (5 so far)",
    ]
    assert {each["log_level"] for each in logged} == {LogLevel.warn}


# -- what is logged


def test_every_change_is_logged(bench: Bench) -> None:
    """Who asked, for what, and what became of it; and nothing else is."""
    with capturedLogs() as logged:
        bench.ask("GET", "/v1/relays/web")
        bench.ask("POST", "/v1/explain", {"relay": "web", "client": "10.0.0.1"})
        bench.ask("POST", "/v1/relays/web/stop", {"cut": True})
        bench.ask("POST", "/v1/relays/no%0Asuch/start")
        bench.ask("PATCH", "/v1/relays/web", {"settings": {"idle_timeout": "no"}})
        bench.ask("POST", "/v1/confirm")
        bench.ask("POST", "/v1/kill", {"client": "10.0.0.0/8"})
    who = "uid 500, pid 4711: "
    known = "there are dns, office, web"
    idle = '{"settings": {"idle_timeout": "no"}}'
    why = "web: idle_timeout: found 'no', expected seconds"
    assert [formatEvent(each) for each in logged] == [
        f'{who}POST /v1/relays/web/stop {{"cut": true}}: done',
        (
            f"{who}POST /v1/relays/no%0Asuch/start: refused, 404: there is no relay"
            f" 'no\\nsuch': {known}"
        ),
        f"{who}PATCH /v1/relays/web {idle}: refused, 422: {why}",
        f"{who}POST /v1/confirm: refused, 409: nothing waits to be confirmed",
        f'{who}POST /v1/kill {{"client": "10.0.0.0/8"}}: done',
    ]


def test_secrets_are_not_logged_and_lines_have_an_end(bench: Bench) -> None:
    with capturedLogs() as logged:
        settings = {"userid": ["alice"], "dest": "a" * 1000}
        bench.ask("PATCH", "/v1/relays/office", {"settings": settings})
    [line] = map(formatEvent, logged)
    assert '"userid": "***", "dest": "aaaa' in line
    assert line.endswith("aaa...: done")
    assert len(line) < 600


# -- ETags


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PATCH", "/v1/relays/web", {"settings": {"dest": "a:1"}}),
        ("POST", "/v1/relays/web/stop", None),
        ("PATCH", "/v1/relays/web/servers/db%2F1", {"state": "down"}),
    ],
)
def test_only_what_has_not_changed_is_changed(
    bench: Bench, method: str, path: str, body: Any
) -> None:
    read = path.removesuffix("/stop")
    tag = bench.ask("GET", read).headers["etag"]
    wrong = bench.ask(method, path, body, if_match='"0", W/' + tag)
    assert wrong.status == 412
    assert wrong.problem == "it has changed since it was read: read it again"
    assert not bench.steering.calls
    done = bench.ask(method, path, body, if_match=f'"0" ,{tag}')
    assert done.status == 200
    assert done.headers["etag"] == bench.ask("GET", read).headers["etag"] != tag
    assert bench.ask(method, path, body, if_match=tag).status == 412
    assert bench.ask(method, path, body, if_match="*").status == 200


def test_the_changes_and_the_log_have_tags_as_well(bench: Bench) -> None:
    tag = bench.ask("GET", "/v1/diff").headers["etag"]
    bench.ask("PATCH", "/v1/relays/web", {"settings": {"dest": "a:1"}})
    drop = {"discard": True}
    assert bench.ask("POST", "/v1/reload", drop, if_match=tag).status == 412
    tag = bench.ask("GET", "/v1/diff").headers["etag"]
    assert bench.ask("POST", "/v1/reload", drop, if_match=tag).status == 200
    tag = bench.ask("GET", "/v1/log-levels").headers["etag"]
    debug = {"level": "debug"}
    path = "/v1/log-levels/relayd"
    assert bench.ask("PUT", path, debug, if_match=tag).status == 200
    assert bench.ask("PUT", path, debug, if_match=tag).status == 412


@pytest.mark.parametrize("tag", ["1", '"1', '"1" "2"', 'w/"1"', "*, *", '"\xe4"', ","])
def test_an_if_match_that_is_none(bench: Bench, tag: str) -> None:
    answer = bench.ask("POST", "/v1/relays/web/stop", if_match=tag)
    assert answer.status == 400
    assert not bench.steering.calls


def test_an_if_match_of_what_has_no_tag(bench: Bench) -> None:
    answer = bench.ask("POST", "/v1/kill", {"relay": "web"}, if_match='"1"')
    assert answer.problem == "there is an If-Match: this has no ETag"
    missing = bench.ask("POST", "/v1/relays/no/stop", if_match="*")
    assert missing.status == 404


# -- paths


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 404),
        ("/v1", 404),
        ("/v1/status/", 404),
        ("//v1/status", 404),
        ("/v1/relays/", 404),
        ("/v1/relays/web/../dns", 404),
        ("/v1/relays/..", 404),
        ("/v1/relays/web%2Fservers", 404),
        ("/v1%2Fstatus", 404),
        ("/v1/relays/%00", 404),
        ("/v1/relays/web%00", 404),
        ("/V1/status", 404),
        ("*", 400),
        ("http://localhost/v1/status", 400),
        ("/v1/relays/%ff", 400),
        ("/v1/relays/\xff", 400),
        ("/v1/status?x=1", 400),
        ("/v1/sessions?limit=0", 400),
        ("/v1/sessions?limit=100001", 400),
        ("/v1/sessions?limit=1&limit=1", 400),
        ("/v1/sessions?limit=%D9%A1", 400),
        ("/v1/sessions?limit=" + "1" * 5000, 400),
        ("/v1/sessions?relay", 400),
        ("/v1/sessions?relay=", 400),
        ("/v1/sessions?relay=%ff", 400),
        ("/v1/sessions?sort=name", 400),
        ("/v1/sessions?client=no", 422),
        ("/v1/sessions?relay=no", 404),
        ("/v1/sessions?client=10.0.0.1%2F32&&sort=rate&", 200),
        ("/v1/sessions/x/capture", 400),
        ("/v1/sessions/-1/capture", 400),
        ("/v1/sessions/7/capture?bytes=0", 400),
        ("/v1/sessions//capture", 404),
        ("/v1/sessions/1000/capture", 404),
        ("/v1/sessions/999/capture", 409),
    ],
)
def test_what_there_is_at_a_path(bench: Bench, path: str, status: int) -> None:
    answer = bench.ask("GET", path)
    assert answer.status == status, answer.body
    if status != 200:
        assert answer.problem


def test_a_name_may_have_anything_in_it(bench: Bench) -> None:
    name = "a/b c%?#+\u00e4"
    bench.steering.operator[name] = None
    path = f"/v1/relays/web/servers/{quote(name, safe='')}"
    assert bench.ask("GET", path).json["name"] == name


def test_other_methods(bench: Bench) -> None:
    for method, path, allow in (
        ("DELETE", "/v1/relays/web", "GET, PATCH, HEAD"),
        ("GET", "/v1/kill", "POST"),
        ("HEAD", "/v1/kill", "POST"),
        ("OPTIONS", "/v1/status", "GET, HEAD"),
        ("get", "/v1/status", "GET, HEAD"),
        ("POST", "/openapi.json", "GET, HEAD"),
    ):
        answer = bench.ask(method, path)
        assert (answer.status, answer.headers["allow"]) == (405, allow)


# -- hosts, and browsers


@pytest.mark.parametrize(
    "host", ["localhost", "relayd", "LOCALHOST", "localhost:80", "relayd:"]
)
def test_hosts_that_are_meant(bench: Bench, host: str) -> None:
    assert bench.ask("GET", "/v1/status", host=host).status == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "localhost.evil.example", "localhost:80:80", "", "127.0.0.1"),
        *("evil.example:80#localhost", "localhost, evil", "relayd/", "localhost:x"),
    ],
)
def test_a_page_of_a_browser_does_not_get_here(bench: Bench, host: str) -> None:
    answer = bench.ask("POST", "/v1/relays/web/stop", host=host)
    assert answer.status == 421
    assert not bench.steering.calls


def test_a_request_without_a_host_or_with_two(bench: Bench) -> None:
    client = bench.client()
    client.send(b"GET /v1/status HTTP/1.1\r\n\r\n")
    assert Answer(client.said).problem == "there is no Host header"
    client = bench.client()
    client.send(b"GET /v1/status HTTP/1.1\r\nHost: relayd\r\nhost: relayd\r\n\r\n")
    assert Answer(client.said).problem == "there are several Host headers"
    client = bench.client()
    client.send(b"GET /v1/status HTTP/1.0\r\n\r\n")
    assert Answer(client.said).status == 200


def test_a_page_of_this_machine_does_not_either(bench: Bench) -> None:
    answer = bench.ask("POST", "/v1/relays/web/stop", origin="http://localhost:8000")
    assert answer.status == 403
    assert not bench.steering.calls


# -- changes that take their time


def later(bench: Bench) -> list[Deferred[Any]]:
    bench.steering.later = made = []
    return made


def test_an_answer_comes_when_the_change_is_made(bench: Bench) -> None:
    made = later(bench)
    client = bench.client()
    client.send(request("POST", "/v1/relays/web/start"))
    assert not client.said
    bench.clock.advance(60)
    assert not client.gone
    made[0].callback({"x": 1})
    bench.turns()
    assert Answer(client.said).json == {"x": 1}


def test_a_change_that_can_not_be_made(bench: Bench) -> None:
    made = later(bench)
    client = bench.client()
    client.send(request("POST", "/v1/relays/web/start"))
    made[0].errback(Failure(Conflict("port 80 is taken", "and so is 81")))
    bench.turns()
    answer = Answer(client.said)
    assert answer.status == 409
    assert answer.json == {"problems": ["port 80 is taken", "and so is 81"]}


def test_a_change_that_is_made_in_part(bench: Bench) -> None:
    """The log does not call it refused."""
    made = later(bench)
    client = bench.client()
    client.send(request("POST", "/v1/relays/web/start"))
    with capturedLogs() as logged:
        made[0].errback(Failure(Unfinished("it is started, but:", "no rules")))
        bench.turns()
    answer = Answer(client.said)
    assert answer.status == 500
    assert answer.json == {"problems": ["it is started, but:", "no rules"]}
    [line] = map(formatEvent, logged)
    assert line is not None
    assert line.endswith(": done in part, 500: it is started, but:; no rules")


def test_a_change_is_made_without_its_client(bench: Bench) -> None:
    """And its end is logged."""
    made = later(bench)
    client = bench.client()
    client.send(request("POST", "/v1/relays/web/start"))
    bench.clients.remove(client)
    client.leave()
    with capturedLogs() as logged:
        made[0].callback({})
        bench.turns()
    [line] = map(eventAsText, logged)
    assert "POST /v1/relays/web/start: done" in line
    assert not client.said


def test_what_changes_nothing_is_not_waited_for_without_its_client(
    bench: Bench,
) -> None:
    """An explanation takes one of a few places."""
    made = later(bench)
    path, body = SAMPLES["explain"]
    client = bench.client()
    client.send(request("POST", path, body))
    bench.clients.remove(client)
    with capturedLogs() as logged:
        client.leave()
        bench.turns()
    assert made[0].called
    assert not logged
    assert not client.said


def test_a_defect_is_logged_and_told(
    bench: Bench, logged_failures: LoggedFailures, monkeypatch: pytest.MonkeyPatch
) -> None:
    def status() -> Any:
        raise RuntimeError("a defect")

    monkeypatch.setattr(bench.steering, "status", status)
    answer = bench.ask("GET", "/v1/status")
    assert (answer.status, answer.problem) == (500, "a defect of relayd: see its log")
    logged_failures.take("GET /v1/status failed")


def test_an_answer_that_is_no_json_is_reset(
    bench: Bench, logged_failures: LoggedFailures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.steering, "status", lambda: {"uptime": float("nan")})
    client = bench.client()
    client.send(request("GET", "/v1/status"))
    assert client.gone
    assert not client.said
    logged_failures.take("failed")


# -- the site's own bounds


def test_the_limits_of_the_control_socket_itself(bench: Bench) -> None:
    bench.ask("GET", "/", uid=STRANGER)
    limits = bench.ask("GET", "/v1/limits").json["limits"]
    own = {each["what"]: each for each in limits if each["relay"] is None}
    assert own["control_clients"] == {
        "what": "control_clients",
        "relay": None,
        "limit": 64,
        "now": 1,
        "hits": 0,
    }
    assert own["control_refused_uids"]["hits"] == 1
    assert own["control_timeout"]["hits"] == 0
