"""The benchmark's results as Markdown and JSON."""

from __future__ import annotations

import json
import re
import socket

from bench.page import json_text, markdown, table
from tests.tools.results import DATAGRAMS, PROXIES, TITLES, full_results, run_facts


def test_a_table_is_markdown() -> None:
    assert table(["", "a"], [["x", "1"]]) == "|  | a |\n| --- | --- |\n| x | 1 |"


def test_the_page_has_figures_ratios_growth_and_limits() -> None:
    text = markdown(run_facts(), full_results(), TITLES)
    assert "| bulk, 1 stream, CPU ms per GB | 2 (1-3) | 4 (2-6) |" in text
    assert "### Compared with HAProxy with splice" in text
    assert "| request and response | 0.50 |" in text
    assert "| relayd, plane | 2.0 (1.0-3.0) | 2.0 (1.0-3.0) |" in text
    assert "| bulk, 1 stream: to HAProxy, splice | 0.500 | at most 1 | ok |" in text
    assert "in 3 rounds with 7 windows each, which last about 0.4 s" in text
    assert "Abacus, 2 cores" in text
    assert "\n\nNot measured: relayd, other Python: there is none.\n\n" in text
    assert "haproxy 2.6.12" in text


def test_sessions_that_are_logged_come_before_quiet_ones() -> None:
    """The default is the headline; and it is said what the ratios depend on."""
    text = markdown(run_facts(), full_results(), TITLES)
    rows = re.findall(r"^\| (short, .*), CPU µs \|", text, re.MULTILINE)
    assert rows == [
        f"short, {side} closes first, {how}"
        for how in ("all log", "quiet")
        for side in ("server", "client")
    ]
    _, _, compared = text.partition("### Compared with HAProxy with splice")
    assert "ratios depend on the processor" in compared.partition("\n|")[0]


def test_the_page_has_the_proxies_in_a_section_of_their_own() -> None:
    text = markdown(run_facts(), full_results(), {**TITLES, **PROXIES})
    others, _, rest = text.partition("### SOCKS4")
    proxies, _, rest = rest.partition("### UDP")
    _, _, limits = rest.partition("### Limits")
    assert "Dante" not in others
    assert "|  | relayd, plane | relayd, SOCKS4 | Dante |" in proxies
    assert "| SOCKS4, short session, all log, CPU µs | - | 2 (1-3) | 8 (" in proxies
    assert "| SOCKS4, bulk | 0.25 | - | 0.50 |" in proxies
    for how, bound in (("all log", 0.5), ("quiet", 0.5)):
        limit = f"| SOCKS4, short session, {how}: to Dante | 0.250 | at most {bound} |"
        assert limit in limits


def test_the_page_has_datagrams_in_a_section_of_their_own() -> None:
    text = markdown(run_facts(), full_results(), {**TITLES, **PROXIES, **DATAGRAMS})
    others, _, rest = text.partition("### UDP")
    datagrams, _, limits = rest.partition("### Limits")
    assert "nginx stream, UDP" not in others
    assert "|  | relayd, UDP | nginx stream, UDP |" in datagrams
    assert "| UDP, 1 flow of 32, CPU µs | 2.00 (1.00-3.00) | 4.00 " in datagrams
    assert "|  | to nginx stream | to a relay in Twisted |" in datagrams
    assert "| UDP, 500 flows of 1 | 0.50 | - |" in datagrams
    assert "| UDP, 50 bursts of 4, 5,000 flows in turn | 0.50 | - |" in datagrams
    assert "| UDP, delivered: to nginx stream | 0.500 | at least 1 | MISSED |" in limits
    assert "| UDP: 5,000 flows to 50 | 1.000 | at most 1.3 | ok |" in limits


def test_the_page_has_what_many_relays_take_in_a_section_of_their_own() -> None:
    text = markdown(run_facts(), full_results(), {**TITLES, **PROXIES, **DATAGRAMS})
    others, _, rest = text.partition("### Operating many relays")
    operating, _, limits = rest.partition("### Limits")
    assert "scrape" not in others
    assert "|  | relayd, plane |\n" in operating
    assert "a machine with\nnothing else to do" in operating
    assert "| scrape, 1,000 relays, ms | 2.0 (1.0-3.0) |" in operating
    assert "1,000 relays: longest request without it, ms | 2.0 (1.0-3.0) |" in operating
    assert "| relayctl check, 1,000 relays, CPU s | 2.00 (1.00-3.00) |" in operating
    scrape = "| scrape, 100 relays | 2.0 (1.0-3.0) | at most 100 ms | ok |"
    check = "| relayctl check, 1,000 relays | 2.00 (1.00-3.00) | at most 1 s | MISSED |"
    assert scrape in limits
    assert check in limits


def test_the_pages_tables_are_rectangular() -> None:
    text = markdown(run_facts(), full_results(), {**TITLES, **PROXIES, **DATAGRAMS})
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {line.count("|") for line in block.splitlines()}
        assert len(widths) == 1, block


def test_the_page_names_no_folder_and_no_host() -> None:
    text = markdown(run_facts(), full_results(), TITLES)
    assert "/work" not in text
    assert socket.gethostname() not in text.split()


def test_the_json_has_every_round() -> None:
    told = json.loads(json_text(run_facts(), full_results()))
    assert told["figures"]["request"]["haproxy-splice"] == [2.0, 4.0, 6.0]
    assert told["machine"]["cores"] == "2"
    assert told["lacking"] == {"relayd, other Python": "there is none"}


def test_the_page_has_pools_in_a_section_of_their_own() -> None:
    titles = {**TITLES, "relayd-hash": "relayd, client-hash"}
    text = markdown(run_facts(), full_results(), titles)
    others, _, rest = text.partition("### Pools of a thousand servers")
    pools, _, _ = rest.partition("### Operating")
    assert "client-hash |" not in others
    assert "|  | relayd, plane | relayd, client-hash |" in pools
