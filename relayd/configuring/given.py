"""What was given, and where: on a command line, or in a file.

Both become the same: a list of :class:`Given` for the process, and a
:class:`RelaySection` for each relay.  From these the settings are made
(:mod:`relayd.configuring.configure`), and they can be written as a file
(:mod:`relayd.configuring.written`).  Where something was given also says how errors
speak of it: `--idle-timeout '5'` or `idle_timeout = '5'`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import attrs

from relayd.core.setting_types import Kind, Plain, Ratio, Seconds, Setting
from relayd.core.settings import ENABLED

#: From here up, a file has a number with an exponent.
_MANY_DIGITS = 1e15


@attrs.frozen
class Place:
    """Where something was given.

    :ivar file: the name of the file; empty for the command line.
    :ivar path: of the key in it, such as `tcp.web.listen`.
    """

    file: str = ""
    path: str = ""

    def __str__(self) -> str:
        if not self.file:
            return "the command line"
        return f"{self.file}: {self.path}" if self.path else self.file

    @property
    def prefix(self) -> str:
        """What an error begins with."""
        return f"{self}: " if self.file else ""

    def below(self, key: str) -> Place:
        """A key of the table that is here."""
        return Place(self.file, f"{self.path}.{key}" if self.path else key)

    def option(self, setting: Setting[Any]) -> str:
        """What a setting is called here."""
        if not self.file:
            return f"--{setting.option}"
        return setting.key or setting.name

    def example(self, setting: Setting[Any], value: str = "") -> str:
        """A setting as one would give it here, for advice."""
        if not self.file:
            return f"--{setting.option} {value}".rstrip()
        if not value:
            return f"{setting.key} = true"
        said = f"{setting.word} {value}".lstrip()
        return (
            f'{setting.key} = ["{said}"]'
            if setting.word
            else f'{setting.key} = "{said}"'
        )


COMMAND_LINE = Place()

#: The value of a list that was given with nothing in it.
NOTHING = ()


@attrs.frozen(eq=False)
class Given:
    """A setting that was given.

    :ivar text: as it was written.
    :ivar value: what that is.
    :ivar place: where.
    :ivar plain: as a file would have it.
    """

    setting: Setting[Any]
    text: str
    value: Any
    place: Place = COMMAND_LINE
    plain: Plain = attrs.field()

    @plain.default
    def _find_plain(self) -> Plain:
        if not isinstance(self.value, int | float):
            said = f"{self.setting.word} {self.text}"
            return said if self.setting.word else self.text
        value: float = self.value
        whole = isinstance(self.setting.type, Seconds | Ratio) and value.is_integer()
        return int(value) if whole and value < _MANY_DIGITS else value

    @classmethod
    def of(cls, setting: Setting[Any], text: str) -> Given:
        """One of the command line.

        :raises ConfigError: the text is not valid.
        """
        return cls(setting, text, setting.parse(text))

    def __str__(self) -> str:
        """How an error speaks of it."""
        if self.setting.is_flag:
            return self.place.option(self.setting)
        if self.place.file:
            return f"{self.place.option(self.setting)} = {self.text!r}"
        return f"{self.place.option(self.setting)} {self.text!r}"


@attrs.frozen(eq=False)
class RelaySection:
    """What was given for one relay.

    :ivar name: None: it is to be numbered.
    :ivar given: in order; of several for one key, the last place has the say.
    :ivar place: where the relay was given.
    :ivar faulty: the keys whose values could not be read, which was told.
    """

    kind: Kind
    name: str | None
    given: Sequence[Given]
    place: Place = COMMAND_LINE
    faulty: Collection[str] = ()

    def all(self, key: str) -> list[Given]:
        """What has the say for a key: one, or several of a list, or none."""
        found = [each for each in self.given if key_of(each.setting) == key]
        return [
            each
            for each in found
            if each.place == found[-1].place and each.value != NOTHING
        ]

    def one(self, setting: Setting[Any]) -> Given | None:
        """What has the say for a setting that is not repeatable, or None."""
        found = self.all(key_of(setting))
        return found[-1] if found else None

    @property
    def enabled(self) -> bool:
        """Whether it listens once the process runs."""
        given = self.one(ENABLED)
        return ENABLED.default if given is None else bool(given.value)

    @property
    def effective(self) -> Iterator[Given]:
        """What has the say."""
        for key in dict.fromkeys(key_of(each.setting) for each in self.given):
            yield from self.all(key)


@attrs.frozen(eq=False)
class Layers:
    """Everything that was given for one process.

    :ivar process: the settings that are about the whole process; the last of each has
        the say.
    :ivar relays: in their order.
    :ivar defaults: what each relay gets, if its kind has it, unless it says otherwise.
    :ivar every: what each relay gets besides, if its kind has it: it has the say.
    :ivar problems: what could not be read, a line each.
    :ivar source: the file that was read, or the folder; empty for the command line.
    :ivar now: by the name of a relay, what was said while it runs: it has the say.
    """

    process: Sequence[Given]
    relays: Sequence[RelaySection]
    every: Sequence[Given] = ()
    problems: Sequence[str] = ()
    defaults: Sequence[Given] = ()
    source: str = ""
    now: Mapping[str, Sequence[Given]] = attrs.field(factory=dict)

    def over(self, below: Layers) -> Layers:
        """These, where they have the say over others; relays of both."""
        return Layers(
            [*below.process, *self.process],
            [*below.relays, *self.relays],
            [*below.every, *self.every],
            [*below.problems, *self.problems],
            [*below.defaults, *self.defaults],
            self.source or below.source,
            {**below.now, **self.now},
        )

    @property
    def sections(self) -> list[RelaySection]:
        """The relays, each with all that was given for it."""
        return [self.whole(each) for each in self.relays]

    @property
    def of_process(self) -> RelaySection:
        """What was given for the process, as that for a relay: of a list, the last
        place has the say.
        """
        return RelaySection("tcp", None, self.process)

    def whole(self, relay: RelaySection) -> RelaySection:
        """A relay with what each of its kind gets."""
        below, above = (
            [each for each in given if relay.kind in each.setting.kinds]
            for given in (self.defaults, self.every)
        )
        now = self.now.get(relay.name or "", ())
        return attrs.evolve(relay, given=[*below, *relay.given, *above, *now])


def key_of(setting: Setting[Any]) -> str:
    """What settings that override each other have in common."""
    return setting.key or setting.name
