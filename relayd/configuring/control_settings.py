"""The rows of the table of settings for the control socket."""

from __future__ import annotations

import pwd
from contextlib import suppress
from typing import Any, ClassVar

import attrs

from relayd.configuring.address_grammar import UnixPath, parse_listener
from relayd.core.errors import ConfigError
from relayd.core.setting_types import ALL_KINDS, Setting, Written, rows_in
from relayd.core.settings import CONTROL as GROUP

_EXPECTED = (
    "the whole path of a UNIX socket, of at most 107 bytes, such as"
    " unix:/run/relayd/control.sock"
)


def _unix_path(text: str) -> UnixPath:
    where = None
    if text.startswith("unix:"):
        # What is wrong with the path is in what is expected, which names the option.
        with suppress(ConfigError):
            where = parse_listener(text)
    if not isinstance(where, UnixPath):
        raise ValueError(f"expected {_EXPECTED}; there is no other kind")
    return where


@attrs.frozen
class User:
    """A user of this machine: a name, or a number; kept as the number.

    Names are looked up as they are read.
    """

    #: The highest that Linux has; one more stands for none.
    maximum: ClassVar[int] = 2**32 - 2
    placeholder: ClassVar[str] = "USER"

    # A setting's value is several of them.
    def parse(self, text: str) -> Any:
        if text.isascii() and text.isdigit() and len(text) <= 10:
            return self.load(int(text))
        if not text or "\0" in text:
            raise ValueError(f"expected {self.describe()}")
        try:
            return pwd.getpwnam(text).pw_uid
        except (KeyError, UnicodeEncodeError):
            raise ValueError("this machine has no such user") from None

    def load(self, value: object) -> Any:
        if isinstance(value, str):
            return self.parse(value)
        if type(value) is not int or not 0 <= value <= self.maximum:
            raise ValueError(f"expected {self.describe()}")
        return value

    def describe(self) -> str:
        return f"the name of a user, or a number from 0 to {self.maximum}"

    def show(self, value: int) -> str:
        return str(value)


CONTROL = Setting[UnixPath | None](
    name="control",
    type=Written("unix:PATH", _unix_path, _EXPECTED),
    default=None,
    otherwise="none",
    help="Open a control socket here, by which relayctl shows and steers what runs."
    " Root, and the user that relayd runs as, may use it.",
    kinds=ALL_KINDS,
    group=GROUP,
    process=True,
)
CONTROL_UID = Setting[tuple[int, ...]](
    name="control-uid",
    type=User(),
    default=(),
    help="Let this user use the control socket, too; may be repeated.",
    in_file="Let these users use the control socket, too.",
    kinds=ALL_KINDS,
    group=GROUP,
    field="control_uids",
    repeatable=True,
    process=True,
)
CONTROL_READ_UID = Setting[tuple[int, ...]](
    name="control-read-uid",
    type=User(),
    default=(),
    help="Let this user see everything by the control socket, and change nothing; may"
    " be repeated.",
    in_file="Let these users see everything by the control socket, and change nothing.",
    kinds=ALL_KINDS,
    group=GROUP,
    field="control_read_uids",
    repeatable=True,
    process=True,
)

#: All of them, in the order of the help.
TABLE: tuple[Setting[Any], ...] = rows_in(globals())
