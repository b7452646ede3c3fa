"""What a SOCKS4 proxy says to a request: its users, its rules for destinations."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from typing import Any

from relayd.configuring.config import Socks4Relay
from relayd.core.errors import Refused
from relayd.core.names import is_address
from relayd.operating.explanation import (
    OK,
    REFUSED,
    UNKNOWN,
    Step,
    destination_of,
    meet,
)
from relayd.operating.socks4_relays import proxy_policy
from relayd.socks.rules import Rule

#: For the address of a name that is not looked up: no guard is about these (RFC 5737).
ANYWHERE = ("203.0.113.1", "198.51.100.1", "192.0.2.1")


def meet_users(steps: list[Step], relay: Socks4Relay, user: str) -> None:
    """What a proxy says to the user that a client gives."""
    session: Any = None
    if relay.user_ids:
        try:
            proxy_policy(relay.listeners[0], relay).admit(user.encode(), session)
        except Refused as refusal:
            meet(steps, "user", REFUSED, refusal.why)
        meet(steps, "user", OK, f"--userid {user}")
    else:
        meet(steps, "user", OK, "no --userid: all users are served")
    if relay.socks4.ident:
        meet(steps, "ident", UNKNOWN, "--ident: its identd is not asked here")


def meet_rules(steps: list[Step], relay: Socks4Relay, dest: str) -> None:
    """What a proxy says to where a client wants to go."""
    policies = {
        policy.guarded: (listen, policy)
        for listen in reversed(relay.listeners)
        for policy in (proxy_policy(listen, relay),)
    }
    host, port = destination_of(dest)
    for listen, each in policies.values():
        where = f" (by {listen})" if len(policies) > 1 else ""
        for result, why in _destination(each, host, port):
            meet(steps, "destination", result, f"{why}{where}")


def _destination(policy: Any, host: str, port: int) -> Iterator[tuple[str, str]]:
    """What a policy says."""
    is_named = not is_address(host)
    address = _anywhere(policy.rules) if is_named else host
    try:
        rule = policy.judge(address, port, host if is_named else "")
    except Refused as refusal:
        public = f"{host}, at whatever public IPv4 address,"
        yield REFUSED, refusal.why.replace(address, public) if is_named else refusal.why
        return
    yield OK, "no rule is about it" if rule is None else f"--allow-dest {rule.text}"
    if is_named:
        why = f"{host} is not looked up here: each address that it has is judged, too"
        yield UNKNOWN, why


def _anywhere(rules: Sequence[Rule]) -> str:
    """An address that no rule means, unless it means them all."""
    for each in ANYWHERE:
        address = ipaddress.ip_address(each)
        if all(rule.network is None or address not in rule.network for rule in rules):
            return each
    return ANYWHERE[0]
