"""Gives a server a state of which nothing was said, so that it can be taken out.

A relay's only server, if nothing is said of it, counts no sessions, and is no choice
(:mod:`relayd.operating.pools`): that costs least.  When an operator says something of
it, another one takes its place that has a state, and has its sessions.
"""

from __future__ import annotations

from typing import Any

from relayd.net.upstream import Upstream
from relayd.operating.listing import Shown
from relayd.udp_nat import FlowServer, UdpNat
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server


def give_state(shown: Shown, plain: Any) -> Server | None:
    """The server that takes its place.

    :return: None if there is none: it belongs to what is no relay of ours.
    """
    if shown.kind != "udp":
        for pool in shown.pools:
            if plain in pool.upstreams:
                return _of_sessions(shown, pool, plain)
        return None
    for factory in shown.factories:
        if isinstance(factory, UdpNat) and plain in factory.servers:
            return _of_flows(factory, plain)
    return None


def _of_sessions(shown: Shown, pool: Pool, plain: Upstream) -> Server:
    server = Server(plain.endpoint, plain.name, plain.identity, plain.preamble)
    pool.exchange(plain, server)
    # Those of before a change of settings may have the same pool.
    for factory, _ in shown.generations:
        for protocol in factory.registry.living():
            session, pending = protocol.session, protocol.pending
            if session.server is not plain or session.ending is not None:
                continue
            session.server = server
            if protocol.bridge is not None:
                protocol.place = server
                server.began()
            elif getattr(pending, "upstream", None) is plain and not pending.is_over:
                pending.place = server
                server.began()
    return server


def _of_flows(factory: UdpNat, plain: Any) -> Server:
    """Of its flows, those that were answered are connected."""
    factory.have_state(Pool([FlowServer.at(each) for each in factory.servers]))
    for flow in factory.registry.living():
        # Others have a server from before its settings have changed.
        if flow.server in factory.servers:
            state: Any = flow.server.state
            state.began()
            if not flow.awaits:
                state.connected()
    found: Server = plain.state
    return found
