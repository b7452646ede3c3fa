"""Routes by name: modules that are read, and read anew."""

from __future__ import annotations

import functools
import importlib
import os
import py_compile
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relayd.core.errors import ConfigError
from relayd.core.route_spec import RouteSpec
from relayd.routing.loading import Loader, literal_pools, not_a_route
from relayd.testing import decide

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes modules to where Python looks for them."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = dict(sys.modules)

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    yield write
    for name in set(sys.modules) - set(before):
        del sys.modules[name]
    sys.modules.update(before)


ROUTE = """
    async def route(conn):
        return conn.pool("{}")
"""


def load(where: str, *, fresh: bool = False) -> Any:
    """A route, by one loader, which is committed."""
    loader = Loader(fresh=fresh)
    found = loader.load(RouteSpec(*where.split(":")))
    loader.commit()
    return found


def why_not(where: str, *, fresh: bool = False) -> str:
    with pytest.raises(ConfigError) as raised:
        load(where, fresh=fresh)
    said = str(raised.value)
    assert "\n" not in said
    assert said.startswith(f"route {where}: ")
    return said.removeprefix(f"route {where}: ")


# -- finding


def test_a_route_is_found(write: Write) -> None:
    write("routes_a.py", ROUTE.format("a"))
    route = load("routes_a:route")
    assert decide(route).pool == "a"
    assert route.__module__ == "routes_a"
    assert sys.modules["routes_a"].route is route
    assert importlib.import_module("routes_a").route is route


def test_a_module_that_is_there_is_taken_as_it_is(write: Write) -> None:
    write("routes_a.py", ROUTE.format("a"))
    before = importlib.import_module("routes_a")
    assert load("routes_a:route") is before.route


def test_packages_and_dotted_names(write: Write) -> None:
    write("routes_p/__init__.py", "")
    write(
        "routes_p/inner.py",
        """
        class Routes:
            @staticmethod
            async def one(conn):
                return conn.pool("one")

            class Deeper:
                async def __call__(self, conn):
                    return conn.pool("two")

            two = Deeper()
        """,
    )
    one, two = load("routes_p.inner:Routes.one"), load("routes_p.inner:Routes.two")
    assert (decide(one).pool, decide(two).pool) == ("one", "two")
    assert sys.modules["routes_p"].inner is sys.modules["routes_p.inner"]


def test_a_module_that_is_executed_is_where_classes_look_for_it(write: Write) -> None:
    write(
        "routes_d.py",
        """
        from __future__ import annotations
        import dataclasses, sys
        from typing import ClassVar

        assert sys.modules[__name__].__dict__ is globals()

        @dataclasses.dataclass
        class Where:
            pool: str
            known: ClassVar[int] = 1

            async def route(self, conn):
                return conn.pool(self.pool)

        where = Where("a")
        """,
    )
    assert decide(load("routes_d:where.route")).pool == "a"


# -- anew


def test_a_module_is_read_anew_and_the_old_one_is_whole(write: Write) -> None:
    text = """
        COUNT = []
        async def route(conn):
            COUNT.append(1)
            return conn.pool(f"{pool}" + str(len(COUNT)))
    """
    write("routes_a.py", text.format(pool="a"))
    old = load("routes_a:route")
    assert decide(old).pool == "a1"
    write("routes_a.py", text.format(pool="b"))
    loader = Loader(fresh=True)
    new = loader.load(RouteSpec("routes_a", "route"))
    assert sys.modules["routes_a"].route is old
    loader.commit()
    assert sys.modules["routes_a"].route is new
    assert (decide(new).pool, decide(old).pool) == ("b1", "a2")


def test_a_source_that_has_changed_within_its_second_is_read(write: Write) -> None:
    """Python's own copy of it would be taken for the new one: same time, same size."""
    path = write("routes_a.py", ROUTE.format("a"))
    os.utime(path, (1_000_000_000, 1_000_000_000))
    importlib.import_module("routes_a")
    del sys.modules["routes_a"]
    for fresh in (False, True):
        path = write("routes_a.py", ROUTE.format("b"))
        os.utime(path, (1_000_000_000, 1_000_000_000))
        assert decide(load("routes_a:route", fresh=fresh)).pool == "b"


@pytest.mark.parametrize(
    "text",
    [
        "async def route(conn):\n    return conn.pool(\n",
        "import sys\nsys.exit(3)\n",
        "COUNT = 1 / 0\n",
        "raise GeneratorExit\n",
        "import no_such_module_anywhere\n",
        "other = 1\n",
    ],
)
def test_a_failing_module_leaves_the_old_one_whole(write: Write, text: str) -> None:
    write("routes_a.py", ROUTE.format("a"))
    old = load("routes_a:route")
    write("routes_a.py", text)
    loader = Loader(fresh=True)
    with pytest.raises(ConfigError):
        loader.load(RouteSpec("routes_a", "route"))
    assert sys.modules["routes_a"].route is old
    assert decide(old).pool == "a"


def test_a_failing_module_is_not_half_there(write: Write) -> None:
    write("routes_a.py", "COUNT = 1 / 0\n")
    for _ in range(2):
        assert "ZeroDivisionError" in why_not("routes_a:route")
        assert "routes_a" not in sys.modules


