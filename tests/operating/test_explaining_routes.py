"""What an explanation says of routes and server names is what they do."""

from __future__ import annotations

import json
import socket
import tomllib
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.control.steering import Conflict, Invalid
from relayd.core.errors import ConfigError
from relayd.operating.explaining import explain
from relayd.preludes.client_hello import hello_of
from relayd.testing import explain as explain_to_tests
from tests.support.route_modules import RouteModules, route_modules
from tests.support.steered import HOST, Relayd, at, result, running, whole

__all__ = ["route_modules"]


def one(toml: str) -> Any:
    """The only relay of a file."""
    given = json.dumps(tomllib.loads(toml)).encode()
    return configure(read_layers("-", BytesIO(given))).relays[0]


def web(extra: str = "", dest: str = '"10.0.0.1:80"', kind: str = "tcp") -> Any:
    where = f"dest = {dest}\n" if kind == "tcp" else ""
    table = f'[{kind}.web]\nlisten = "127.0.0.1:8080"\n{where}{extra}\n'
    return one(table if "sni" in extra else f'{table}route = "myroutes:route"\n')


def steps(found: Any) -> dict[str, tuple[str, str]]:
    return {each.step: (each.result, each.why) for each in found.steps}


def routed(
    modules: RouteModules, body: str, client: str = "10.9.9.9", **asked: Any
) -> Any:
    modules.write(body)
    return explain(web(), client, **asked)


# -- of a file


@pytest.mark.parametrize(
    ("intercepts", "expected"),
    [
        (["192.168.0.2:80"], "192.168.0.2:80"),
        (["192.168.0.0/24:80", "192.168.0.2:80,81", "[fd00::2]:80"], "[fd00::2]:80"),
        # Nobody knows which of them.
        ([":80"], "0.0.0.0:8080"),
        (["192.168.0.2:80-81"], "0.0.0.0:8080"),
    ],
)
def test_what_clients_ask_for_that_rules_bring(
    route_modules: RouteModules, intercepts: list[str], expected: str
) -> None:
    route_modules.write(
        "async def route(conn):\n"
        '    conn.facts["asked"] = str(conn.listener)\n'
        "    return conn.server('10.0.0.5:80')\n"
    )
    relay = one(
        f'[tcp.web]\nlisten = "8080"\ndest = "10.0.0.1:80"\n'
        f'route = "myroutes:route"\nintercept = {json.dumps(intercepts)}\n'
    )
    found = steps(explain(relay, "10.9.9.9"))
    assert found["route_facts"][1] == f"asked={expected}"


def test_a_pool_is_chosen_in(route_modules: RouteModules) -> None:
    route_modules.write(
        "async def route(conn):\n"
        '    conn.facts["tenant"] = "blue"\n'
        '    conn.facts["from"] = conn.client.host\n'
        '    conn.limit(bandwidth="1MB", max_age=60, sessions=3, key="blue")\n'
        '    conn.filter("limit_data", bytes=10)\n'
        '    return conn.pool("ssh" if await conn.peek(3) == b"SSH" else "default")\n'
    )
    relay = web(dest='["10.0.0.1:80", "10.0.0.2:22,pool=ssh"]')
    found = explain(relay, "10.9.9.9:1234", first="SSH-2.0-x\\r\\n")
    assert (found.admitted, found.server) == (True, "ssh/10.0.0.2:22")
    assert steps(found)["route_facts"] == ("noted", "tenant=blue, from=10.9.9.9")
    assert steps(found)["route_limits"] == (
        "limited",
        "bandwidth 1MB, max_age 60, at most 3 sessions of 'blue': 0 now",
    )
    assert steps(found)["route_filters"] == ("see its bytes", "limit_data")
    assert steps(found)["route"] == ("pool ssh", "myroutes:route")
    assert steps(found)["server"][0] == "ssh/10.0.0.2:22"
    other = explain(relay, "10.9.9.9", first=b"GET / HTTP/1.1")
    assert other.server == "10.0.0.1:80"
    assert explain_to_tests(relay, client="10.9.9.9", first=b"SSH-").server == (
        "ssh/10.0.0.2:22"
    )


