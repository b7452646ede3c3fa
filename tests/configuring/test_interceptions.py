"""Which relays are for clients that meant to go elsewhere."""

from __future__ import annotations

import pytest

from relayd.configuring.interceptions import (
    listens_for_others,
    takes_original,
    uses_tproxy,
)
from relayd.tap import relayd


@pytest.mark.parametrize(
    ("words", "original", "tproxy"),
    [
        ("-l 8080 -d 10.0.0.1:80", False, False),
        ("-l 8080 -d 10.0.0.1:80 --transparent", False, False),
        ("-l 8080 -d 10.0.0.1:80 --intercept :80", False, False),
        ("-l 8080 -d 10.0.0.1:80 --intercept :80,by=tproxy", False, True),
        ("-l 8080 -d original", True, False),
        ("-l 8080 -d original --intercept :80", True, False),
        ("-l 8080 -d 10.0.0.1:80 -d 10.0.0.2:original,backup", True, False),
        ("-l 8080 --sni a=10.0.0.2:original", True, False),
        ("-l 8080 -d 10.0.0.1:80 --route a:b", False, False),
        # It may send them there; without something to bring, there is nobody to send.
        ("-l 8080 -d 10.0.0.1:80 --route a:b --intercept :80", True, False),
        ("-l udp:53 -d udp:10.0.0.1:53 --intercept :53", False, False),
        ("-l udp:53 -d udp:original --intercept :53", True, True),
        ("-l udp:53 -d udp:10.0.0.1:original --intercept :53", True, True),
    ],
)
def test_what_a_relay_is_for(words: str, original: bool, tproxy: bool) -> None:
    options = relayd.Options()
    options.parseOptions(words.split())
    [relay] = options.config.relays
    assert takes_original(relay) is original
    assert uses_tproxy(relay) is tproxy
    assert listens_for_others(relay) is (original or tproxy)
