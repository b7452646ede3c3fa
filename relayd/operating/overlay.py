"""What was said while a process runs, over what its file says.

An overlay is never changed: each change makes another one, so that a change that can't
be had leaves everything as it was.  It has settings, as they would stand in the file,
and the operator's word about servers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import attrs

from relayd.configuring.address_settings import DEST
from relayd.configuring.given import Given, Layers, Place, RelaySection, key_of
from relayd.configuring.route_settings import SNI
from relayd.configuring.sections import RELAY_KEYS, key_in, read_settings
from relayd.configuring.server_options import ADDRESS, split, text_of
from relayd.configuring.written import as_toml, values
from relayd.control.steering import Json
from relayd.core.setting_types import Kind, Setting
from relayd.operating.server_words import NOTHING, Said

#: In place of what is secret.
HIDDEN = "***"

#: Where a setting comes from that was said while the process runs.
RUN_TIME = "run time"


class Entry(NamedTuple):
    """Where the settings of a relay name a server.

    :ivar key: `dest`, or `sni`.
    :ivar number: of the entry in that list.
    """

    key: str
    number: int


@attrs.frozen(eq=False)
class Overlay:
    """All that was said.

    :ivar settings: by relay and key.
    :ivar servers: by relay, and the server's name, or its label.
    """

    settings: Mapping[str, Mapping[str, Sequence[Given]]] = attrs.field(factory=dict)
    servers: Mapping[str, Mapping[str, Said]] = attrs.field(factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self.settings.values())) + sum(
            (each.word is not None) + (each.weight is not None)
            for said in self.servers.values()
            for each in said.values()
        )

    @property
    def given(self) -> Mapping[str, Sequence[Given]]:
        """The settings of each relay, as :attr:`Layers.now` has them."""
        return {
            name: [each for given in keys.values() for each in given]
            for name, keys in self.settings.items()
        }

    def over(self, layers: Layers) -> Layers:
        """What a file says, and these over it."""
        return attrs.evolve(layers, now=self.given)

    def with_settings(
        self, relay: str, kind: Kind, said: Mapping[str, Any]
    ) -> tuple[Overlay, list[str]]:
        """The same, and what is said now of one relay.

        :param said: by key, as a file has it; None: nothing any more.
        :return: and what is wrong with it, a line each.
        """
        place = Place(RUN_TIME, f"{kind}.{relay}")
        given, problems = read_settings(kind, said, place)
        again = {key_in(kind, key) for key in said}
        own = {
            key: found
            for key, found in self.settings.get(relay, {}).items()
            if key not in again
        }
        for each in given:
            own[key_of(each.setting)] = [*own.get(key_of(each.setting), ()), each]
        settings = {**self.settings, relay: own}
        if not own:
            del settings[relay]
        return attrs.evolve(self, settings=settings), problems

    def with_word(self, relay: str, server: str, said: Said) -> Overlay:
        """The same, and what is said now of one server."""
        own = {**self.servers.get(relay, {}), server: said}
        if said == NOTHING:
            del own[server]
        servers = {**self.servers, relay: own}
        if not own:
            del servers[relay]
        return attrs.evolve(self, servers=servers)

    def only(self, there: Mapping[str, Kind], before: Mapping[str, Kind]) -> Overlay:
        """The same without what is about relays that there are no more.

        One of another kind is another relay.

        :param there: the kinds of those that there are, by their names.
        :param before: likewise of those that there were.
        """
        stays = {name for name, kind in there.items() if before.get(name) == kind}
        return Overlay(
            {name: keys for name, keys in self.settings.items() if name in stays},
            {name: said for name, said in self.servers.items() if name in stays},
        )

    def others(self, before: Overlay) -> set[str]:
        """The relays of which other settings were said before."""
        there, were = self.settings, before.settings
        return {each for each in {*there, *were} if there.get(each) != were.get(each)}

    # -- shown

    def differences(
        self, layers: Layers, called: Mapping[str, Mapping[str, Sequence[Entry]]]
    ) -> Iterator[Json]:
        """Each thing that is said, beside what the file says.

        :param layers: of the file.
        :param called: as :meth:`as_toml` takes it.
        """
        sections = {each.name: each for each in layers.sections}
        for relay, keys in self.settings.items():
            section = sections[relay]
            for key, given in keys.items():
                before = dict(values(section.all(key), section.kind)).get(key)
                now = dict(values(given, section.kind)).get(key)
                rows = RELAY_KEYS[section.kind][key]
                yield {
                    "relay": relay,
                    "server": None,
                    "key": key,
                    "file": shown(rows[0], before),
                    "now": shown(rows[0], now),
                }
        for relay, said in self.servers.items():
            # Others may be in their places: then the file says nothing of them.
            own = self.settings.get(relay, {})
            for server, each in said.items():
                in_file: Json = {}
                for key, number in called.get(relay, {}).get(server, ())[:1]:
                    if key not in own:
                        in_file = _options(sections[relay].all(key)[number])
                for key, now in (("state", each.word), ("weight", each.weight)):
                    if now is not None:
                        yield {
                            "relay": relay,
                            "server": server,
                            "key": key,
                            "file": in_file.get(key),
                            "now": now,
                        }

    def as_toml(
        self, layers: Layers, called: Mapping[str, Mapping[str, Sequence[Entry]]]
    ) -> str:
        """The file as it would be with all this in it.

        :param called: by relay and the name of a server: where the settings name it.
            A word about another one is written as a comment: one whom a name has
            brought, or that is gone.
        """
        notes = []
        relays = []
        for section in self.over(layers).sections:
            name = section.name or ""
            said = dict(self.servers.get(name, {}))
            lists = {key: section.all(key) for key in (DEST.key, SNI.key)}
            for server in [each for each in said if each in called.get(name, {})]:
                word = said.pop(server)
                for key, number in called[name][server]:
                    lists[key][number] = _told(lists[key][number], word)
            notes += [
                f"# {name}: {server}: {_words(each)}; the settings have no such server:"
                " it is gone, or a name has brought it"
                for server, each in said.items()
            ]
            given = [each for each in section.given if each.setting.key not in lists]
            given += [each for own in lists.values() for each in own]
            relays.append(attrs.evolve(section, given=given))
        text = as_toml(
            attrs.evolve(layers, relays=relays, defaults=(), every=(), now={})
        )
        return "".join(f"{note}\n" for note in notes) + text


def _words(said: Said) -> str:
    weight = None if said.weight is None else f"weight={said.weight}"
    return ", ".join(filter(None, (said.word, weight)))


def _options(dest: Given) -> Json:
    """What a destination itself says of the server, in the operator's words."""
    plain = dest.plain
    if not isinstance(plain, dict):
        _, written = split(str(plain))
        found = (each.partition("=") for each in written)
        plain = {key: value if equals else True for key, equals, value in found}
    options: Json = {"state": "disabled"} if plain.get("disabled") is True else {}
    if "weight" in plain:
        options["weight"] = int(plain["weight"])
    return options


def _told(dest: Given, said: Said) -> Given:
    """A destination with the operator's word among its options."""
    options: dict[str, Any] = {}
    if said.word is not None:
        options["disabled"] = said.word != "up"
    if said.weight is not None:
        options["weight"] = said.weight
    plain = dest.plain
    if isinstance(plain, dict):
        return attrs.evolve(dest, plain={**plain, **options})
    address, written = split(str(plain))
    left = [each for each in written if each.partition("=")[0] not in options]
    table = {ADDRESS: ",".join([address, *left]), **options}
    return attrs.evolve(dest, plain=text_of(table))


def shown(row: Setting[Any], value: Any) -> Any:
    """A value, for whoever may see all and change nothing."""
    return HIDDEN if row.secret and value not in (None, []) else value


def section_of(layers: Layers, relay: str) -> RelaySection:
    """All that was given for a relay.

    :raises LookupError: there is none of this name.
    """
    return layers.whole(next(each for each in layers.relays if each.name == relay))