def test_a_server_is_named(route_modules: RouteModules) -> None:
    found = routed(route_modules, 'return conn.server("10.0.0.5:80,name=blue")')
    assert (found.admitted, found.server) == (True, "blue/10.0.0.5:80")
    assert found.steps[-1].result == "server blue/10.0.0.5:80"


def test_a_client_is_refused(route_modules: RouteModules) -> None:
    found = routed(
        route_modules,
        "async def route(conn):\n"
        '    conn.facts["banned"] = True\n'
        '    conn.reply(b"go away\\r\\n")\n'
        '    conn.refuse("banned")\n',
    )
    assert (found.admitted, found.server) == (False, None)
    assert steps(found)["route_facts"] == ("noted", "banned=True")
    *_, last = found.steps
    assert (last.step, last.result) == ("route", "refused")
    assert last.why == r"myroutes:route: banned; it is told b'go away\r\n'"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('raise ValueError("two\\nlines")', "ValueError: two lines (/"),
        ("raise SystemExit(3)", "it has failed: SystemExit: 3"),
        ("return 5", "it is to return conn.pool"),
        ('return conn.server("10.0.0.5:80,weight=2")', "weight is for a server of"),
        ('name = "x"; return conn.pool(name)', "no pool 'x'"),
        ('return await conn.until(b"\\n", most=4)', "bad request: no b'\\n' in the"),
        ("return await conn.peek(70_000)", "70000"),
    ],
)
def test_a_route_that_fails(route_modules: RouteModules, body: str, said: str) -> None:
    found = routed(route_modules, body, first=b"12345")
    assert not found.admitted
    assert said in found.steps[-1].why
    assert "\n" not in found.steps[-1].why


def test_a_failure_has_the_line_of_the_route(route_modules: RouteModules) -> None:
    """Not that of what it has called wrongly, which is relayd's or Python's."""
    path = route_modules.write(
        "import json\n"
        "def pick(conn):\n"
        '    return conn.pool("no" + "pe")\n'
        "async def route(conn):\n"
        '    if conn.client.host == "10.9.9.9":\n'
        '        json.loads("{")\n'
        "    return pick(conn)\n"
    )
    for client, line in (("10.9.9.9", 6), ("10.8.8.8", 3)):
        why = explain(web(), client).steps[-1].why
        assert why.endswith(f"({path}:{line})"), why


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return await conn.peek(5)", "it waits for 5 bytes of the client, of which 3"),
        ("return await conn.sni()", "return"),
        ("return conn.server(str(conn.original))", "it asks where the client meant to"),
        (
            "from twisted.internet.defer import Deferred; await Deferred()",
            "it waits for what only a reactor brings: ask a relayd that runs",
        ),
    ],
)
def test_what_is_not_known(route_modules: RouteModules, body: str, said: str) -> None:
    found = routed(route_modules, body, first=b"\x16\x03\x01")
    *_, last = found.steps
    if said == "return":
        said = "it waits for a ClientHello of the client"
    assert (found.admitted, found.server, last.result) == (True, None, "not known")
    assert said in last.why


def test_time_passes_for_a_route_that_waits_for_its_client(
    route_modules: RouteModules,
) -> None:
    body = 'await conn.peek(5, wait=3); return conn.server("10.0.0.5:80")'
    assert routed(route_modules, body).server == "10.0.0.5:80"
    route_modules.forget()
    late = routed(route_modules, body.replace("wait=3", "wait=11"))
    assert steps(late)["route"][0] == "not known"


def test_a_server_name_makes_a_hello(route_modules: RouteModules) -> None:
    body = 'conn.facts["name"] = await conn.sni(); return conn.pool()'
    found = routed(route_modules, body, sni="WWW.example.com")
    assert steps(found)["route_facts"] == ("noted", "name=www.example.com")


def test_a_server_that_speaks_first(route_modules: RouteModules) -> None:
    route_modules.write('conn.facts["n"] = len(await conn.peek(5)); return conn.pool()')
    found = explain(web("server_speaks_first = true"), "10.9.9.9", first=b"12345")
    assert steps(found)["route_facts"] == ("noted", "n=0")


