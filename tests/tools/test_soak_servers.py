"""The relay's TCP listeners in a soak."""

from __future__ import annotations

import attrs

from soak.ends import Where
from soak.servers import listener_hosts, relay_options


def test_each_listener_has_its_destinations() -> None:
    @attrs.frozen
    class Servers:
        addresses: dict[Where, list[str]]

    servers = Servers({where: [f"127.0.0.1:{where.name}"] for where in Where})
    options = relay_options("plane", servers)  # type: ignore[arg-type]
    assert options[:2] == ["--transport", "plane"]
    listening = [i for i, option in enumerate(options) if option == "--listen"]
    assert [options[i + 3] for i in listening] == [
        f"127.0.0.1:{where.name}" for where, _ in listener_hosts()
    ]
