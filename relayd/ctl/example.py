"""The example of a configuration file, made from the table of settings.

Every setting stands in it once, with what it does and its default: those of the process
at the top, what several kinds of relay have in `[defaults]`, and the rest with a relay
of the kind that has it.  Those that would contradict others, or whose default only
words can say, are commented out.  The file is valid as it is.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from relayd.configuring.address_settings import DEST, LISTEN
from relayd.configuring.file_values import FROM_FILE, Rows
from relayd.configuring.readable import default_of
from relayd.configuring.sections import (
    DEFAULTS_KEYS,
    PROCESS_KEYS,
    RELAY_KEYS,
)
from relayd.core.setting_types import Count, IPv4, Kind, Setting
from relayd.core.settings import GROUPS
from relayd.ctl.texts import default_in_words, explained, literal

HEAD = """\
# A configuration file of relayd, with every setting in it.  A setting that is left out
# has its default, so a file may be short: a relay needs `listen` and `dest`, no more.
# Each value here is the default, unless the lines above it name another.
#
#   relayctl check relayd.toml      says what is wrong with it
#   relayctl show relayd.toml       shows what is in effect, and why
#   twistd -n --pidfile= relayd --config relayd.toml
#
# Times are seconds, or have a unit: "250ms", "10s", "5m", "1h".  Sizes are bytes, or
# have one: "64KiB", "10MB".  The manual is relayd.toml(5).
"""

ENV = """\
# Whether ${NAME} in a value stands for a variable of the environment.
env = false
"""

DEFAULTS = """\
# What every relay gets, unless its own table says otherwise.
[defaults]
"""

#: The relays of the example: what is said of each, its table, and what it is given.
RELAYS: tuple[tuple[Kind, str, str, Mapping[str, Any]], ...] = (
    (
        "tcp",
        "web",
        (
            "Clients of port 8080 are relayed to two servers in turn.  The name of a"
            " relay (small letters, digits, - and _) is what the log calls it."
        ),
        {"listen": ["8080", "[::1]:8081"], "dest": ["10.0.0.5:80", "10.0.0.6:80"]},
    ),
    (
        "udp",
        "dns",
        "UDP datagrams, here to a name server.",
        {"listen": "127.0.0.1:5353", "dest": "9.9.9.9:53"},
    ),
    (
        "socks4",
        "office",
        (
            "A SOCKS4 and SOCKS4a proxy.  One that other machines can reach needs"
            " `clients`, or `open = true`."
        ),
        {
            "listen": "1080",
            "clients": ["allow 10.0.0.0/8"],
            "destinations": ["deny *:25", "allow 10.20.0.0/16"],
        },
    ),
)

#: Values for settings that have none by default.
_SAMPLES: Mapping[str, Any] = {
    "clients": ["deny 192.0.2.7", "allow 192.0.2.0/24", "allow unix"],
    "hours": ["Mon-Fri 08:00-18:00 Europe/Berlin", "Sat 10:00-14:00 Europe/Berlin"],
    "max_connects_per_client": "100/60",
    "client_prefix": "24,56",
    "bandwidth": "10MB",
    "bandwidth_per_client": "up=1Mbit,down=8Mbit",
    "bandwidth_per_session": "512KiB",
    "send_proxy": "v2",
    "check": "http://:8008/primary",
    "source": ["192.0.2.1", "2001:db8::1"],
    "interface": "eth1",
    "mark": 31,
    "intercept": ["192.0.2.1:80,443,from=10.0.0.0/8,by=tproxy"],
    "keepalive": "30,10,3",
    "accept_proxy": ["192.0.2.0/28"],
    "access_log": "/var/log/relayd/access.log",
    "metrics": "127.0.0.1:9100",
    "control": "unix:/run/relayd/control.sock",
    "control_uid": [1000],
    "control_read_uid": [1001],
    "userid": ["alice", "bob"],
    "filter": ["latency:100ms,jitter=20ms", "bandwidth:1000"],
    "route": "myroutes:route",
    "sni": ["www.example.com=10.0.0.7:443", "*.example.com=default"],
    "resolve_every": "30s",
    "dial_timeout": "30s",
    "max_descriptors": 65536,
    "max_flows_per_client": 100,
    "max_handshakes": 1000,
    "max_handshakes_per_client": 100,
}

#: What would contradict another line of the example.
_CONTRADICTING = frozenset({"open", "userid"})


def example() -> str:
    """The text of the file."""
    parts = [HEAD, *_grouped(PROCESS_KEYS, {}), ENV]
    shared = {key: rows for key, rows in DEFAULTS_KEYS.items() if _is_shared(key)}
    parts += [DEFAULTS, *_grouped(shared, {})]
    for kind, name, said, given in RELAYS:
        own = {
            key: rows
            for key, rows in RELAY_KEYS[kind].items()
            if key not in shared or key in given
        }
        parts += [f"{_comment(said)}\n[{kind}.{name}]\n", *_grouped(own, given)]
    return "\n".join(parts)


def _is_shared(key: str) -> bool:
    return sum(key in keys for keys in RELAY_KEYS.values()) > 1


def _grouped(keys: Mapping[str, Rows], given: Mapping[str, Any]) -> Iterator[str]:
    """The settings of a table, below the headings of the help."""
    for group in GROUPS:
        own = [rows for rows in keys.values() if rows[0].group == group]
        if own:
            yield f"# -- {group}\n"
        for rows in own:
            yield "\n".join(_lines(rows, given)) + "\n"


def _lines(rows: Rows, given: Mapping[str, Any]) -> Iterator[str]:
    row = rows[0]
    default = default_of(row)
    text = explained(row)
    if row not in (LISTEN, DEST) and (row.key in given or default in (None, [])):
        text += f" Default: {default_in_words(row)}."
    yield _comment(text)
    if row.key in given:
        yield f"{row.key} = {literal(given[row.key])}"
    elif default is None or default == [] or row.key in _CONTRADICTING:
        value = default if row.is_flag else sample(row)
        yield f"# {row.key} = {literal(value)}"
    else:
        yield f"{row.key} = {literal(default)}"
    if row.secret:
        yield _comment("Or a file that has them, one a line:")
        yield f'# {row.key}{FROM_FILE} = "/etc/relayd/{row.key}s"'


def sample(row: Setting[Any]) -> Any:
    """A value for a setting that has none by default."""
    if row.key in _SAMPLES:
        return _SAMPLES[row.key]
    if isinstance(row.type, Count):
        return min(row.type.maximum, 10_000)
    if isinstance(row.type, IPv4):
        return "192.0.2.1"
    return [row.type.placeholder] if row.repeatable else row.type.placeholder


def _comment(text: str) -> str:
    lines: Iterable[str] = textwrap.wrap(text, 86, break_on_hyphens=False)
    return "\n".join(f"# {line}" for line in lines)
