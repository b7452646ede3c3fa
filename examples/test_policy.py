"""Tests of one's own rules: who is served, when, by which server, and why.

    pytest examples/test_policy.py

Nothing is started, and nothing is connected.
"""

from pathlib import Path

import pytest

from relayd.testing import explain

SETTINGS = Path(__file__).with_name("policy.toml")

OPEN, CLOSED = "2026-12-23T10:00", "2026-12-24T03:00"


def test_the_office_is_served_in_its_hours() -> None:
    assert explain(SETTINGS, relay="web", client="10.1.2.3", at=OPEN).admitted
    assert not explain(SETTINGS, relay="web", client="10.1.2.3", at=CLOSED).admitted


@pytest.mark.parametrize("client", ["10.1.0.66", "198.51.100.1", "unix"])
def test_nobody_else_is(client: str) -> None:
    found = explain(SETTINGS, relay="web", client=client, at=OPEN)
    assert not found.admitted, found


def test_which_rule_decides() -> None:
    found = explain(SETTINGS, relay="web", client="10.1.0.66", at=OPEN)
    assert found.said("rules").why == "--deny-client 10.1.0.66"


def test_a_client_keeps_its_server() -> None:
    first, again = (
        explain(SETTINGS, relay="web", client=f"10.1.2.3:{port}", at=OPEN).server
        for port in (50000, 50001)
    )
    assert first == again


def test_nobody_sends_mail_through_the_proxy() -> None:
    found = explain(SETTINGS, relay="out", client="127.0.0.1", dest="198.51.100.7:25")
    assert not found.admitted, found