def test_one_module_fails_and_the_others_are_new(write: Write) -> None:
    write("routes_a.py", ROUTE.format("a"))
    write("routes_b.py", ROUTE.format("b"))
    load("routes_a:route"), load("routes_b:route")
    write("routes_a.py", "import sys\nsys.exit()\n")
    write("routes_b.py", ROUTE.format("new"))
    loader = Loader(fresh=True)
    with pytest.raises(ConfigError):
        loader.load(RouteSpec("routes_a", "route"))
    new = loader.load(RouteSpec("routes_b", "route"))
    loader.commit()
    assert decide(new).pool == "new"
    assert decide(sys.modules["routes_a"].route).pool == "a"
    assert sys.modules["routes_b"].route is new


def test_two_routes_of_a_module_share_it(write: Write, tmp_path: Path) -> None:
    write(
        "routes_a.py",
        f"""
        from pathlib import Path
        SEEN = set()
        with Path({str(tmp_path / "count")!r}).open("a") as count:
            count.write("x")

        async def one(conn):
            return conn.pool("one")

        async def two(conn):
            return conn.pool("two")
        """,
    )
    loader = Loader(fresh=True)
    one, two = (loader.load(RouteSpec("routes_a", each)) for each in ("one", "two"))
    assert one.__globals__ is two.__globals__  # type: ignore[attr-defined]
    assert (tmp_path / "count").read_text() == "x"
    source = (tmp_path / "routes_a.py").read_text().replace('"x"', '"y"')
    write("routes_a.py", source + "1 / 0\n")
    loader = Loader(fresh=True)
    for each in ("one", "two"):
        with pytest.raises(ConfigError, match="ZeroDivisionError"):
            loader.load(RouteSpec("routes_a", each))
    assert (tmp_path / "count").read_text() == "xy"


def test_what_a_module_imports_stays_as_it_is(write: Write) -> None:
    write("routes_p/__init__.py", "import routes_p.lists\nfrom . import lists as own\n")
    write("routes_p/lists.py", "BANNED = {1}\n")
    write(
        "routes_p/__init__.py",
        """
        import routes_p.lists
        from . import lists as own

        BANNED = routes_p.lists.BANNED

        async def route(conn):
            return conn.pool(str(len(own.BANNED)))
        """,
    )
    assert decide(load("routes_p:route")).pool == "1"
    write("routes_p/lists.py", "BANNED = {1, 2}\n")
    lists = sys.modules["routes_p.lists"]
    assert decide(load("routes_p:route", fresh=True)).pool == "1"
    assert sys.modules["routes_p.lists"] is lists
    assert sys.modules["routes_p"].lists is lists


def test_modules_in_an_archive(tmp_path: Path, write: Write) -> None:
    archive = tmp_path / "routes.zip"

    def pack(pool: str) -> None:
        with zipfile.ZipFile(archive, "w") as packed:
            packed.writestr("routes_z.py", textwrap.dedent(ROUTE.format(pool)))

    pack("a")
    sys.path.insert(0, str(archive))
    assert decide(load("routes_z:route")).pool == "a"
    assert decide(load("routes_z:route", fresh=True)).pool == "a"


def test_modules_that_are_compiled_alone(tmp_path: Path, write: Write) -> None:
    path = write("routes_c.py", ROUTE.format("a"))
    py_compile.compile(str(path), str(tmp_path / "routes_c.pyc"))
    path.unlink()
    for fresh in (False, True):
        assert decide(load("routes_c:route", fresh=fresh)).pool == "a"
    assert literal_pools(sys.modules["routes_c"].route) == {}


def test_a_module_without_source_stays_as_it_is() -> None:
    import _socket

    assert why_not("_socket:socket", fresh=True).startswith("socket is no coroutine")
    assert sys.modules["_socket"] is _socket


def test_a_new_module_beside_is_found(write: Write) -> None:
    """Python keeps for a while what it has found in a folder."""
    write("routes_a.py", ROUTE.format("a"))
    load("routes_a:route")
    assert why_not("routes_new:route")
    write("routes_new.py", ROUTE.format("new"))
    assert decide(load("routes_new:route")).pool == "new"


# -- what is wrong


