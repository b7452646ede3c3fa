r"""Writes manual pages: text with few marks becomes roff (groff_man(7)).

Text is plain, but for words between backticks, which are code and become bold, and
words between asterisks, which stand for something else and become italic.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import relayd

#: What a page begins with.
HEAD = r""".\" Made by `make man` from the table of settings and the help: edit those.
"""

_MARKED = re.compile(r"`([^`]+)`|\*([A-Za-z_.:-]+)\*")

#: Characters that roff would set as others, and a program would not take.
_AS_TYPED = {"-": r"\-", "'": r"\(aq", "^": r"\(ha", "~": r"\(ti", "`": r"\(ga"}


def plain(text: str) -> str:
    """Text in which roff finds nothing to do."""
    return text.replace("\\", r"\e")


def code(text: str) -> str:
    """What is typed as it is."""
    return _as_typed(plain(text))


def _as_typed(text: str) -> str:
    return "".join(_AS_TYPED.get(each, each) for each in text)


def line(text: str) -> str:
    """A line of text with marks; it is no request, whatever it begins with."""

    def replaced(found: re.Match[str]) -> str:
        if found[1]:
            return rf"\fB{_as_typed(found[1])}\fR"
        return rf"\fI{found[2]}\fR"

    made = _MARKED.sub(replaced, plain(text))
    return rf"\&{made}" if made[:1] in ("", ".", "'") else made


class Page:
    """One manual page.

    :param name: of what it is about.
    :param section: of the manual.
    :param summary: what it is, in a few words.
    """

    def __init__(self, name: str, section: int, summary: str) -> None:
        self.file = f"{name}.{section}"
        about = f'"" "relayd {relayd.__version__}" "Manual of relayd"'
        self._lines = [f".TH {name.upper()} {section} {about}"]
        self.section("Name")
        self._lines.append(rf"{name} \- {summary}")

    def section(self, title: str) -> None:
        self._lines.append(f".SH {title.upper()}")

    def heading(self, title: str) -> None:
        self._lines.append(f".SS {line(title)}")

    def text(self, *paragraphs: str) -> None:
        for each in paragraphs:
            self._lines += [".PP", line(each)]

    def item(self, term: str, *paragraphs: str) -> None:
        """A term, and what it means."""
        self._lines += [".TP", line(term), line(paragraphs[0])]
        for each in paragraphs[1:]:
            self._lines += [".IP", line(each)]

    def items(self, items: Iterable[tuple[str, str]]) -> None:
        for term, text in items:
            self.item(term, text)

    def example(self, text: str) -> None:
        """Lines that are shown as they are."""
        self._lines += [".PP", ".RS 4", ".EX"]
        for each in text.strip("\n").split("\n"):
            shown = code(each)
            self._lines.append(rf"\&{shown}" if shown[:1] == "." else shown)
        self._lines += [".EE", ".RE"]

    def __str__(self) -> str:
        return HEAD + "\n".join(self._lines) + "\n"
