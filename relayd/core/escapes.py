r"""Texts with escapes: of bytes that are written as text, and of words in a log.

Bytes are written as UTF-8, with the escapes \n, \r, \t, \0, \\ and \xHH.

What a command line has that is not UTF-8 is the bytes that it is.
"""

from __future__ import annotations

import re

_ESCAPE = re.compile(r"\\(x[0-9A-Fa-f]{2}|.|\Z)", re.DOTALL)
_ESCAPED = {"n": b"\n", "r": b"\r", "t": b"\t", "0": b"\0", "\\": b"\\"}


def one_word(text: str, special: str = " '\"") -> str:
    """A text of a stranger's, or of somebody's own code, as one word of a log line.

    As it is, or quoted as Python does it, with escapes for what is no printable ASCII,
    and for blanks: these divide the fields of a line.

    :param special: characters for which it is quoted.
    """
    if text.isascii() and text.isprintable() and not set(text) & set(special):
        return text
    return ascii(text).replace(" ", "\\x20")


class Words(str):
    """A text that is one word of a line of text (:func:`one_word`), and itself in JSON.

    A line is made with :meth:`__format__`, which knows no width.
    """

    __slots__ = ()

    def __format__(self, _: str) -> str:
        return one_word(self)


class Placeholder(str):
    """What a line of text has for nothing; JSON leaves it out (:data:`NOTHING`).

    A text that is the same says so itself, as a stranger may have chosen it.
    """

    __slots__ = ()

    def __str__(self) -> str:
        # A fact that was turned into text is a placeholder still.
        return self


NOTHING = Placeholder("-")


def read_escapes(text: str, also: str = "") -> bytes:
    r"""The bytes of a text with escapes.

    :param also: a character that may stand behind a backslash and means itself, as `"`
        where texts stand in quotes.
    :raises ValueError: a backslash that begins no escape.
    """
    made, at = bytearray(), 0
    for match in _ESCAPE.finditer(text):
        made += text[at : match.start()].encode(errors="surrogateescape")
        code = match[1]
        if len(code) == 3:
            made += bytes.fromhex(code[1:])
        elif code in _ESCAPED:
            made += _ESCAPED[code]
        elif code and code == also:
            made += code.encode()
        else:
            quote = rf", \{also}" if also else ""
            raise ValueError(
                rf"\{code} is no escape: expected \n, \r, \t, \0, \\{quote} or \xHH"
            )
        at = match.end()
    return bytes(made + text[at:].encode(errors="surrogateescape"))