def test_who_is_refused_before_is_not_asked_about(route_modules: RouteModules) -> None:
    route_modules.write("1/0")
    found = explain(web('clients = ["deny 10.9.9.9"]'), "10.9.9.9")
    assert found.steps[-1].step == "rules"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"first": b"x", "sni": "a.example"}, "or the server name"),
        ({"first": "a\\q"}, "bad first bytes 'a\\\\q': \\q is no escape"),
        ({"sni": "a b"}, "bad server name 'a b'"),
        ({"sni": "ü.example"}, "bad server name"),
    ],
)
def test_what_can_not_be_asked(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as problem:
        explain(web(), "10.9.9.9", **asked)
    assert said in str(problem.value)


def test_a_relay_for_which_it_decides_nothing() -> None:
    plain = one('[tcp.web]\nlisten = "8080"\ndest = "10.0.0.1:80"\n')
    for asked in ({"first": b"x"}, {"sni": "a.example"}):
        with pytest.raises(ConfigError, match="no route and no --sni"):
            explain(plain, "10.9.9.9", **asked)


def test_a_route_that_can_not_be_imported() -> None:
    with pytest.raises(ConfigError, match="there is no module myroutes"):
        explain(web(), "10.9.9.9")


def test_a_proxy(route_modules: RouteModules) -> None:
    route_modules.write(
        "async def route(conn):\n"
        '    conn.facts["user"] = conn.user_id.decode() or "nobody"\n'
        '    if conn.requested.endswith(":25"):\n'
        '        conn.refuse("mail")\n'
        '    if conn.requested.endswith(":80"):\n'
        '        return conn.server("10.0.0.5:8080")\n'
        "    return conn.server(conn.requested)\n"
    )
    proxy = web('destinations = ["deny 192.0.2.0/24"]\nopen = true', kind="socks4")

    def to(dest: str | None, user: str = "") -> Any:
        return explain(proxy, "10.9.9.9", dest=dest, user=user)

    assert to("203.0.113.1:443", "me").server == "203.0.113.1:443"
    assert steps(to("203.0.113.1:443", "me"))["route_facts"][1] == "user=me"
    assert to("192.0.2.1:443").steps[-1].step == "destination"
    assert not to("192.0.2.1:443").admitted
    assert not to("203.0.113.1:25").admitted
    # What the operator names is not judged.
    assert to("192.0.2.1:80").server == "10.0.0.5:8080"
    assert "route" not in steps(to(None))


# -- server names

NAMES = """sni = [
  "www.example.com=10.0.0.5:443", "www.example.com=10.0.0.6:443",
  "*.example.com=10.0.0.7:443", "old.example=default"{}
]"""


@pytest.mark.parametrize(
    ("name", "pool", "server"),
    [
        ("www.example.com", "www.example.com", "www.example.com/10.0.0.5:443"),
        ("WWW.Example.Com", "www.example.com", "www.example.com/10.0.0.5:443"),
        ("a.b.example.com", "*.example.com", "*.example.com/10.0.0.7:443"),
        ("old.example", "default", "10.0.0.1:80"),
    ],
)
def test_a_server_name(name: str, pool: str, server: str) -> None:
    relay = web(NAMES.format("") + '\nbalance = "first"')
    assert (found := explain(relay, "10.9.9.9", sni=name)).admitted
    assert steps(found)["sni"][0] == f"pool {pool}"
    assert repr(name.lower()) in steps(found)["sni"][1]
    assert found.server == server


def test_a_name_that_nothing_is_about() -> None:
    relay, any_other = web(NAMES.format("")), web(NAMES.format(', "=10.0.0.9:443"'))
    found = explain(relay, "10.9.9.9", sni="other.example")
    assert not found.admitted
    assert found.steps[-1].why == (
        "no server for 'other.example': no --sni is about it"
    )
    assert explain(any_other, "10.9.9.9", sni="other.example").server == (
        "*/10.0.0.9:443"
    )
    nameless = explain(any_other, "10.9.9.9", first=hello_of(None))
    assert nameless.server == "*/10.0.0.9:443"
    assert not explain(relay, "10.9.9.9", first=hello_of(None)).admitted


def test_behind_tls_that_the_listener_ends(route_modules: RouteModules) -> None:
    """The name is that of the handshake, and the first bytes come after it."""
    route_modules.write(
        "async def route(conn):\n"
        "    conn.facts['name'] = await conn.sni() or 'none'\n"
        "    conn.facts['first'] = (await conn.peek(3)).decode()\n"
        "    return conn.pool()\n"
    )
    relay = one(
        '[tcp.a]\nlisten = "ssl:443:privateKey=k"\ndest = "10.0.0.1:80"\n'
        'route = "myroutes:route"\n'
    )
    both = explain(relay, "10.9.9.9", first=b"GET", sni="a.example")
    assert steps(both)["route_facts"][1] == "name=a.example, first=GET"
    alone = explain(relay, "10.9.9.9", first=b"GET")
    assert steps(alone)["route_facts"][1] == "name=none, first=GET"
    waits = steps(explain(relay, "10.9.9.9", sni="a.example"))["route"]
    assert waits[0] == "not known"
    assert "of which 0 bytes are known" in waits[1]


def test_first_bytes_and_server_names() -> None:
    relay = web(NAMES.format(""))
    plain = explain(relay, "10.9.9.9", first=b"GET / HTTP/1.1\r\n\r\n")
    assert (plain.admitted, plain.steps[-1].step) == (False, "sni")
    for first in (b"", hello_of("www.example.com")[:20]):
        found = explain(relay, "10.9.9.9", first=first)
        assert (found.admitted, found.server) == (True, None)
        assert found.steps[-1].result == "not known"


# -- of one that runs


def tables(**more: Any) -> dict[str, Any]:
    relay = {"listen": at(20001), "dest": "127.0.0.1:9", **more}
    return {"transport": "twisted", "tcp": {"a": {**relay, "route": "myroutes:route"}}}


def asked(relayd: Relayd, first: str | None = None, sni: str | None = None) -> Any:
    return relayd.steered.explain("a", "10.9.9.9", None, None, first, sni)


def test_a_relayd_that_runs_waits(tmp_path: Path, route_modules: RouteModules) -> None:
    route_modules.write(
        "from twisted.internet.defer import Deferred\n"
        "waits = []\n"
        "async def route(conn):\n"
        "    conn.facts['to'] = str(conn.listener)\n"
        "    waits.append(Deferred())\n"
        "    return conn.server(await waits[-1])\n"
    )
    with running(tmp_path, tables(listen=at(0))) as relayd:
        waits = relayd.unit("a").router.route.__globals__["waits"]
        answer = asked(relayd)
        assert not answer.called
        relayd.reactor.advance(5)
        waits[0].callback("10.0.0.5:80")
        found = result(answer)
        assert (found["admitted"], found["server"]) == (True, "10.0.0.5:80")
        facts = {each["step"]: each["why"] for each in found["steps"]}
        [where] = relayd.service.addresses("a")
        assert facts["route_facts"] == f"to={where}"
        assert not relayd.served("a").registry
        # Nothing of it is left.
        assert next(iter(relayd.served("a").ordinals)) == 0
        slow = asked(relayd)
        relayd.reactor.advance(9.9)
        assert not slow.called
        relayd.reactor.advance(0.2)
        last = result(slow)["steps"][-1]
        assert (last["result"], last["why"]) == (
            "refused",
            "myroutes:route: it has not decided in 10 s",
        )
        assert waits[1].called, "it is cancelled"
        relayd.set("a", handshake_timeout=2)
        soon = asked(relayd)
        relayd.reactor.advance(2.1)
        assert "in 2 s" in result(soon)["steps"][-1]["why"]


def test_who_leaves_gives_its_place_back(
    tmp_path: Path, route_modules: RouteModules
) -> None:
    route_modules.write(
        "from twisted.internet.defer import Deferred\n"
        "waits = []\n"
        "async def route(conn):\n"
        "    waits.append(Deferred())\n"
        "    await waits[-1]\n"
    )
    with running(tmp_path, tables()) as relayd:
        answer = asked(relayd)
        waits = relayd.unit("a").router.route.__globals__["waits"]
        answer.cancel()
        with pytest.raises(Conflict):
            result(answer)
        assert waits[0].called
        rows = whole(relayd.steered.limits())["limits"]
        [now] = [each["now"] for each in rows if each["what"] == "explanations"]
        assert now == 0


def test_for_who_may_only_look_no_route_is_run(
    tmp_path: Path, route_modules: RouteModules
) -> None:
    route_modules.write('conn.refuse("it was run")')
    with running(tmp_path, tables()) as relayd:
        explain = relayd.steered.explain
        for first in (None, "GET /"):
            asked = explain("a", "10.9.9.9", None, None, first, None, runs=False)
            found = result(asked)
            assert (found["admitted"], found["server"]) == (True, None)
            last = found["steps"][-1]
            assert (last["step"], last["result"]) == ("route", "not known")
            assert last["why"].endswith("who may change relays (--control-uid)")


def test_what_its_client_would_send(
    tmp_path: Path, route_modules: RouteModules
) -> None:
    route_modules.write('await conn.peek(5); return conn.server("10.0.0.5:80")')
    with running(tmp_path, tables()) as relayd:
        assert result(asked(relayd, "12345"))["server"] == "10.0.0.5:80"
        assert result(asked(relayd, None, "a.example"))["server"] == "10.0.0.5:80"
        few = asked(relayd, "1")
        relayd.reactor.advance(1.1)
        last = result(few)["steps"][-1]
        assert last["result"] == "not known"
        assert "5 bytes of the client, of which 1 " in last["why"]
        with pytest.raises(Invalid, match="no escape"):
            result(asked(relayd, "\\q"))


def test_pools_as_they_stand(tmp_path: Path, route_modules: RouteModules) -> None:
    route_modules.write('return conn.pool("b")')
    dest = ["127.0.0.1:9", "127.0.0.1:10,pool=b", "127.0.0.1:11,pool=b"]
    with running(tmp_path, tables(dest=dest)) as relayd:
        relayd.steered.set_server("a", "b/127.0.0.1:10", "down", None, None, None)  # type: ignore[arg-type]
        assert result(asked(relayd))["server"] == "b/127.0.0.1:11"

        async def other(conn: Any) -> Any:
            return conn.pool()

        relayd.unit("a").router.route = other
        assert result(asked(relayd))["server"] == "127.0.0.1:9"


def test_sessions_that_count_for_a_key(
    tmp_path: Path, route_modules: RouteModules
) -> None:
    route_modules.write(
        "async def route(conn):\n"
        '    conn.limit(sessions=1, key="all")\n'
        "    return conn.pool()\n"
    )
    with socket.socket() as server:
        server.bind((HOST, 20002))
        server.listen()
        with running(tmp_path, tables(dest=at(20002))) as relayd:
            assert result(asked(relayd))["admitted"]
            with socket.create_connection((HOST, 20001)):
                counts = relayd.served("a").own_limits.counts
                relayd.reactor.until(lambda: counts)
                last = result(asked(relayd))["steps"][-1]
                assert (last["step"], last["result"]) == ("route_limits", "refused")
                assert last["why"] == "at most 1 sessions of 'all': 1 now"


def test_so_many_at_once(
    tmp_path: Path, route_modules: RouteModules, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relayd.operating.seeing.EXPLAINED_AT_ONCE", 2)
    route_modules.write(
        "from twisted.internet.defer import Deferred\n"
        "waits = []\n"
        "async def route(conn):\n"
        "    waits.append(Deferred())\n"
        "    await waits[-1]\n"
    )
    with running(tmp_path, tables()) as relayd:
        waiting: list[Deferred[Any]] = [asked(relayd) for _ in range(2)]
        with pytest.raises(Conflict, match="2 explanations wait for a route"):
            result(asked(relayd))
        rows = {each["what"]: each for each in whole(relayd.steered.limits())["limits"]}
        assert (rows["explanations"]["now"], rows["explanations"]["hits"]) == (2, 1)
        relayd.reactor.advance(10.1)
        for each in waiting:
            assert not result(each)["admitted"]
        last = asked(relayd)
        waits = relayd.unit("a").router.route.__globals__["waits"]
        assert not waits[-1].called
        # Whoever stops does not wait for it.
        relayd.timers.close()
        with pytest.raises(Conflict, match="relayd stops"):
            result(last)
        assert waits[-1].called, "it is cancelled"
