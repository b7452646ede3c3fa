"""What becomes of a client by somebody's settings: for tests of their rules.

    from relayd.testing import explain

    def test_the_office_is_served() -> None:
        assert explain("relayd.toml", relay="web", client="10.0.0.5").admitted

Nothing is opened, connected or looked up, and no reactor is needed.  A route of the
relay is run; what it does beside deciding happens (:func:`relayd.testing.decide` tests
one alone).
"""

from __future__ import annotations

import os
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relayd.configuring.config import AnyRelay, Config
    from relayd.operating.explanation import Explanation


def explain(
    settings: str | os.PathLike[str] | Config | AnyRelay,
    *,
    client: str,
    relay: str | None = None,
    at: str | datetime | None = None,
    dest: str | None = None,
    user: str = "",
    first: bytes = b"",
    sni: str | None = None,
) -> Explanation:
    """What becomes of a client.

    :param settings: the path of a file or a folder; or a
        :class:`relayd.config.Config`; or the settings of one relay of it.
    :param client: its address, with or without a port, or `unix`.
    :param relay: the name of the relay; may be left out where there is only one.
    :param at: when it comes, such as `2026-12-24T03:00` by the clocks of the relay's
        hours; unless given, now.
    :param dest: for a SOCKS4 proxy: where it wants to go, `HOST:PORT`.
    :param user: for a SOCKS4 proxy: its user id.
    :param first: what it sends first, for a route.
    :param sni: the server name that it asks for by TLS, for a route or `sni`.
    :return: a :class:`relayd.operating.explanation.Explanation`: `admitted`, `steps`
        (each with `step`, `result` and `why`), `server`.
    :raises relayd.errors.ConfigError: the settings, or an argument, are not valid.
    """
    # Tests of transports need nothing of this.
    from relayd.configuring.config import Config
    from relayd.operating import explaining

    if isinstance(settings, str | os.PathLike):
        found = explaining.relay_of_file(os.fspath(settings), relay)
    elif isinstance(settings, Config):
        found = explaining.relay_of(settings, relay)
    else:
        found = settings
    return explaining.explain(
        found, client, at=at, dest=dest, user=user, first=first, sni=sni
    )
