"""Reads configuration files: TOML, a folder of them, or JSON from standard input.

Keys of the whole process stand at the top, `[defaults]` has what every relay gets, and
each relay is a table: `[tcp.NAME]`, `[udp.NAME]`, `[socks4.NAME]`.  The keys are the
options of the command line, with underscores.  :mod:`relayd.configuring.sections` reads
the tables; this finds the text, and puts several files together.

Everything that is wrong is told at once: what is found is in the layers' `problems`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import attrs

from relayd.configuring.file_values import shown
from relayd.configuring.given import Given, Layers, Place, RelaySection, key_of
from relayd.configuring.sections import Document, read_document
from relayd.configuring.texts import read_text, text_of

#: The longest file, in bytes: some fifty thousand relays.  Reading TOML takes a second
#: for a megabyte.
LONGEST = 8 << 20

#: The most parts that a key may have.  tomllib takes the square of their number.
_PARTS = 100

#: What may be a key without quotes.
_NO_KEY = re.compile(r"[^A-Za-z0-9_. \t-]+")

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
    return _together(documents, problems, STDIN if path == "-" else path)


def _tables(
    path: str, stdin: BinaryIO | None, problems: list[str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The name and the content of each file that can be read."""
    if path == "-":
        stream = stdin or getattr(sys.stdin, "buffer", None)
        if stream is None:
            problems.append(f"{STDIN}: can't be read: it is closed")
            return
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
    """A file; of a folder, those in it that are configuration, in order."""
    try:
        names = os.listdir(path)
    except OSError as problem:
        if problem.errno in (errno.ENOTDIR, errno.ENOENT):
            return [path]
        problems.append(f"{path}: can't be read: {problem.strerror}")
        return []
    found = [name for name in names if name.endswith(".toml") and name[0] != "."]
    if not found:
        problems.append(f"{path}: no *.toml in this folder")
    return [path / name for name in sorted(found)]


def _parsed(source: Path | BinaryIO) -> Mapping[str, Any]:
    """The content of a file.

    :raises OSError: it can't be read.
    :raises ValueError: it is too long, or not TOML, or not JSON.
    """
    if isinstance(source, Path):
        return _toml(read_text(source, LONGEST))
    found = json.loads(
        text_of(source, LONGEST),
        object_pairs_hook=_unique,
        parse_constant=_no_number,
        parse_int=_int,
    )
    if not isinstance(found, dict):
        raise ValueError("expected an object")
    return found


def _toml(text: str) -> Mapping[str, Any]:
    if any(part.count(".") > _PARTS for part in _NO_KEY.split(text)):
        raise ValueError(f"a key has more than {_PARTS} parts")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        # tomllib counts lines, but not up to the end.
        line, column = text.count("\n") + 1, len(text) - text.rfind("\n")
        end = f"(at line {line}, column {column}: the end)"
        raise ValueError(str(problem).replace("(at end of document)", end)) from None
    except ValueError:
        # Python does not read numbers of some thousand digits.
        raise ValueError("a number has too many digits") from None


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("a number has too many digits") from None


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} stands twice in one object")
        found[key] = value
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"found {text}, which is no number")


def _why(problem: Exception) -> str:
    """What is wrong with a text, in a line."""
    if isinstance(problem, RecursionError):
        return "too many tables within tables"
    text = str(problem)
    # As the other lines begin; but not a name.
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _together(
    documents: Sequence[Document], problems: list[str], source: str
) -> Layers:
    """The layers of several files; what two of them say is a problem."""
    process = _once([each.process for each in documents], problems)
    defaults = _once([each.defaults for each in documents], problems)
    relays = [each for document in documents for each in document.relays]
    faulty = {key for document in documents for key in document.faulty}
    if faulty:
        relays = [attrs.evolve(each, faulty={*each.faulty, *faulty}) for each in relays]
    relays = _each_once(relays, problems)
    return Layers(process, relays, problems=problems, defaults=defaults, source=source)


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
