"""Who may be served: what contradicts itself or does nothing is told in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from relayd.configuring.config import Relay, Socks4Relay, UdpRelay
from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.core.errors import CannotStart, ConfigError
from relayd.tap import relayd, socks4

TCP = ("-l", "8080", "-d", "10.0.0.5:80")
UDP = ("-l", "udp:53", "-d", "udp:10.0.0.5:53")


def refusal(*words: str, proxy: bool = False) -> str:
    """What a command line is refused for, which is one line."""
    command = socks4.Options() if proxy else relayd.Options()
    with pytest.raises(CannotStart) as caught:
        command.parseOptions(words)
    message = str(caught.value)
    assert message.isprintable()
    return message.partition(": ")[2]


def in_file(tmp_path: Path, text: str) -> str:
    """What a file is refused for, without its name."""
    path = tmp_path / "relayd.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        configure(read_layers(str(path)))
    return str(caught.value).replace(f"{path}: ", "")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (
            ("--allow-client", "10.0.0.1/8"),
            (
                "bad --allow-client '10.0.0.1/8': '10.0.0.1/8' has bits beyond its"
                " prefix: you may mean 10.0.0.0/8"
            ),
        ),
        (
            ("--deny-client", "lan"),
            (
                "bad --deny-client 'lan': 'lan' does not appear to be an IPv4 or IPv6"
                " network; expected an address or a network such as 192.168.0.0/16"
            ),
        ),
        (("--hours", ""), "bad --hours '': expected hours such as"),
        (
            ("--hours", "08:00-18:00 Mars/Base"),
            "bad --hours '08:00-18:00 Mars/Base': unknown zone 'Mars/Base'",
        ),
        (("--max-sessions", "0"), "bad --max-sessions '0': expected a number from 1"),
        (
            ("--max-sessions-per-client=-1",),
            "bad --max-sessions-per-client '-1': expected a number from 1",
        ),
        (
            ("--max-connects-per-client", "0/60"),
            (
                "bad --max-connects-per-client '0/60': expected a number and seconds,"
                " such as 10/1, 100/60 or 1000/1h; neither of them 0"
            ),
        ),
        (("--max-connects-per-client", "10"), "bad --max-connects-per-client '10'"),
        (("--client-prefix", "24"), "bad --client-prefix '24': expected the lengths"),
        (("--queue-timeout", "0"), "bad --queue-timeout '0': expected seconds"),
        (("--max-age", "-1"), "bad --max-age '-1': expected seconds"),
        (
            ("--queue", "5"),
            "--queue '5' does nothing alone: give --max-sessions, too",
        ),
        (
            ("--max-sessions", "5", "--queue-timeout", "5"),
            "--queue-timeout '5' does nothing alone: give --queue, too",
        ),
        (
            ("--client-prefix", "24,56"),
            (
                "--client-prefix '24,56' does nothing alone: give"
                " --max-sessions-per-client or --max-connects-per-client or"
                " --bandwidth-per-client"
            ),
        ),
        (("--hours-end",), "--hours-end does nothing alone: give --hours, too"),
    ],
)
def test_bad_options(words: tuple[str, ...], why: str) -> None:
    """The same for relays and for proxies."""
    assert refusal(*TCP, *words).startswith(why)
    assert refusal(*words, proxy=True).startswith(why)


def test_a_rule_file_with_one_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "rules"
    path.write_text("10.0.0.0/8\n# more\n10.0.0.1/24\n")
    line = (
        f"{str(path)!r}, line 3: '10.0.0.1/24' has bits beyond its prefix: you may mean"
        " 10.0.0.0/24"
    )
    why = refusal(*TCP, "--deny-client", f"@{path}")
    assert why == f"bad --deny-client '@{path}': {line}"
    why = in_file(tmp_path, f'[tcp.a]\nlisten="1"\ndest="2"\nclients=["deny @{path}"]')
    assert why.startswith("tcp.a.clients[0]: 'deny @")
    assert why.endswith(f": {line}")


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("--max-sessions=5", ": a UDP relay has --max-flows"),
        ("--max-sessions-per-client=5", ": a UDP relay has --max-flows-per-client"),
        ("--max-age=5", ": a UDP relay has --udp-timeout"),
        ("--queue=5", ""),
        ("--half-close=off", ""),
    ],
)
def test_what_is_not_for_datagrams(tmp_path: Path, option: str, instead: str) -> None:
    """Where all relays are for those; in a file, in the table of one."""
    name, _, value = option.partition("=")
    why = refusal(*UDP, option)
    assert why == f"{name} {value!r} is not for datagrams{instead}"
    relayd.Options().parseOptions([*UDP, *TCP, "--max-sessions=9", option])
    key = name.removeprefix("--").replace("-", "_")
    why = in_file(tmp_path, f'[udp.a]\nlisten="1"\ndest="2"\n{key}="{value}"')
    assert why.startswith(f"udp.a.{key}: no such key; ")
    if instead:
        other = instead.rpartition("--")[2].replace("-", "_")
        assert why.endswith(f"a UDP relay has {other}")


def test_clients_of_unix_sockets_need_a_rule_of_their_own(tmp_path: Path) -> None:
    """Where others are named; or their listener would serve nobody."""
    unix = ("-l", "unix:/run/s", "-d", "10.0.0.5:80")
    assert refusal(*unix, "--allow-client", "10.0.0.0/8") == (
        "--listen 'unix:/run/s' would serve nobody: no rule is about clients of UNIX"
        " sockets. Give --allow-client unix, too"
    )
    assert in_file(
        tmp_path,
        '[tcp.a]\nlisten="unix:/run/s"\ndest="2"\nclients=["allow 10.0.0.0/8"]',
    ).endswith('Give clients = ["allow unix"], too')
    for more in (("--allow-client", "unix"), ("--deny-client", "unix")):
        relayd.Options().parseOptions([*unix, "--allow-client", "10.0.0.0/8", *more])
    relayd.Options().parseOptions([*unix, "--deny-client", "10.0.0.0/8"])


def test_what_a_prefix_is_for(tmp_path: Path) -> None:
    """Any limit of one client; those that the kind of the relay has are named."""
    for limit in (
        "--max-sessions-per-client=5",
        "--max-connects-per-client=5/1",
        "--bandwidth-per-client=1MB",
    ):
        relayd.Options().parseOptions([*TCP, "--client-prefix", "24,56", limit])
    udp = '[udp.a]\nlisten="1"\ndest="2"\nclient_prefix="24,56"'
    assert in_file(tmp_path, udp) == (
        "udp.a.client_prefix: client_prefix = '24,56' does nothing alone: give"
        " max_connects_per_client or bandwidth_per_client or balance ="
        ' "client-hash", too'
    )
    # As a command line for both kinds is written, whose limit one of them can't have.
    tcp = udp.replace("udp.a", "tcp.b") + "\nmax_sessions_per_client=1\n"
    path = tmp_path / "both.toml"
    path.write_text(tcp + udp)
    configure(read_layers(str(path)))
    assert in_file(tmp_path, tcp.replace("24,56", "9,9") + udp).startswith("udp.a")


def test_defaults_may_be_for_some_relays_only(tmp_path: Path) -> None:
    defaults = '[defaults]\nqueue_timeout=5\nclient_prefix="24,56"\n'
    one = '[tcp.a]\nlisten="1"\ndest="2"\n'
    more = "max_sessions=1\nqueue=1\nmax_sessions_per_client=1\n"
    path = tmp_path / "relayd.toml"
    path.write_text(f'{defaults}{one}{more}[udp.b]\nlisten="1"\ndest="2"')
    configure(read_layers(str(path)))
    # A file may have what is the default.
    path.write_text(f'[defaults]\nqueue_timeout="30s"\n{one}')
    configure(read_layers(str(path)))
    assert in_file(tmp_path, defaults + one).splitlines() == [
        (
            "defaults.queue_timeout: queue_timeout = '5' does nothing alone: give"
            " queue, too"
        ),
        (
            "defaults.client_prefix: client_prefix = '24,56' does nothing alone: give"
            " max_sessions_per_client or max_connects_per_client or"
            ' bandwidth_per_client or balance = "client-hash", too'
        ),
    ]


def test_rules_that_deny_never_replace_open() -> None:
    """Nobody has said who may come."""
    why = refusal("-l", "1080", "--deny-client", "10.0.0.1", proxy=True)
    assert why.startswith("--listen '1080' would be an open proxy")
    options = socks4.Options()
    options.parseOptions(["-l", "1080", "--deny-client", "10.0.0.1", "--open"])
    [proxy] = options.config.relays
    assert isinstance(proxy, Socks4Relay)
    assert [each.text for each in proxy.admission.clients] == ["10.0.0.1"]


def test_options_hold_for_all_relays_of_a_command_line(tmp_path: Path) -> None:
    """In their order, wherever they stand; and replace a list of the file's."""
    options = relayd.Options()
    rules = ("--deny-client", "10.0.0.1", "--allow-client", "10.0.0.0/8")
    hours = ("--hours", "08:00-12:00", "--hours", "14:00-18:00")
    options.parseOptions([*TCP, *rules, *UDP, *hours, "--max-sessions", "5"])
    tcp, udp = options.config.relays
    assert isinstance(tcp, Relay)
    assert isinstance(udp, UdpRelay)
    for relay in (tcp, udp):
        clients = [(each.allow, each.text) for each in relay.admission.clients]
        assert clients == [(False, "10.0.0.1"), (True, "10.0.0.0/8")]
        assert [each.text for each in relay.admission.hours] == [
            *("08:00-12:00", "14:00-18:00"),
        ]
    assert tcp.admission.max_sessions == 5
    path = tmp_path / "relayd.toml"
    path.write_text('[tcp.a]\nlisten="1"\ndest="2"\nclients=["allow 192.0.2.0/24"]\n')
    options = relayd.Options()
    options.parseOptions(["--config", str(path), *rules])
    [relay] = options.config.relays
    assert [each.text for each in relay.admission.clients] == [
        *("10.0.0.1", "10.0.0.0/8"),
    ]
