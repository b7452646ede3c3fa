"""Finds the route that an operator has named, `MODULE:FUNCTION`, and reads it anew.

A module is executed from its source, which is compiled each time: what Python keeps of
it (`.pyc`) is told by its time in seconds, and may be of a version before.  A module
that is read anew is a new one.  If that fails, the one before is whole, and goes on;
if not, it takes its place once all is well::

    loader = Loader(fresh=True)
    route = loader.load(RouteSpec("myroutes", "route"))
    loader.commit()

Only what is named is read anew: modules that it imports stay as they are, those of its
own package included.  Two routes of one module share it.  Whatever is wrong is a line,
with the file and the line in it.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import linecache
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

from relayd.core.errors import ConfigError
from relayd.core.route_spec import DEFAULT, RouteSpec

#: The most functions that a line names.
_MOST_NAMED: Final = 5


class Loader:
    """Finds routes, and executes each of their modules once.

    :param fresh: modules that are there already are executed anew.
    """

    def __init__(self, *, fresh: bool = False) -> None:
        self._fresh = fresh
        #: By name: what was executed, or why it could not be.
        self._modules: dict[str, ModuleType | str] = {}

    def load(self, spec: RouteSpec) -> Callable[..., Any]:
        """The route of this name.

        :raises ConfigError: there is none; one line.
        """
        found: Any = self._module(spec)
        for each in spec.function.split("."):
            try:
                found = getattr(found, each)
            except KeyboardInterrupt:
                # An operator's Ctrl-C.
                raise
            except BaseException:
                raise ConfigError(
                    f"route {spec}: {spec.module} has no {spec.function}"
                    f"{_others(self._module(spec))}"
                ) from None
        if why := not_a_route(found):
            raise ConfigError(f"route {spec}: {spec.function} {why}")
        route: Callable[..., Any] = found
        return route

    def commit(self) -> None:
        """What was executed is from now on what others import."""
        for name, module in self._modules.items():
            if isinstance(module, ModuleType):
                sys.modules[name] = module
                parent, _, last = name.rpartition(".")
                if parent in sys.modules:
                    setattr(sys.modules[parent], last, module)

    def _module(self, spec: RouteSpec) -> ModuleType:
        name = spec.module
        found = self._modules.get(name)
        if found is None:
            here = None if self._fresh else sys.modules.get(name)
            found = self._modules[name] = here or self._execute(spec)
        if isinstance(found, str):
            raise ConfigError(f"route {spec}: {found}")
        return found

    def _execute(self, spec: RouteSpec) -> ModuleType | str:
        """Execute a module anew; or why it can't be."""
        name = spec.module
        importlib.invalidate_caches()
        try:
            found = _find(name)
        except ModuleNotFoundError as problem:
            missing = problem.name or name
            if name.startswith(f"{missing}."):
                # One of the packages that it is to be in.
                return _there_is_no(missing)
            return _said(problem, name, "")
        except KeyboardInterrupt:
            # An operator's Ctrl-C.
            raise
        except BaseException as problem:
            return _said(problem, name, "")
        if found is None:
            return _there_is_no(name)
        file = found.origin or ""
        before = sys.modules.get(name)
        try:
            code = _code(found)
            if code is None:
                # It has no source: it stays as it is.
                return importlib.import_module(name)
            module = importlib.util.module_from_spec(found)
            for inner, each in list(sys.modules.items()):
                # Of a package: importing them again would not set them.
                if inner.rpartition(".")[0] == name:
                    setattr(module, inner.rpartition(".")[2], each)
            # For what looks for a class by the name of its module.
            sys.modules[name] = module
            exec(code, module.__dict__)  # noqa: S102
        except KeyboardInterrupt:
            # An operator's Ctrl-C.
            raise
        except BaseException as problem:
            return _said(problem, name, file)
        finally:
            if before is not None:
                sys.modules[name] = before
            else:
                sys.modules.pop(name, None)
            linecache.checkcache(file)
        return module


def _there_is_no(name: str) -> str:
    return (
        f"there is no module {name}; it is looked for where Python looks, such as"
        " PYTHONPATH"
    )


def _find(name: str) -> ModuleSpec | None:
    """Where a module is, whether it is loaded or not."""
    parent = name.rpartition(".")[0]
    path = None
    if parent:
        path = getattr(importlib.import_module(parent), "__path__", None)
        if path is None:
            return None
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        found: ModuleSpec | None = find(name, path) if find is not None else None
        if found is not None:
            return found
    return None


