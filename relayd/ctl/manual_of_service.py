"""relayd(8), made from the table of settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from relayd.configuring.address_settings import RELAYD, SOCKS4
from relayd.core.setting_types import Setting
from relayd.core.settings import GROUPS
from relayd.ctl.roff import Page

#: Options and other words of a command line, in a help.
_CODE = re.compile(r"(--[a-z0-9-]*[a-z0-9]|\bnet\.[a-z0-9_.]+[a-z0-9]|\b[\w.]+:\d+\b)")

#: Command lines, each with what it does.
EXAMPLES = (
    (
        "Every connection to port 8080 goes to example.com, port 80:",
        "twistd -n --pidfile= relayd --listen 8080 --dest example.com:80",
    ),
    (
        "To two servers in turn:",
        "twistd -n --pidfile= relayd -l 8080 -d 10.0.0.5:80 -d 10.0.0.6:80",
    ),
    (
        "A name server's datagrams, and its TCP:",
        "twistd -n --pidfile= relayd -l udp:53 -d udp:9.9.9.9:53 -l 53 -d 9.9.9.9:53",
    ),
    (
        "TLS clients of one name to one server, and all others to another:",
        "twistd -n --pidfile= relayd -l 443 --sni a.example.com=a:443 --sni =b:443",
    ),
    (
        "What a file says:",
        "twistd -n --pidfile= relayd --config /etc/relayd/relayd.toml",
    ),
    (
        "A SOCKS4 proxy for a network:",
        "twistd -n --pidfile= socks4 --listen 1080 --allow-client 192.168.0.0/16",
    ),
)


def service_page() -> Page:
    page = Page("relayd", 8, "relay TCP connections and UDP datagrams, and SOCKS4")
    page.section("Synopsis")
    begin = "`twistd -n --pidfile=`"
    page.text(
        f"{begin} `relayd` `--listen` *ADDRESS* `--dest` *ADDRESS* ...",
        f"{begin} `relayd` `--config` *FILE*",
        f"{begin} `socks4` [`--listen` *ADDRESS*] [`--allow-client` *CIDR*] ...",
    )
    page.section("Description")
    page.text(
        "relayd relays traffic at layer 4: what a client sends to a listener goes to a"
        " server, and what the server answers goes to the client, unchanged. It is two"
        " plugins of twistd(1): `relayd` for TCP and UNIX stream connections, and UDP"
        " datagrams; `socks4`, a SOCKS4 and SOCKS4a proxy. With a file (relayd.toml(5))"
        " `relayd` serves all of them in one process.",
        "`--pidfile=` keeps twistd from writing `twistd.pid` into the current folder,"
        " and from refusing to start where it finds one. `-n` keeps it in the"
        " foreground.",
        "Each `--listen` opens a relay, and each `--dest` after it is a server of that"
        " relay; so is each that a `--sni` after it leads to.",
    )
    page.section("Addresses")
    page.items(
        (
            ("`8080`, `:8080`", "A port, on all addresses, IPv4 and IPv6."),
            (
                "`127.0.0.1:8080`, `[::1]:8080`, `localhost:8080`",
                (
                    "An address, or a name, and a port. Port 0 picks a free port, which"
                    " the log shows."
                ),
            ),
            ("`5000-5100`, `10.0.0.5:5000-5100`", "Each of these ports."),
            ("`unix:/run/web`", "A UNIX socket."),
            (
                "`udp:53`, `udp:127.0.0.1:53`, `udp:[::1]:53`",
                "Datagrams.",
            ),
            (
                "`systemd:web`, `udp:systemd:dns`",
                (
                    "To listen on: the sockets that systemd passes by this name"
                    " (systemd.socket(5), `FileDescriptorName=`)."
                ),
            ),
            (
                "`tcp:8080:interface=127.0.0.1`, `tls:example.com:443`",
                "A Twisted endpoint string.",
            ),
        )
    )
    page.text("A destination without a host is this machine.")
    page.section("Options of relayd")
    _options(page, RELAYD)
    page.section("Options of socks4")
    shared = [f"`--{row.option}`" for row in SOCKS4 if row in RELAYD]
    page.text(f"Of those above, it has {', '.join(shared)}. Its own are:")
    _options(page, [row for row in SOCKS4 if row not in RELAYD])
    page.section("Signals")
    page.items(
        (
            (
                "`SIGTERM`, `SIGINT`",
                (
                    "Stop accepting, and let sessions finish for `--drain-timeout`. A"
                    " second one ends relayd at once."
                ),
            ),
            ("`SIGUSR1`", "Reopen the files of the log."),
            (
                "`SIGHUP`",
                (
                    "Reads the file again, if there is one, as `relayctl reload` does;"
                    " a file with an error changes nothing. Ends nothing, unless the"
                    " terminal has closed."
                ),
            ),
        )
    )
    page.section("Exit status")
    page.items(
        (
            ("`0`", "It was told to stop, and has."),
            ("`1`", "It could not start; lines on standard error say why."),
        )
    )
    page.section("Examples")
    for said, command in EXAMPLES:
        page.text(said)
        page.example(command)
    page.section("See also")
    page.text("relayd.toml(5), relayctl(1), twistd(1), systemd.socket(5)")
    return page


def _options(page: Page, rows: Sequence[Setting[Any]]) -> None:
    """What each option does, by groups."""
    for group in GROUPS:
        own = [row for row in rows if row.group == group]
        if own:
            page.heading(group)
        for row in own:
            short = f"`-{row.short}`, " if row.short else ""
            words = row.type.placeholder
            if "|" in words:
                value = "=" + "|".join(f"`{each}`" for each in words.split("|"))
            else:
                value = "=" + re.sub("[A-Z]+", r"*\g<0>*", words) if words else ""
            text = row.option_help
            if row.shown_default:
                text += f" Default: {row.shown_default.rstrip('.')}."
            page.item(f"{short}`--{row.option}`{value}", _CODE.sub(r"`\1`", text))
