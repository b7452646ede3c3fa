"""What is secret is not told to those who may only look."""

from __future__ import annotations

from typing import Any

import pytest_twisted
from twisted.internet import reactor

from relayd.operating import EmbeddedRelays

SETTINGS = {"socks4": {"p": {"listen": "127.0.0.1:0", "userid": ["ann", "bob"]}}}


@pytest_twisted.ensureDeferred
async def test_values_of_secret_settings_are_hidden() -> None:
    """But for the file with all changes in it, which is for those who make them."""
    relays = EmbeddedRelays.from_settings(reactor, SETTINGS)
    relays.startService()
    try:
        shown: Any = await relays["p"].update({"userid": ["cid"]})
        assert shown["settings"]["userid"]["value"] == "***"
        [change] = relays.steering.diff()["changes"]
        assert (change["file"], change["now"]) == ("***", "***")
        merged = relays.steering.merged()
        assert "cid" in merged["toml"]
        assert merged["in_clear"] == ["socks4.p.userid"]
        shown = await relays["p"].update({"userid": []})
        assert shown["settings"]["userid"]["value"] == []
        assert relays.steering.merged()["in_clear"] == []
    finally:
        await relays.stopService()