def _code(found: ModuleSpec) -> Any:
    """A module, compiled from its source; None: it has none."""
    loader: Any = found.loader
    if not hasattr(loader, "get_source"):
        return None
    if found.origin is not None and hasattr(loader, "get_data") and found.has_location:
        if not found.origin.endswith(".py"):
            return None
        return compile(loader.get_data(found.origin), found.origin, "exec", 0, True)
    source = loader.get_source(found.name)
    return source and compile(source, found.origin or found.name, "exec", 0, True)


def _said(problem: BaseException, name: str, file: str) -> str:
    """Why a module can't be imported, in a line."""
    what = type(problem).__name__
    if isinstance(problem, SyntaxError) and problem.filename:
        words, where = str(problem.msg), f"{problem.filename}:{problem.lineno}"
    else:
        words, where = _text(problem), _line_of(problem, file)
    words = " ".join(f"{what}: {words}".removesuffix(": ").split())
    words = "".join([c if c.isprintable() else ascii(c)[1:-1] for c in words])
    return f"{name} can't be imported: {words:.300}{where and f' ({where})'}"


def _text(problem: BaseException) -> str:
    try:
        return str(problem)
    except KeyboardInterrupt:
        # An operator's Ctrl-C.
        raise
    except BaseException:
        return ""


def _line_of(problem: BaseException, file: str) -> str:
    """The line of a file in which something was raised; or else the last of all."""
    lines = traceback.extract_tb(problem.__traceback__)
    ours = [each for each in lines if each.filename == file]
    inner = ours or [each for each in lines if each.filename != __file__]
    inner = [each for each in inner if not each.filename.startswith("<frozen ")]
    return f"{inner[-1].filename}:{inner[-1].lineno}" if inner else ""


def _others(module: ModuleType) -> str:
    """The routes that a module has, in a few words."""
    names = [
        name
        for name, each in vars(module).items()
        if inspect.iscoroutinefunction(each)
        and getattr(each, "__module__", None) == module.__name__
    ]
    if not names:
        return ", and no coroutine function (async def) at all"
    return f"; it has {', '.join(names[:_MOST_NAMED])}"


# -- what a route is


def not_a_route(found: Any) -> str:
    """Why something is no route; empty if it is one."""
    called = _called(found)
    if not callable(found):
        return f"is no function, but of the type {type(found).__name__}"
    if inspect.isasyncgenfunction(called):
        return "is a generator: it has a yield, and returns nothing"
    if not inspect.iscoroutinefunction(called):
        return "is no coroutine function: write `async def`"
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(object())
    except TypeError:
        return f"can't be called with a connection alone: it takes {signature}"
    return ""


def _called(found: Any) -> Any:
    """The function of something that is called: of an object, its `__call__`."""
    while isinstance(found, functools.partial):
        found = found.func
    if inspect.isroutine(found) or isinstance(found, type):
        return found
    return type(found).__call__ if callable(found) else found


def literal_pools(route: Any) -> Mapping[str, str]:
    """The pools that a route names in its source, as in `conn.pool("ssh")`.

    :return: by name: where that is, `FILE:LINE`.  Empty if its source is not known.
    """
    function = inspect.unwrap(_called(route))
    function = getattr(function, "__func__", function)
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
        file = inspect.getsourcefile(function) or "?"
    except (OSError, TypeError, SyntaxError):
        return {}
    parameter = _parameter(route, function)
    found: dict[str, str] = {}
    for line, name in sorted(_pools_in(tree, parameter)):
        found.setdefault(name, f"{file}:{first + line - 1}")
    return found


def _parameter(route: Any, function: Any) -> str:
    """What a route calls its connection."""
    try:
        for each in inspect.signature(route).parameters.values():
            if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD):
                return each.name
    except (TypeError, ValueError):
        pass
    return ""


def _pools_in(tree: ast.AST, parameter: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=owner), attr="pool"),
                args=args,
                keywords=keywords,
            ) if owner == parameter:
                said = [*args, *(each.value for each in keywords if each.arg == "name")]
                if not said and not keywords:
                    yield node.lineno, DEFAULT
                for each in said[:1]:
                    if isinstance(each, ast.Constant) and isinstance(each.value, str):
                        yield node.lineno, each.value
