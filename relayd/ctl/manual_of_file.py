"""relayd.toml(5), made from the table of settings."""

from __future__ import annotations

from collections.abc import Iterable

from relayd.configuring.address_settings import DEST, LISTEN
from relayd.configuring.file_values import FROM_FILE, Rows
from relayd.configuring.sections import KINDS, PROCESS_KEYS, RELAY_KEYS
from relayd.core.relay_names import EXPECTED
from relayd.core.settings import GROUPS
from relayd.ctl.roff import Page
from relayd.ctl.texts import default_in_words, explained, type_in_words
from relayd.operating.filtering import described_filters

EXAMPLE = """\
drain_timeout = "10s"

[defaults]
connect_timeout = "5s"

[tcp.web]
listen = ["8080", "[::1]:8081"]
dest = ["10.0.0.5:80", "10.0.0.6:80"]

[udp.dns]
listen = "127.0.0.1:5353"
dest = "9.9.9.9:53"

[socks4.office]
listen = "1080"
clients = ["allow 10.0.0.0/8"]
destinations = ["deny *:25", "allow 10.20.0.0/16"]
"""

#: The forms of values.
VALUES = (
    (
        "a time",
        (
            "A number of seconds, such as `5` or `0.25`, or a number with a unit, as a"
            ' string: `"250ms"`, `"10s"`, `"5m"`, `"1h"`. For most settings, 0 is'
            " never."
        ),
    ),
    (
        "a size",
        (
            "A number of bytes, or a number with a unit, as a string: `kB`, `MB`, `GB`"
            ' (1000 and so on), `KiB`, `MiB`, `GiB` (1024): `"64KiB"`, `"10MB"`.'
        ),
    ),
    (
        "an address",
        (
            "A string. A port (`8080`), an address and a port (`127.0.0.1:8080`,"
            " `[::1]:8080`), a name and a port (`localhost:8080`), a UNIX socket"
            " (`unix:/run/web`), the sockets that systemd passes by a name"
            " (`systemd:web`, to listen on), or a Twisted endpoint string"
            " (`ssl:8443:privateKey=key.pem`). A relay of `[udp]` has no UNIX sockets"
            " and no endpoint strings. A listener without a host listens on all"
            " addresses, IPv4 and IPv6; a server without one is this machine."
        ),
    ),
    (
        "a range of ports",
        (
            "An address with several ports, `5000-5100`. With a range of as many ports"
            " in `dest`, the first is relayed to the first, and so on; with one port"
            " there, all are relayed to that."
        ),
    ),
    (
        "a list",
        'Of strings: `["8080", "8081"]`. Where a list may be, one string may be, too.',
    ),
)

#: What may be said of one server, by its option.
OF_A_SERVER = {
    "weight": "Its share of the sessions, 0 to 256; 0 takes none. Default: 1.",
    "backup": "It is used while no other can be.",
    "max": "How many sessions it may have at once.",
    "name": "What the log and the metrics call it, before its address. Two servers of"
    " a pool with one address need one each.",
    "pool": "Which pool of its relay it is in. Default: `default`.",
    "disabled": "It is not used.",
    "check": "How it is checked, if not as its relay says.",
    "send-proxy": "The PROXY header for it, likewise.",
    "source": "The address from which it is dialled, likewise.",
    "interface": "The interface by which it is dialled, likewise.",
    "mark": "The firewall mark with which it is dialled, likewise.",
    "keepalive": "How its connections are kept alive, likewise.",
    "user-timeout": "How long it may leave bytes unacknowledged, likewise.",
}


