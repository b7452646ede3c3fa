"""Makes the filters of a relay of what its operator wrote.

A name is one of relayd's own (:mod:`relayd.filters.built_in`), or of an entry point in
the group `relayd.filters`, by which a package brings a class of its own::

    [project.entry-points."relayd.filters"]
    louder = "louder:Louder"

A class is a factory of filters (:class:`relayd.core.filtering.FilterFactory`); its
parameters are the options (:mod:`relayd.filters.parameters`).  Whatever is wrong is a
line: for people who write options, and of packages that may raise anything.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

import attrs

from relayd.core.errors import ConfigError
from relayd.core.filter_spec import FilterSpec
from relayd.core.filtering import FilterFactory, IFilterFactory
from relayd.core.setting_types import Kind
from relayd.filters.built_in import BUILT_IN
from relayd.filters.parameters import Parameter, parameters_of

#: The group of entry points in which packages bring filters.
GROUP: Final = "relayd.filters"

#: How much alike two names are, from 0 to 1, if one is taken for the other.
_NEAR = 0.6

#: The longest text that a line quotes whole.
_QUOTED = 200

#: What a factory overrides that serves streams, and datagrams; and what those are.
_STREAMS = "build_filter", "connections"
_DATAGRAMS = "build_datagram_filter", "datagrams"


def filters_of(specs: Iterable[FilterSpec], kind: Kind) -> tuple[IFilterFactory, ...]:
    """The filters of a relay, in order.

    :param kind: of the relay.
    :raises ConfigError: some can't be made: a line for each.
    """
    made, problems = [], []
    for each in specs:
        try:
            made.append(filter_of(each, kind))
        except ConfigError as problem:
            problems.append(str(problem))
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(made)


def filter_of(spec: FilterSpec, kind: Kind) -> IFilterFactory:
    """One filter.

    :raises ConfigError: it can't be made; one line, which begins with the filter.
    """
    try:
        found = kind_of(spec.name)
        _check_kind(found, kind)
        made: IFilterFactory = _made(found, _read(found, spec))
        if not getattr(made, "name", ""):
            # As its operator calls it.  It may be frozen, or have no place for a name.
            with suppress(AttributeError, TypeError):
                object.__setattr__(made, "name", spec.name)
        return made
    except _Problem as problem:
        text = str(spec)
        shown = text if len(text) <= _QUOTED else text[:_QUOTED] + "..."
        words = " ".join(str(problem).split())
        # What it quotes may be from a terminal, or a stranger's.
        why = "".join([c if c.isprintable() else ascii(c)[1:-1] for c in words])
        raise ConfigError(f"filter {shown!r}: {why}") from problem.__cause__


class _Problem(Exception):
    """What is wrong with a filter, in a line."""


@attrs.frozen
class FilterKind:
    """A class of filters, by its name.

    :ivar package: that brings it; empty for relayd.
    :ivar made_by: its class.
    :ivar parameters: its options.
    """

    name: str
    package: str
    made_by: type[Any]
    parameters: Sequence[Parameter]

    def serves(self, kind: Kind) -> bool:
        """Whether relays of a kind can have it: it overrides what those call."""
        return self._overrides(*(_DATAGRAMS if kind == "udp" else _STREAMS))

    def _overrides(self, method: str, what: str) -> bool:
        found = getattr(self.made_by, method, None)
        return found is not None and found is not getattr(FilterFactory, method)

    @property
    def served(self) -> Sequence[str]:
        """What it is for: connections, datagrams, or both."""
        return [each[1] for each in (_STREAMS, _DATAGRAMS) if self._overrides(*each)]

    def usage(self, but: Collection[str] = ()) -> str:
        """How it is written, with its options; what may be left out in brackets.

        :param but: options that are said elsewhere.
        """
        parts = [self.name]
        for each in self.parameters:
            if each.name in but:
                continue
            begin = f",{each.name}="
            if each is self.parameters[0]:
                begin = f":[{each.name}=]"
            part = f"{begin}{each.placeholder}"
            parts.append(part if each.required else f"[{part}]")
        return "".join(parts)


# -- which there are


@functools.cache
def brought() -> Mapping[str, Sequence[EntryPoint]]:
    """The entry points of packages, by the names of filters.

    Looked for once: what is installed later takes a restart, as all code does.
    """
    found: dict[str, list[EntryPoint]] = {}
    for each in entry_points(group=GROUP):
        found.setdefault(each.name, []).append(each)
    return found


def names() -> list[str]:
    """The names of all filters that there are."""
    return [*BUILT_IN, *sorted(set(brought()) - set(BUILT_IN))]


def kind_of(name: str) -> FilterKind:
    """The class of filters of a name.

    Raises what :func:`filter_of` makes a line of.
    """
    entries = brought().get(name, ())
    packages = [_package(each) for each in entries]
    if name in BUILT_IN:
        if packages:
            raise _Problem(
                f"{packages[0]} brings one of this name, too, which is relayd's own:"
                " uninstall it, or name its filter otherwise"
            )
        return own_kind(name)
    if not entries:
        raise _Problem(f"there is no such filter; {_advice(name, names())}")
    if len(packages) > 1:
        raise _Problem(
            f"{' and '.join(packages)} bring one of this name each: uninstall one"
        )
    return _kind(name, packages[0], *_imported(entries[0].value, packages[0]))


def own_kind(name: str) -> FilterKind:
    """One that comes with relayd, whatever packages bring."""
    return _kind(name, "", *_imported(BUILT_IN[name].where, "relayd"))


def _package(entry: EntryPoint) -> str:
    """The package that an entry point is of, with its version."""
    dist = entry.dist
    return "a package" if dist is None else f"the package {dist.name} {dist.version}"


def _imported(where: str, package: str) -> Any:
    module, _, name = where.partition(":")
    try:
        found: Any = importlib.import_module(module.strip())
        for each in filter(None, name.strip().split(".")):
            found = getattr(found, each)
    except (Exception, SystemExit) as problem:
        # A module of somebody else's may raise anything.
        raise _Problem(
            f"{where} of {package} can't be imported: {_said(problem)}"
        ) from problem
    return (where, found)


def _kind(name: str, package: str, where: str, found: Any) -> FilterKind:
    methods = (_STREAMS[0], _DATAGRAMS[0])
    if not isinstance(found, type) or not any(hasattr(found, m) for m in methods):
        raise _Problem(f"{where} of {package} is no class of filter factories")
    try:
        return FilterKind(name, package, found, parameters_of(found))
    except (TypeError, ValueError) as problem:
        raise _Problem(f"{where} of {package or 'relayd'}: {problem}") from problem


def _check_kind(found: FilterKind, kind: Kind) -> None:
    if not found.served:
        raise _Problem(f"it has neither {_STREAMS[0]} nor {_DATAGRAMS[0]} of its own")
    if not found.serves(kind):
        what = " and ".join(found.served)
        raise _Problem(f"it is for {what}, not for a relay of {kind}")


# -- options


def _read(found: FilterKind, spec: FilterSpec) -> dict[str, Any]:
    """The arguments for a class, of what was written."""
    parameters = {each.name: each for each in found.parameters}
    arguments: dict[str, Any] = {}
    for number, (key, value) in enumerate(spec.options.items()):
        name = key or next(iter(parameters), "")
        if not parameters:
            raise _Problem("it has no options")
        if name not in parameters:
            raise _Problem(_unknown(name, value, list(parameters), first=not number))
        if name in arguments:
            raise _Problem(f"{name} is given twice")
        try:
            arguments[name] = parameters[name].read(value)
        except (ValueError, ConfigError) as problem:
            shown = repr(value)[:_QUOTED]
            raise _Problem(f"bad {name} {shown}: {problem}") from problem
    for name, each in parameters.items():
        if each.required and name not in arguments:
            raise _Problem(_missing(found, each))
    return arguments


def _unknown(key: str, value: object, known: Sequence[str], *, first: bool) -> str:
    why = f"it has no {key!r}; {_advice(key, known)}"
    if first and isinstance(value, str):
        why += f"; if {key}=... is the value itself, write {known[0]}={key}=..."
    return why


def _missing(found: FilterKind, parameter: Parameter) -> str:
    written = f"{parameter.name}={parameter.placeholder}"
    if parameter is found.parameters[0]:
        return f"it needs a value: {found.name}:{parameter.placeholder}, or {written}"
    return f"it needs {written}"


def _advice(name: str, known: Sequence[str]) -> str:
    """The nearest of several names, or all of them."""
    word = name.lower().replace("-", "_")
    near = difflib.get_close_matches(word, known, 1, _NEAR)
    if near:
        return f"did you mean {near[0]}?"
    *others, last = known
    return f"there are {', '.join(others)} and {last}" if others else f"there is {last}"


# -- making


def _made(found: FilterKind, arguments: Mapping[str, Any]) -> Any:
    try:
        return found.made_by(**arguments)
    except (ValueError, ConfigError) as problem:
        # The validators of attrs have more in them than their words.
        words = problem.args[0] if problem.args else type(problem).__name__
        raise _Problem(str(words)) from problem
    except (Exception, SystemExit) as problem:
        by = found.package or "relayd"
        raise _Problem(f"{_said(problem)} (in {by})") from problem


def _said(problem: BaseException) -> str:
    """An exception in a line."""
    if isinstance(problem, OSError) and problem.strerror:
        where = f"{problem.filename}: " if problem.filename is not None else ""
        return f"{where}{problem.strerror}"
    return f"{type(problem).__name__}: {problem}".removesuffix(": ")