def test_a_module_that_there_is_not(write: Write) -> None:
    said = "there is no module routes_none; it is looked for where Python looks, such"
    assert why_not("routes_none:route").startswith(said)
    write("routes_a.py", "")
    assert "no module routes_a.inner" in why_not("routes_a.inner:route")
    assert "there is no module routes_q; " in why_not("routes_q.inner:route")
    assert "there is no module routes_q; " in why_not("routes_q.inner.most:route")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ny = = 2\n", "SyntaxError: invalid syntax ({file}:2)"),
        ("x = 1\n\nprint(nothing)\n", "NameError: name 'nothing' is not defined"),
        ("import sys\n\n\nsys.exit('no\\nway')\n", "SystemExit: no way ({file}:4)"),
        ("import sys\nsys.exit()\n", "SystemExit ({file}:2)"),
        (
            "class Own(BaseException): ...\n\n\nraise Own('no')\n",
            "Own: no ({file}:4)",
        ),
        ("import no_such_anywhere\n", "named 'no_such_anywhere' ({file}:1)"),
        ("import json\n\njson.loads('{{')\n", "({file}:3)"),
        ("raise ValueError('\\x1b[31m')\n", r"ValueError: \x1b[31m ({file}:1)"),
        ("# coding: nonsense\n", "unknown encoding: nonsense"),
        ("a = 1\0\n", "null bytes"),
        ("class E(Exception):\n  __str__ = None\nraise E\n", "E ({file}:3)"),
    ],
)
def test_a_module_that_fails_is_a_line_with_its_place(
    write: Write, text: str, said: str
) -> None:
    file = write("routes_a.py", text.replace("{{", "{"))
    found = why_not("routes_a:route")
    assert found.startswith("routes_a can't be imported: ")
    assert said.format(file=file) in found
    assert why_not("routes_a:route", fresh=True) == found


def test_what_is_imported_and_fails_is_told_by_the_line_that_imports_it(
    write: Write,
) -> None:
    write("routes_helper.py", "x = 1\n\n1 / 0\n")
    file = write("routes_a.py", "x = 1\nimport routes_helper\n")
    said = why_not("routes_a:route")
    assert said.endswith(f"ZeroDivisionError: division by zero ({file}:2)")
    sys.modules.pop("routes_helper", None)
    helper = write("routes_helper.py", "x = = 1\n")
    assert f"({helper}:1)" in why_not("routes_a:route")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("nothing", "routes_a has no nothing; it has good, better"),
        ("good.deeper", "routes_a has no good.deeper; it has good, better"),
        ("plain", "plain is no coroutine function: write `async def`"),
        ("yields", "yields is a generator: it has a yield, and returns nothing"),
        ("VALUE", "VALUE is no function, but of the type int"),
        ("Class", "Class is no coroutine function: write `async def`"),
        ("two", "two can't be called with a connection alone: it takes (conn, more)"),
        ("none", "none can't be called with a connection alone: it takes ()"),
    ],
)
def test_what_is_no_route(write: Write, function: str, said: str) -> None:
    write(
        "routes_a.py",
        """
        VALUE = 3
        async def good(conn): ...
        async def better(conn, more=1): ...
        async def two(conn, more): ...
        async def none(): ...
        async def yields(conn): yield conn
        def plain(conn): ...
        class Class:
            async def __call__(self, conn): ...
        """,
    )
    assert why_not(f"routes_a:{function}").startswith(said)


def test_a_module_without_any_route_says_so(write: Write) -> None:
    write("routes_a.py", "from asyncio import sleep\n")
    said = "routes_a has no route, and no coroutine function (async def) at all"
    assert why_not("routes_a:route") == said


async def plain(conn: Any) -> Any:
    return conn.pool("plain")


class Called:
    async def __call__(self, conn: Any) -> Any:
        return conn.pool("called")

    async def method(self, conn: Any) -> Any:
        return conn.pool("method")

    @classmethod
    async def of_class(cls, conn: Any) -> Any:
        return conn.pool("class")

    @staticmethod
    async def static(conn: Any) -> Any:
        return conn.pool("static")


async def with_table(table: Any, /, conn: Any, *, name: str = "x") -> Any:
    return conn.pool("partial")


ROUTES: dict[str, Any] = {
    "plain": plain,
    "called": Called(),
    "method": Called().method,
    "class": Called.of_class,
    "static": Called.static,
    "partial": functools.partial(functools.partial(with_table, {}), name="y"),
}


@pytest.mark.parametrize("name", sorted(ROUTES))
def test_what_is_a_route(name: str) -> None:
    assert not_a_route(ROUTES[name]) == ""
    assert list(literal_pools(ROUTES[name])) == [name]


# -- pools that it names


async def several(conn: Any) -> Any:
    other = conn
    if await conn.peek(1):
        return conn.pool("ssh")
    if await conn.peek(2):
        return conn.pool(name="web") or conn.pool("ssh")
    for name in ("a", "b"):
        conn.pool(name), conn.pool(f"x{name}"), other.pool("not")
        conn.session.pool("not"), conn.facts.pool("not")
    return conn.pool()


def test_the_pools_that_a_route_names() -> None:
    found = literal_pools(several)
    assert list(found) == ["ssh", "web", "default"]
    first = several.__code__.co_firstlineno
    assert found["ssh"] == f"{__file__}:{first + 3}"


def test_a_route_without_source_names_none() -> None:
    space: dict[str, Any] = {}
    exec("async def route(conn):\n    return conn.pool('x')\n", space)
    assert literal_pools(space["route"]) == {}


def test_the_pools_of_a_source_that_was_read_anew(write: Write) -> None:
    write("routes_a.py", ROUTE.format("a"))
    assert list(literal_pools(load("routes_a:route"))) == ["a"]
    write("routes_a.py", "\n\n" + ROUTE.format("other"))
    assert list(literal_pools(load("routes_a:route", fresh=True))) == ["other"]
