"""Reads configuration files: TOML, a folder of them, or JSON from standard input.

Keys of the whole process stand at the top, `[defaults]` has what every relay gets, and
each relay is a table: `[tcp.NAME]`, `[udp.NAME]`, `[socks4.NAME]`.  The keys are the
options of the command line, with underscores.  :mod:`relayd.configuring.sections` reads
the tables; this finds the text, and puts several files together.

Everything that is wrong is told at once: what is found is in the layers' `problems`.
"""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import attrs

from relayd.configuring.given import Given, Layers, Place, RelaySection, key_of
from relayd.configuring.sections import Document, read_document

#: The longest file, in bytes: a hundred thousand relays.
LONGEST = 32 << 20

#: What standard input is called.
STDIN = "standard input"


def read_layers(
    path: str,
    stdin: BinaryIO | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Layers:
    """Read what a file, a folder, or standard input (`-`) gives.

    :param stdin: standard input, unless given.
    :param environ: for `${NAME}`.
    :return: with `problems`, if there are any; it raises nothing.
    """
    problems: list[str] = []
    documents: list[Document] = []
    for name, tables in _tables(path, stdin, problems):
        document = read_document(tables, name, environ)
        documents.append(document)
        problems += document.problems
    return _together(documents, problems)


def _tables(
    path: str, stdin: BinaryIO | None, problems: list[str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The name and the content of each file that can be read."""
    if path == "-":
        stream = sys.stdin.buffer if stdin is None else stdin
        sources = [(STDIN, stream)]
    else:
        sources = [(str(each), each) for each in _files(Path(path), problems)]
    for name, source in sources:
        try:
            yield name, _parsed(source)
        except OSError as problem:
            problems.append(f"{name}: can't be read: {problem.strerror}")
        except (ValueError, RecursionError) as problem:
            problems.append(f"{name}: {_why(problem)}")


def _files(path: Path, problems: list[str]) -> list[Path]:
    if not path.is_dir():
        return [path]
    try:
        found = sorted(each for each in path.glob("*.toml") if each.name[0] != ".")
    except OSError as problem:
        problems.append(f"{path}: can't be read: {problem.strerror}")
        return []
    if not found:
        problems.append(f"{path}: no *.toml in this folder")
    return found


def _parsed(source: Path | BinaryIO) -> Mapping[str, Any]:
    """The content of a file.

    :raises OSError: it can't be read.
    :raises ValueError: it is too long, or not TOML, or not JSON.
    """
    if isinstance(source, Path):
        with source.open("rb") as stream:
            return tomllib.loads(_text(stream))
    found = json.loads(
        _text(source), object_pairs_hook=_unique, parse_constant=_no_number
    )
    if not isinstance(found, dict):
        raise ValueError("expected an object")
    return found


def _text(stream: BinaryIO) -> str:
    content = stream.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise ValueError(f"longer than {LONGEST >> 20} MiB")
    return content.decode()


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice in one object")
        found[key] = value
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _why(problem: Exception) -> str:
    """What is wrong with a text, in a line."""
    if isinstance(problem, UnicodeDecodeError):
        return f"not UTF-8 at byte {problem.start}"
    if isinstance(problem, RecursionError):
        return "too many tables within tables"
    text = str(problem)
    return text[:1].lower() + text[1:]


def _together(documents: Sequence[Document], problems: list[str]) -> Layers:
    """The layers of several files; what two of them say is a problem."""
    process = _once([each.process for each in documents], problems)
    defaults = _once([each.defaults for each in documents], problems)
    relays = []
    for document in documents:
        for relay in document.relays:
            own = [each for each in defaults if relay.kind in each.setting.kinds]
            relays.append(attrs.evolve(relay, given=[*own, *relay.given]))
    return Layers(process, _each_once(relays, problems), problems=problems)


def _once(parts: Sequence[Sequence[Given]], problems: list[str]) -> list[Given]:
    """What several files give, each key by one of them."""
    first: dict[str, Given] = {}
    found: list[Given] = []
    for part in parts:
        for each in part:
            other = first.setdefault(key_of(each.setting), each)
            if other.place == each.place:
                found.append(each)
            else:
                problems.append(f"{each.place}: given by {other.place.file} already")
    return found


def _each_once(
    relays: Sequence[RelaySection], problems: list[str]
) -> list[RelaySection]:
    """The relays; one that two files have is a problem."""
    first: dict[Place, RelaySection] = {}
    found = []
    for each in relays:
        where = Place("", each.place.path)
        other = first.setdefault(where, each)
        if other is each:
            found.append(each)
        else:
            problems.append(f"{each.place}: given by {other.place.file} already")
    return found
