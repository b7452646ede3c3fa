"""One client of the proxy: ended from within what it asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from relayd.core.session import Ending, Session
from tests.socks.test_socks4 import (
    BIND,
    BIND_ANY,
    BIND_BY_NAME,
    CONNECT,
    CONNECT_BY_NAME,
    SERVER,
    Proxy,
)

REQUESTS = [CONNECT, CONNECT_BY_NAME, BIND, BIND_BY_NAME, BIND_ANY]


def ends_the_session(proxy: Proxy) -> Callable[..., None]:
    """What ends the session of its last argument instead of refusing it."""

    def end(*arguments: Any) -> None:
        session: Session = arguments[-1]
        proxy.factory.sessions[session.id].abort_session(Ending.DENIED, "not today")

    return end


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("ident", [False, True])
def test_a_policy_may_end_a_session_that_it_is_asked_about(
    request_: bytes, ident: bool
) -> None:
    proxy = Proxy(ident=ident, bind_any=True)
    proxy.policy.admit = ends_the_session(proxy)  # type: ignore[method-assign]
    client = proxy.client(request_)
    client.turn()
    assert not proxy.dialled
    assert not proxy.listeners
    assert not proxy.resolver.asked
    assert not proxy.clock.tcpClients
    assert proxy.session.detail == "not today"
    proxy.over(Ending.DENIED)


@pytest.mark.parametrize("request_", [CONNECT, CONNECT_BY_NAME, BIND, BIND_BY_NAME])
def test_a_policy_may_end_a_session_whose_destination_it_is_asked_about(
    request_: bytes,
) -> None:
    proxy = Proxy()
    proxy.policy.permit = ends_the_session(proxy)  # type: ignore[method-assign]
    client = proxy.client(request_)
    if request_ in (CONNECT_BY_NAME, BIND_BY_NAME):
        proxy.resolver.answer(SERVER)
    client.turn()
    assert not proxy.listeners
    assert not client.connected
    assert proxy.session.detail == "not today"
    proxy.over(Ending.DENIED)