def file_page() -> Page:
    page = Page("relayd.toml", 5, "configuration file of relayd")
    page.section("Description")
    page.text(
        "`twistd relayd --config` *FILE* reads its settings and its relays from a TOML"
        " file (https://toml.io). Keys of the whole process stand at the top,"
        " `[defaults]` has what every relay gets, and each relay is a table. The keys"
        " are the options of relayd(8), with underscores.",
    )
    page.example(EXAMPLE)
    page.text(
        "What is given on the command line overrides the file, and what a relay's table"
        " says overrides `[defaults]`. A setting that is given nowhere has its default."
        " Nothing starts with a file that is not valid: `relayctl check` says what is"
        " wrong with it. All problems of settings are told at once; those of filters,"
        " routes and the machine, once there are no others.",
        "If *FILE* is a folder, every `*.toml` in it is read, in the order of their"
        " names; a key, or a relay, may be in one of them only. If it is `-`, standard"
        " input is read as JSON: an object for each table.",
    )
    page.section("Values")
    page.items(VALUES)
    page.item(
        "rules",
        "Strings that begin with a word, in a list whose order matters: the first that"
        ' matches decides. `clients` has networks: `["allow 10.0.0.0/8"]`.'
        " `destinations` has networks or names, with ports if it is about some ports"
        ' only: `["deny *:25", "allow 10.20.0.0/16:80,443", "allow *.example.com",'
        ' "deny *"]`. A name matches what clients ask for by name; `*.example.com` is'
        " every name below that one, and `*` is every destination.",
    )
    page.item(
        "variables",
        "With `env = true` at the top, `${NAME}` in a string stands for a variable of"
        " the environment, which must exist, and `$$` for a dollar.",
    )
    page.item(
        "files of values",
        f"A key that ends in `{FROM_FILE}` names a file that has the values, one a"
        " line, for what is not to be in this one.",
    )
    page.section("Settings of the process")
    page.text("They stand at the top, before the first table.")
    page.item(
        "`env`",
        "Whether `${NAME}` in a string stands for a variable of the environment.",
        "True or false. Default: false.",
    )
    _keys(page, [(rows, "") for rows in PROCESS_KEYS.values()])
    page.text(
        "Settings whose names begin with `log_` may also stand in a table `[log]`,"
        " without that."
    )
    page.section("Relays")
    page.text(
        f"A relay has a name: {EXPECTED}. No two relays may have the same, of whatever"
        " kind. The log says which relay a line is about by its name.",
    )
    page.item(
        "`[tcp.`*NAME*`]`",
        "Relays connections, TCP or UNIX stream sockets: each to one of the servers of"
        " `dest`, in turn; or to where `sni` or a `route` leads it.",
    )
    page.item(
        "`[udp.`*NAME*`]`",
        "Relays datagrams. Each client has a flow, with a port of its own to one of the"
        " servers.",
    )
    page.item(
        "`[socks4.`*NAME*`]`",
        "A SOCKS4 and SOCKS4a proxy, whose clients choose the destination. One that"
        " other machines can reach needs `clients`, or `open = true`.",
    )
    page.item(
        "`[defaults]`",
        "What every relay gets whose kind has such a setting: any but `listen` and"
        " `dest`.",
    )
    page.section("Settings of relays")
    page.text("The kinds of relay that have a setting stand behind it.")
    _keys(page, _of_relays())
    page.section("Servers")
    page.text(
        "In `dest`, options stand behind the address of a server, each after a comma:"
        ' `"10.0.0.5:80,weight=3"`; one that is on or off needs no value:'
        ' `"10.0.0.7:80,backup"`. Or a server is a table, with underscores:'
        ' `{address = "10.0.0.5:80", weight = 3, backup = true}`.',
    )
    page.items((f"`{name}`", said) for name, said in OF_A_SERVER.items())
    page.section("Filters")
    _filters(page)
    page.section("See also")
    page.text("relayd(8), relayctl(1)")
    return page


def _filters(page: Page) -> None:
    page.text(
        "A filter sees the bytes of each session of its relay, or the datagrams of each"
        " flow, and may change, delay or end them. `filter` is one, or a list: what a"
        " client sends passes the first one first, and so does what its server sends.",
        "A filter is a name and options, as a string or as a table:"
        ' `"deny:pattern=secret,direction=up"` is the same as'
        ' `{name = "deny", pattern = "secret", direction = "up"}`.'
        " In a string, a value without a key is that of"
        r" the first option, `\,` is a comma and `\\` a backslash within a value; any"
        " other backslash belongs to the value. `direction` is `up` for what the client"
        " sends, and `down` for what the server sends; without it, a fault is on what"
        " the server sends, and any other filter on both.",
        "Bytes are text, in which `\\n`, `\\r`, `\\t`, `\\0`, `\\\\` and `\\xHH` stand"
        " for others; times are milliseconds, or have a unit. A package may bring"
        " filters of its own: classes that it names as entry points in the group"
        " `relayd.filters`.",
    )
    for each in described_filters():
        examples = " or ".join(f"`{example}`" for example in each.examples)
        # Lines may break between options.
        usage = each.usage.replace("[,", " [,")
        page.item(
            f"`{usage}` ({', '.join(each.kinds)})",
            each.said,
            f"Such as {examples}.",
        )
    page.text(
        "Those from `latency` on are faults, with the names and the meanings that"
        " Toxiproxy has, and have more options: `direction=up` or `direction=down`;"
        " `toxicity`, the part of the sessions that have it, from 0 to 1; and `seed`, a"
        " number, with which sessions of the same sequence number have the same faults"
        " in each run. When the settings of a relay change, faults are put on the"
        " sessions that go on, and taken off them; other filters are for new sessions."
    )


def _of_relays() -> list[tuple[Rows, str]]:
    """The rows of each key, with the kinds that have these."""
    found: dict[int, tuple[Rows, list[str]]] = {}
    for kind in KINDS:
        for rows in RELAY_KEYS[kind].values():
            found.setdefault(id(rows[0]), (rows, []))[1].append(kind)
    return [(rows, ", ".join(kinds)) for rows, kinds in found.values()]


def _keys(page: Page, keys: Iterable[tuple[Rows, str]]) -> None:
    """What each key does, by groups."""
    keys = list(keys)
    for group in GROUPS:
        own = [each for each in keys if each[0][0].group == group]
        if own:
            page.heading(group)
        for rows, kinds in own:
            row = rows[0]
            behind = f" ({kinds})" if kinds else ""
            kind = type_in_words(rows)
            said = kind[:1].upper() + kind[1:]
            if row in (LISTEN, DEST):
                about = f"{said}. Required."
            else:
                about = f"{said}. Default: {default_in_words(row)}."
            page.item(f"`{row.key}`{behind}", explained(row), about)
            if row.secret:
                page.item(
                    f"`{row.key}{FROM_FILE}`{behind}",
                    f"A file with the values of `{row.key}`, one a line.",
                )
