"""The description: it is OpenAPI, says what there is, and is served."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest

import relayd
from relayd.control.openapi import document
from relayd.control.reading import OPENAPI
from relayd.control.routes import ROUTES
from tests.control.bench import READER, Bench


def inner(value: Any) -> list[Any]:
    """All that is in something, itself included."""
    parts = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list):
        return [value]
    return [value, *(each for part in parts for each in inner(part))]


def of_key(value: Any, key: str) -> list[Any]:
    """The values of a key, wherever it stands."""
    return [
        each[key] for each in inner(value) if isinstance(each, dict) and key in each
    ]


def test_it_is_served() -> None:
    bench = Bench()
    answer = bench.ask("GET", OPENAPI, uid=READER)
    assert answer.status == 200
    assert answer.json == document()
    bench.over()


def test_it_has_every_route() -> None:
    made = document()
    assert made["openapi"].startswith("3.1.")
    assert made["info"]["version"] == relayd.__version__
    there = {
        (method.upper(), path)
        for path, methods in made["paths"].items()
        for method in methods
    }
    assert there == {(each.method, each.path) for each in ROUTES} | {("GET", OPENAPI)}
    names = [each.name for each in ROUTES]
    assert len(set(names)) == len(names)


def test_what_it_refers_to_is_there() -> None:
    made = document()
    known = {f"#/components/schemas/{name}" for name in made["components"]["schemas"]}
    assert set(of_key(made, "$ref")) == known


def test_its_schemas_are_schemas() -> None:
    made = document()
    for each in [
        *made["components"]["schemas"].values(),
        *of_key(made["paths"], "schema"),
    ]:
        jsonschema.Draft202012Validator.check_schema(each)


@pytest.mark.parametrize("route", ROUTES, ids=lambda each: each.name)
def test_each_operation_is_described(route: Any) -> None:
    made = document()["paths"][route.path][route.method.lower()]
    assert made["summary"].endswith(".")
    named = re.findall(r"\{(\w+)\}", route.path)
    assert [p["name"] for p in made["parameters"] if p["in"] == "path"] == named
    assert ("requestBody" in made) == (route.body is not None)
    assert (route.method == "GET") <= (route.body is None)
    assert not (route.method == "GET" and route.changes)
    assert ("412" in made["responses"]) == (route.changes and route.tag is not None)
    assert all(each["description"] for each in made["responses"].values())
