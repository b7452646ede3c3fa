"""Reads a request: which route, with which values, and whether it may be asked for.

Nothing of Twisted is needed for that; whatever is wrong is a :class:`Refusal` with the
status that HTTP has for it (RFC 9110).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

import attrs

from relayd.control import json_text
from relayd.control.peers import Right
from relayd.control.routes import find
from relayd.control.routing import Asked, Route
from relayd.control.steering import Asker, Json, Outdated, Refusal, Steering
from relayd.control.values import Fields

#: The path of the description of all this.
OPENAPI = "/openapi.json"

#: What Host may say.  Any other name is one that a page in a browser could have led
#: here, through a forwarder: DNS rebinding.
_HOST = re.compile(rb"(localhost|relayd)(:[0-9]{0,5})?", re.IGNORECASE)

_JSON = re.compile(rb'application/json(\s*;\s*charset="?utf-8"?)?\s*', re.IGNORECASE)

#: The entity tags of If-Match.
_TAGS = re.compile(rb'\s*(W/)?"([\x21\x23-\x7e]*)"\s*(,|$)')


class BadRequest(Refusal):
    """A request that HTTP has a status for.

    :ivar headers: of the answer.
    """

    def __init__(self, status: int, *problems: str, **headers: str) -> None:
        super().__init__(*problems)
        self.status = status
        self.headers = headers


@attrs.frozen
class Heard:
    """A request as it came.

    :ivar header: the values of a header, by its name in small letters.
    """

    method: str
    uri: bytes
    version: bytes
    header: Callable[[bytes], Sequence[bytes]]
    body: bytes


def read(
    heard: Heard, by: Asker, right: Right, steering: Steering
) -> tuple[Route | None, Asked]:
    """The route of a request, and its values; None: the description.

    :raises Refusal: it may not be asked so.
    """
    if not right:
        raise BadRequest(403, f"{by} may not ask: see --control-uid")
    _check_sender(heard)
    path, _, query = heard.uri.partition(b"?")
    parts = _parts(path)
    method = "GET" if heard.method == "HEAD" else heard.method
    if parts == [OPENAPI[1:]]:
        if method != "GET":
            raise _not_allowed(["GET"])
        return None, Asked({}, _query(query, Fields()), _body(heard, None), by)
    routes = find(parts)
    if not routes:
        raise BadRequest(404, f"there is no such path: see {OPENAPI}")
    if method not in routes:
        raise _not_allowed(routes)
    route, names = routes[method]
    if (route.changes or route.secret) and right != "change":
        raise BadRequest(403, f"{by} may change nothing: see --control-read-uid")
    named = _typed(route, names)
    asked = Asked(
        *(named, _query(query, route.query), _body(heard, route.body), by),
        may_change=right == "change",
    )
    _check_tag(heard, route, asked, steering)
    return route, asked


def _check_sender(heard: Heard) -> None:
    """Refuse what may come from a page in somebody's browser."""
    hosts = heard.header(b"host")
    if len(hosts) > 1:
        raise BadRequest(400, "there are several Host headers")
    if not hosts and heard.version != b"HTTP/1.0":
        # RFC 9112, section 3.2.
        raise BadRequest(400, "there is no Host header")
    if hosts and not _HOST.fullmatch(hosts[0]):
        raise BadRequest(421, "bad Host: expected localhost or relayd")
    if heard.header(b"origin"):
        raise BadRequest(403, "there is an Origin header: browsers may not ask")


def _parts(path: bytes) -> list[str]:
    """The parts of a path, each decoded by itself: a `%2F` is no slash."""
    if not path.startswith(b"/"):
        raise BadRequest(400, "bad path: expected one that begins with /")
    return [_decoded(each, "path") for each in path[1:].split(b"/")]


def _decoded(text: bytes, where: str) -> str:
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise BadRequest(400, f"the {where} is not UTF-8") from None


def _not_allowed(methods: Sequence[str] | Mapping[str, Any]) -> BadRequest:
    allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else [])])
    return BadRequest(405, f"no such method here: there are {allowed}", allow=allowed)


def _typed(route: Route, names: Mapping[str, str]) -> Json:
    """The named parts of a path, each of its type."""
    typed: Json = dict(names)
    for name, kind in route.types.items():
        try:
            typed[name] = kind.parse(names[name])
        except ValueError as problem:
            raise BadRequest(400, f"bad {name}: {problem}") from None
    return typed


def _query(query: bytes, fields: Fields) -> Json:
    given: dict[str, str] = {}
    for each in filter(None, query.replace(b"+", b" ").split(b"&")):
        key, _, value = each.partition(b"=")
        name = _decoded(key, "query")
        if name in given:
            raise BadRequest(400, f"{name[:64]!r} stands twice in the query")
        given[name] = _decoded(value, "query")
    return fields.parse(given)


def _body(heard: Heard, fields: Fields | None) -> Json:
    if fields is None:
        if heard.body:
            raise BadRequest(400, "there is a body: expected none")
        return {}
    if not heard.body:
        # Of what has no header that says which type it is.
        if fields.is_needed:
            raise BadRequest(400, "there is no body: expected an object of JSON")
        return fields.load({})
    kinds = heard.header(b"content-type")
    if len(kinds) != 1 or not _JSON.fullmatch(kinds[0]):
        raise BadRequest(415, "bad Content-Type: expected application/json")
    try:
        value = json_text.load(heard.body)
    except ValueError as problem:
        raise BadRequest(400, f"the body is not JSON: {problem}") from None
    return fields.load(value)


def _check_tag(heard: Heard, route: Route, asked: Asked, steering: Steering) -> None:
    """Refuse a change of what has changed since its client read it."""
    wanted = b", ".join(heard.header(b"if-match")).strip(b" \t")
    if not wanted or not route.changes:
        return
    if route.tag is None:
        raise BadRequest(400, "there is an If-Match: this has no ETag")
    current = route.tag(steering, asked).encode()
    if wanted == b"*":
        return
    tags, at = [], 0
    while at < len(wanted):
        found = _TAGS.match(wanted, at)
        if found is None:
            raise BadRequest(400, 'bad If-Match: expected * or tags such as "1"')
        # A weak one matches nothing.
        tags += [] if found[1] else [found[2]]
        at = found.end()
    if current not in tags:
        raise Outdated("it has changed since it was read: read it again")
