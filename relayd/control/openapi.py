"""The description of the API, made from the table of routes: OpenAPI 3.1.

https://spec.openapis.org/oas/v3.1.1.html
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import relayd
from relayd.control.reading import OPENAPI
from relayd.control.routes import ROUTES
from relayd.control.routing import Route
from relayd.control.schemas import SCHEMAS, ref
from relayd.control.steering import Json

#: What a request of any route may be refused with.
_ALWAYS = (400, 403, 414, 421, 431, 503)
_OF_A_BODY = (411, 413, 415)

_WHY = {
    400: "The request is wrong.",
    403: "Whoever asks may not.",
    404: "There is no such relay, server or session.",
    409: "It is not possible now.",
    411: "The body has no Content-Length.",
    412: "It has changed since it was read.",
    413: "The body is too long.",
    414: "The path is too long.",
    415: "The body is not application/json.",
    421: "Host is neither localhost nor relayd.",
    422: "A value is wrong, or a file.",
    431: "The headers are too long.",
    500: "It is done, but not what should have followed; or relayd has a defect.",
    503: "There are too many clients, or captures.",
}

_TAG = {
    "ETag": {
        "description": "What the resource is now, for If-Match.",
        "required": True,
        "schema": {"type": "string"},
    }
}


def document() -> Json:
    """The description, as it is written in JSON."""
    paths: dict[str, Json] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    paths[OPENAPI] = {
        "get": {
            "operationId": "openapi",
            "summary": "This description.",
            "responses": {"200": _answer("The description.", {"type": "object"})}
            | _refusals(_ALWAYS),
        }
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "relayd",
            "version": relayd.__version__,
            "description": "What a running relayd does, and how to steer it.",
        },
        "servers": [{"url": "http://localhost"}],
        "paths": paths,
        "components": {"schemas": SCHEMAS},
    }


def _operation(route: Route) -> Json:
    done = _answer("It is so.", ref(route.answer)) if route.answer else _stream(route)
    if route.tag:
        done["headers"] = _TAG
    made: Json = {
        "operationId": route.name,
        "summary": route.help,
        "parameters": _parameters(route),
        "responses": {"200": done} | _refusals(_statuses(route)),
    }
    if route.body is not None:
        made["requestBody"] = {
            "required": route.body.is_needed,
            "content": {"application/json": {"schema": route.body.schema()}},
        }
    return made


def _parameters(route: Route) -> list[Json]:
    found = [
        {
            "name": each,
            "in": "path",
            "required": True,
            "description": f"The {each}'s name." if each != "id" else "Its id.",
            "schema": route.types[each].schema()
            if each in route.types
            else {"type": "string", "minLength": 1},
        }
        for each in route.names
    ]
    found += [
        {
            "name": each.name,
            "in": "query",
            "required": each.required,
            "description": each.help,
            "schema": each.type.schema()
            | ({} if each.default is None else {"default": each.default}),
        }
        for each in route.query.fields
    ]
    if route.tag and route.changes:
        found.append(
            {
                "name": "If-Match",
                "in": "header",
                "required": False,
                "description": "Only if it has this ETag.",
                "schema": {"type": "string"},
            }
        )
    return found


def _statuses(route: Route) -> list[int]:
    found = [*_ALWAYS]
    named = {each.name for each in route.query.fields}
    if route.body is not None:
        found += _OF_A_BODY
        named |= {each.name for each in route.body.fields}
    if route.names or "relay" in named or route.changes:
        found += [404]
    if route.is_logged:
        found += [409]
    if route.changes or named:
        found += [422]
    if route.tag and route.changes:
        found += [412]
    if route.changes:
        found += [500]
    return sorted(found)


def _refusals(statuses: Any) -> Json:
    return {
        str(each): _answer(f"{HTTPStatus(each).phrase}. {_WHY[each]}", ref("Problems"))
        for each in statuses
    }


def _stream(route: Route) -> Json:
    return {"description": "It goes on.", "content": {route.streams: {}}}


def _answer(said: str, schema: Json) -> Json:
    return {"description": said, "content": {"application/json": {"schema": schema}}}
