"""The UDP NAT relay: a listening socket, a socket for each client, a table between.

A client's datagram to the listener goes to the server from a socket of the client's
own, connected to the server, so that the kernel drops what others send there.  What
comes back on that socket goes to the client, from the address that it had sent to.

Nothing that arrives raises: each datagram is passed on, or dropped and counted by its
reason (:class:`Counters`), and `datagrams in = datagrams out + dropped` holds for both
directions.  How it works: :mod:`relayd.datagrams`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from twisted.internet.interfaces import IReactorTime

from relayd.core import pool_settings, settings
from relayd.core.filtering import IFilterFactory, check_factories
from relayd.core.flows import Counters, FlowObserver
from relayd.core.interfaces import IGate
from relayd.core.networks import Ip
from relayd.core.pacing import FlowBandwidth
from relayd.core.relay_names import relay_name
from relayd.datagrams.dialing import FlowDialer
from relayd.datagrams.ledger import Ledger
from relayd.datagrams.listener import DatagramListener, datagram_listener
from relayd.datagrams.loops import LoopGuard
from relayd.datagrams.opening import Ingredients
from relayd.datagrams.preamble import Preamble
from relayd.datagrams.relay import DatagramRelay
from relayd.datagrams.servers import Server, ServerPool
from relayd.datagrams.sockets import default_max_flows, udp_socket
from relayd.datagrams.spreading import SpreadDialer, sockets_to
from relayd.datagrams.table import NatTable
from relayd.datagrams.watching import ReactorWatcher, Watcher
from relayd.net.dial_options import DialOptions
from relayd.net.own_addresses import OwnHosts, is_own
from relayd.net.resolving import Resolver
from relayd.observing.flow_lines import FlowLog
from relayd.preludes.proxy_protocol import write_version_2
from relayd.upstreams.flow_server import FlowServer
from relayd.upstreams.pool import Pool

__all__ = ["Counters", "FlowServer", "Server", "UdpNat"]


class UdpNat(DatagramRelay):
    """Relays datagrams between clients and servers.

    :param reactor: provides `IReactorTime`, and what `watcher` needs.
    :param servers: each flow gets one of them, in turn; at least one.  Or a
        :class:`~relayd.upstreams.pool.Pool` of `FlowServer.at(Server(…))`, which has a
        selector, weights, backups and limits, and goes by how servers are.
    :param watcher: watches the sockets; unless given, the reactor does.
    :param resolver: finds the addresses of servers' names.
    :param clock: where time comes from, unless it is the reactor.
    :param observer: is notified of every flow that has ended; unless given, one that
        logs a line for each.
    :param open_socket: opens a datagram socket of a family; for tests.
    :param own: whether an address is this machine's.
    :param max_flows: flows in all; unless given, what the limit of open files allows,
        and the kernel's range of ports unless all of them are transparent, each less a
        reserve; 65,536 at most.
    :param max_flows_per_client: of one client key; unless given, half of that.
    :param timeout: seconds that a flow in use lives after something moved.  In use is
        one in which datagrams have gone both ways, and one later than two seconds after
        the first.
    :param unreplied_timeout: likewise, until it is in use; a flow that was answered
        has the shorter of the two.
    :param refresh_inbound: what a server sends keeps a flow alive, too.
    :param reply_cap: a flow's replies may have so many times the bytes of what its
        client has sent; 0 is no limit.
    :param receive_buffer: bytes that the kernel may keep unread for a listener.
    :param gate: decides which clients get a flow
        (:class:`~relayd.core.interfaces.IGate`); all do, unless given.
    :param closes: tells, when asked about once a second, whether all flows are to end
        now (:meth:`relayd.admission.lifetimes.Lifetime.flows_end`).
    :param dialing: from which address, and by which way, servers are sent to that have
        nothing of their own (`Server(…, dialing=…)`).
    :param send_proxy: tell servers, with a PROXY header of version 2, whose datagrams
        these are: `v2`, in each datagram, or `v2-first`, in the first of a flow.
    :param bandwidth: limits how many bytes pass in a second
        (:class:`~relayd.admission.bandwidth.Bandwidth`); what is too much is dropped.
    :param filters: see, change, delay or drop the datagrams of flows, the first one
        nearest to the source (:mod:`relayd.filters`).
    :param udp_balance: `datagram`: each datagram goes to the next server, and what they
        answer is dropped; `flow`: all of a client's go to one.
    :param cut: when checks, or an operator, say that a server is down, take its flows
        to another one at once, and end those for which there is none; unless given,
        they go when it refuses them or does not answer.
    :param wait_for_server: seconds for which the first datagrams of new clients are
        kept while no server can be chosen; 0: they are dropped.
    :param redirected: the kernel brings clients that mean to go elsewhere (TPROXY): a
        flow is that of a client and of where it meant to go, from there replies come,
        and a server may be an :class:`~relayd.datagrams.original.OriginalServer`.
        Takes the right CAP_NET_RAW, and Linux.
    :param name: what the log calls this relay; `relay1`, `relay2` and so on, unless
        given (:mod:`relayd.core.relay_names`).
    :raises ValueError: a setting can't be used.

    :ivar balance: the pool, if there is one; run its `tasks` while the relay runs.
    """

    def __init__(
        self,
        reactor: Any,
        servers: Iterable[Server] | Pool,
        *,
        watcher: Watcher | None = None,
        resolver: Resolver | None = None,
        clock: IReactorTime | None = None,
        observer: FlowObserver | None = None,
        open_socket: Callable[[int], Any] = udp_socket,
        own: Callable[[Ip], bool] = is_own,
        max_flows: int | None = settings.MAX_FLOWS.default,
        max_flows_per_client: int | None = settings.MAX_FLOWS_PER_CLIENT.default,
        timeout: float = settings.UDP_TIMEOUT.default,
        unreplied_timeout: float = settings.UDP_UNREPLIED_TIMEOUT.default,
        refresh_inbound: bool = settings.REFRESH_INBOUND.default,
        reply_cap: float = settings.REPLY_CAP.default,
        receive_buffer: int = settings.UDP_RCVBUF.default,
        gate: IGate | None = None,
        closes: Callable[[], bool] | None = None,
        dialing: DialOptions | None = None,
        send_proxy: str | None = None,
        bandwidth: FlowBandwidth | None = None,
        filters: Sequence[IFilterFactory] = (),
        udp_balance: pool_settings.UdpBalance = pool_settings.UDP_BALANCE.default,
        cut: bool = False,
        wait_for_server: float = 0.0,
        redirected: bool = False,
        name: str | None = None,
    ) -> None:
        if not isinstance(servers, Pool):
            servers = tuple(servers)
        if max_flows is None:
            max_flows = default_max_flows(
                1 if udp_balance == "flow" else sockets_to(_places(servers)),
                int(redirected),
                ephemeral=_take_ports(servers, dialing),
            )
        if max_flows_per_client is None:
            max_flows_per_client = max(1, max_flows // 2)
        ledger: Ledger[Any] = Ledger(
            relay_name(name),
            NatTable(
                max_flows,
                max_flows_per_client,
                timeout=timeout,
                unreplied_timeout=unreplied_timeout,
                refresh_inbound=refresh_inbound,
            ),
            clock if clock is not None else reactor,
            reply_cap=reply_cap,
        )
        self.balance = servers if isinstance(servers, Pool) else None
        if self.balance is not None:
            self.balance.belong_to(ledger.name)
        pool = ServerPool(
            servers, ledger.clock, lambda: resolver or Resolver.of(reactor)
        )
        if udp_balance not in ("flow", "datagram"):
            raise ValueError(f"udp_balance is flow or datagram, not {udp_balance!r}")
        dialer = (
            FlowDialer(pool, open_socket, receive_buffer, dialing)
            if udp_balance == "flow"
            else SpreadDialer(pool, open_socket, dialing)
        )
        listener: Callable[..., DatagramListener] = datagram_listener
        if redirected:
            # Of no use to a relay without.
            from relayd.datagrams.original_listener import OriginalListener

            listener = OriginalListener
        elif not all(each.judged for each in pool.servers):
            raise ValueError("an original server takes a relay that is redirected")
        super().__init__(
            ledger,
            made_of=Ingredients(
                pool=pool,
                dialer=dialer,
                gate=gate,
                preamble=preamble_of(send_proxy),
                bandwidth=bandwidth,
                filters=_of_flows(filters),
                listener=listener,
                cut=cut,
                wait_for_server=wait_for_server,
            ),
            loops=LoopGuard(
                own, redirected=OwnHosts(ledger.now, own) if redirected else None
            ),
            watcher=watcher if watcher is not None else ReactorWatcher(reactor),
            observer=observer if observer is not None else FlowLog(),
            receive_buffer=receive_buffer,
            closes=closes,
        )

    def become(self, other: DatagramRelay) -> None:
        """See :meth:`relayd.datagrams.relay.DatagramRelay.become`."""
        super().become(other)
        if isinstance(other, UdpNat):
            self.balance = other.balance

    def have_state(self, pool: Pool) -> None:
        """From now on a pool chooses, whose servers are those of the relay, with state.

        Its flows are not counted: whoever calls this does.
        """
        pool.belong_to(self.name)
        self.balance = pool
        self.start_choosing(pool)


def preamble_of(version: str | None) -> Preamble | None:
    """What servers are told of flows: a PROXY header.

    :param version: `v2`, in each datagram, or `v2-first`; None for none.
    :raises ValueError: there is no such version for datagrams.
    """
    if version is None:
        return None
    if version not in ("v2", "v2-first"):
        raise ValueError(f"send_proxy is v2 or v2-first, not {version!r}")
    write = partial(write_version_2, datagrams=True)
    return Preamble(write, first=version == "v2-first")


def _take_ports(servers: Pool | Iterable[Server], dialing: DialOptions | None) -> bool:
    """Whether flows take ephemeral ports: not if all have their clients' own."""
    own = [each for _, each in _places(servers) if each is not None]
    return not all(each is not None and each.transparent for each in (dialing, *own))


def _places(
    servers: Pool | Iterable[Server],
) -> list[tuple[str | None, DialOptions | None]]:
    """The hosts of servers, and how they are dialled that have a way of their own."""
    known: Iterable[Any] = servers  # type: ignore[assignment]
    if isinstance(servers, Pool):
        known = (each.endpoint for each in servers.upstreams)
    return [(each.host, each.dialing) for each in known]


def _of_flows(filters: Sequence[IFilterFactory]) -> tuple[IFilterFactory, ...]:
    check_factories(filters, datagrams=True)
    return tuple(filters)
