"""The limits that relayd is held to. Nothing is measured here.

A limit is judged by the median of the rounds' ratios, each of one round.

A ratio of CPU depends on the processor: what Python adds to a session differs less from
one to the other than what the kernel takes.  So a processor on which a ratio is missed
has a bound of its own (:data:`INSTEAD`), which a version that costs more would miss
there.  And what depends on the caches may grow as much as it does for another relay in
the same run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from attrs import evolve, frozen

from bench.figures import (
    ENDED,
    FEW,
    FIGURES,
    FILTERS,
    FLOWS,
    GROWTH,
    MANY,
    OPERATING,
    POOLS,
    ROUTES,
    SOCKS4,
    TRANSPARENT,
    UDP,
    Results,
    Spread,
    figure_named,
)


@frozen
class Limit:
    """A limit: of one (figure, relay) divided by another, or of a figure itself.

    :param to: None: the bound is one of the figure itself, in its unit.
    :param at_least: the bound is a lower one.
    :param beside: another relay, with its title: what its ratio of the two figures is
        in the same run, is within it.
    :param elsewhere: the bound on other processors, if this one has its own.
    """

    title: str
    of: tuple[str, str]
    to: tuple[str, str] | None
    bound: float
    at_least: bool = False
    beside: tuple[str, str] | None = None
    elsewhere: float | None = None

    def kept(self, value: float) -> bool:
        """Whether a ratio, or a figure, keeps the bound."""
        return value >= self.bound if self.at_least else value <= self.bound

    @property
    def rule(self) -> str:
        """What it says, as text."""
        rule = f"{'at least' if self.at_least else 'at most'} {self.bound:g}"
        if self.to is None:
            rule += f" {figure_named(self.of[0]).unit}"
        if self.elsewhere is not None:
            rule += f" here, {self.elsewhere:g} elsewhere"
        if self.beside is not None:
            rule += f", or {self.beside[1]}'s"
        return rule

    @property
    def besides(self) -> tuple[tuple[str, str], tuple[str, str]] | None:
        """The two figures of the relay beside it."""
        if self.to is None or self.beside is None:
            return None
        return (self.of[0], self.beside[0]), (self.to[0], self.beside[0])


@frozen
class Verdict:
    """Whether a limit is kept.

    :param measured: the ratio, or the figure; None: it was not measured.
    :param beside: the ratio of the relay beside it.
    """

    limit: Limit
    measured: Spread | None
    beside: Spread | None = None

    @property
    def ok(self) -> bool:
        return self.measured is not None and (
            self.limit.kept(self.measured.middle) or bool(self.excuse)
        )

    @property
    def excuse(self) -> str:
        """Why it is kept though its bound is not; empty if there is no reason."""
        limit, measured, beside = self.limit, self.measured, self.beside
        if measured is None or limit.kept(measured.middle):
            return ""
        if limit.beside and beside and measured.middle <= beside.middle:
            return f"{limit.beside[1]}'s is {beside.middle:.3f}"
        return ""


_RELAYD, _SPLICE, _PORTFORWARD = "relayd-plane", "haproxy-splice", "portforward"
_HAPROXY = "HAProxy, splice"
_WATCHED, _POOL = "relayd-watched", "relayd-pool"
_PROXY = "relayd-socks4"
_UDP, _NGINX_UDP, _TWISTED_UDP = "relayd-udp", "nginx-udp", "twisted-udp"


def _limits() -> Iterable[Limit]:
    for name, splice, portforward in (
        # One stream comes out between 0.8 and 1.0: HAProxy's own cost varies by half.
        ("bulk-1", 1.0, 0.45),
        ("bulk-8", 0.9, 0.45),
        ("request", 1.1, 0.5),
        ("short-server-quiet", 1.35, 0.55),
        ("short-client-quiet", 1.35, 0.55),
        ("throughput-1", 1.0, 1.7),
        ("memory", 0.65, 0.5),
    ):
        for title, relay, bound in (
            (_HAPROXY, _SPLICE, splice),
            ("portforward", _PORTFORWARD, portforward),
        ):
            yield Limit(
                f"{FIGURES[name].title}: to {title}",
                (name, _RELAYD),
                (name, relay),
                bound,
                at_least=name == "throughput-1",
            )
    # By default: both write a line for each.
    for name in ("short-server", "short-client"):
        yield Limit(
            f"{FIGURES[name].title}: to {_HAPROXY}",
            (name, _RELAYD),
            (name, _SPLICE),
            1.5,
        )
        # Whoever watches it pays for little more than the text of the line.
        yield Limit(
            f"{FIGURES[name].title}: JSON log and metrics to text",
            (name, _WATCHED),
            (name, _RELAYD),
            1.1,
        )
    for name in ("short-server-quiet", "short-client-quiet"):
        # Counted, judged by dials and by checks, and chosen by the fewest sessions.
        yield Limit(
            f"{FIGURES[name].title}: two servers to one",
            (name, _POOL),
            (name, _RELAYD),
            1.05,
        )
    # Among very many servers; by client-hash, with each client's first session.
    for relay, title, bound in (
        ("relayd-hash", "client-hash, 1,000 servers to one", 1.25),
        ("relayd-thousand", "least-sessions, 1,000 servers to one", 1.15),
    ):
        yield Limit(
            f"{POOLS['short-clients'].title}: {title}",
            ("short-clients", relay),
            ("short-clients", _RELAYD),
            bound,
        )
    for title, relay, to, bound in (
        (
            "one that passes all to copying",
            "relayd-passing",
            "relayd-copying",
            1.3,
        ),
        ("one that leaves at once to none", "relayd-first", _RELAYD, 1.05),
    ):
        yield Limit(
            f"{FILTERS['filtered-bulk'].title}: {title}",
            ("filtered-bulk", relay),
            ("filtered-bulk", to),
            bound,
        )
    for name, title, relay, bound in (
        # Whatever the route itself does is not in it.
        ("route", "to none", "relayd-route", 1.1),
        ("route-peek", "to none", "relayd-peek", 1.3),
        ("sni", "to one server", "relayd-sni", 1.3),
        # Once it has decided, there is nothing of a route in the way.
        ("route-bulk", "one that answers at once to none", "relayd-route", 1.05),
        ("route-bulk", "one that peeks to none", "relayd-peek", 1.05),
    ):
        yield Limit(
            f"{ROUTES[name].title}: {title}",
            (name, relay),
            (name, _RELAYD),
            bound,
        )
    for name, relay, to, bound in (
        ("transparent", "relayd-transparent", _RELAYD, 1.15),
        ("transparent-udp", "relayd-udp-transparent", _UDP, 1.1),
        # A flow's first datagram, with the flow's end: it has calls of its own.
        ("transparent-udp-new", "relayd-udp-transparent", _UDP, 1.2),
    ):
        yield Limit(
            f"{TRANSPARENT[name].title}: transparent to plain",
            (name, relay),
            (name, to),
            bound,
        )
    # The others go through all the ports that are taken, which takes 30 times as long.
    yield Limit(
        f"{ENDED['ended'].title}: to {_HAPROXY}",
        ("ended", _RELAYD),
        ("ended", _SPLICE),
        0.1,
    )
    # Not where each of thousands has a request pending: then the kernel's work for each
    # grows by more than this, with any relay.  It is shown, and has no limit.
    # Those in turn grow with what the caches hold of the kernel's own state, too.
    for name, bound, beside in (
        ("turn", 1.25, (_SPLICE, _HAPROXY)),
        ("short", 1.3, None),
    ):
        yield Limit(
            f"{GROWTH[name].title}: {MANY:,} to {FEW}",
            (f"{name}@{MANY}", _RELAYD),
            (f"{name}@{FEW}", _RELAYD),
            bound,
            beside=beside,
        )
    for name, title, relay, bound in (
        # Of relayd's CPU two thirds are the kernel's, which alone are 0.28-0.31 of
        # Dante's.
        ("socks4-short", "Dante", "dante", 0.5),
        ("socks4-short-quiet", "Dante", "dante", 0.5),
        # A session is cheap enough for both that the kernel's part shows.
        ("socks4-short", "twistd socks", "twistd-socks", 0.6),
        ("socks4-short-quiet", "twistd socks", "twistd-socks", 0.65),
        # After the handshake it is a plain TCP session.
        ("socks4-bulk", "relayd, plane", _RELAYD, 1.05),
    ):
        yield Limit(
            f"{SOCKS4[name].title}: to {title}", (name, _PROXY), (name, relay), bound
        )
    for name in ("udp-1", "udp-50", "udp-500"):
        for title, relay, bound in (
            ("nginx stream", _NGINX_UDP, 0.95),
            ("Twisted", _TWISTED_UDP, 0.85),
        ):
            yield Limit(
                f"{UDP[name].title}: to {title}", (name, _UDP), (name, relay), bound
            )
    # At this rate nginx loses none, so relayd must not either.
    yield Limit(
        f"{UDP['udp-delivered'].title}: to nginx stream",
        ("udp-delivered", _UDP),
        ("udp-delivered", _NGINX_UDP),
        1.0,
        at_least=True,
    )
    # The same work, with few flows and many.  Not where each of thousands has one
    # datagram pending: a burst is sent in one call, a single datagram can't be.  That
    # is shown, and has no limit.
    few, many = FLOWS
    yield Limit(
        f"UDP: {many:,} flows to {few}",
        (f"udp-turns-{many}", _UDP),
        (f"udp-turns-{few}", _UDP),
        1.3,
    )
    # Times of a quiet machine.  The longest request is held to what a scrape may add
    # to it: to more than was promised.
    for name, bound in (
        ("scrape-100", 100),
        ("scrape-1000", 1_500),
        *((f"scrape-{relays}-request", 20) for relays in (100, 1_000)),
        *((f"scrape-{relays}-short", 20) for relays in (100, 1_000)),
        ("check-1000", 1),
    ):
        yield Limit(OPERATING[name].title, (name, _RELAYD), None, bound)


#: The limits for relayd's cheaper transport.
LIMITS = tuple(_limits())

#: By what a processor's name ends with, the bounds that hold there instead of those of
#: some limits, by what these are of and the relay that they are to.
INSTEAD: dict[str, dict[tuple[tuple[str, str], str], float]] = {
    # An Intel Xeon, whose kernel takes half the time of an AMD EPYC's (family 25, model
    # 17), on which the ratios hold.  From hour to hour a short session takes 47 to 94
    # microseconds here, HAProxy's 32 to 49: what else shares the machine's caches costs
    # whatever has more code and data more.  So a bound is a tenth above the highest of
    # the medians of three whole runs, an hour's, where the limit leaves less room: not
    # of memory and of what is delivered, which do not vary.
    "(family 6, model 167)": {
        # HAProxy's and the loads' own costs vary most: to portforward relayd's are
        # 0.32 to 0.37, and 0.19 to 0.21.
        (("bulk-1", _RELAYD), _SPLICE): 1.25,
        (("bulk-8", _RELAYD), _SPLICE): 1.3,
        (("throughput-1", _RELAYD), _SPLICE): 0.9,
        (("throughput-1", _RELAYD), _PORTFORWARD): 1.4,
        (("request", _RELAYD), _SPLICE): 1.25,
        (("short-server-quiet", _RELAYD), _SPLICE): 2.1,
        (("short-client-quiet", _RELAYD), _SPLICE): 2.1,
        (("short-server-quiet", _RELAYD), _PORTFORWARD): 0.65,
        (("short-client-quiet", _RELAYD), _PORTFORWARD): 0.65,
        (("short-server", _RELAYD), _SPLICE): 2.15,
        (("short-client", _RELAYD), _SPLICE): 2.15,
        (("short-server", _WATCHED), _RELAYD): 1.2,
        (("short-client", _WATCHED), _RELAYD): 1.2,
        (("short-server-quiet", _POOL), _RELAYD): 1.2,
        (("short-client-quiet", _POOL), _RELAYD): 1.2,
        (("short-clients", "relayd-hash"), _RELAYD): 1.6,
        (("short-clients", "relayd-thousand"), _RELAYD): 1.3,
        (("route", "relayd-route"), _RELAYD): 1.3,
        (("route-peek", "relayd-peek"), _RELAYD): 1.4,
        (("filtered-bulk", "relayd-first"), _RELAYD): 1.15,
        (("route-bulk", "relayd-route"), _RELAYD): 1.15,
        (("route-bulk", "relayd-peek"), _RELAYD): 1.15,
        (("socks4-bulk", _PROXY), _RELAYD): 1.1,
        (("transparent", "relayd-transparent"), _RELAYD): 1.25,
        (("socks4-short", _PROXY), "dante"): 0.55,
        (("socks4-short-quiet", _PROXY), "dante"): 0.55,
        (("udp-1", _UDP), _NGINX_UDP): 1.2,
        (("udp-50", _UDP), _NGINX_UDP): 1.05,
        (("udp-500", _UDP), _NGINX_UDP): 1.0,
        (("udp-turns-5000", _UDP), _UDP): 1.4,
    },
}


def limits_on(processor: str) -> list[Limit]:
    """The limits, with the bounds that they have on a processor.

    :param processor: as :func:`bench.facts.processor` names it.
    """
    own = next((INSTEAD[each] for each in INSTEAD if processor.endswith(each)), {})
    limits = []
    for limit in LIMITS:
        bound = own.get((limit.of, limit.to[1])) if limit.to else None
        if bound is not None:
            limit = evolve(limit, bound=bound, elsewhere=limit.bound)
        limits.append(limit)
    return limits


def judge(
    results: Results, without: Collection[str] = (), processor: str = ""
) -> list[Verdict]:
    """Check every limit.

    :param without: workloads that can't be measured here, whose limits are left out.
    :param processor: on which they were measured.
    """
    return [
        _verdict(limit, results)
        for limit in limits_on(processor)
        if figure_named(limit.of[0]).workload not in without
    ]


def _verdict(limit: Limit, results: Results) -> Verdict:
    if limit.to is None:
        return Verdict(limit, results.spread(*limit.of))
    return Verdict(
        limit,
        results.ratio(limit.of, limit.to),
        results.ratio(*limit.besides) if limit.besides else None,
    )


def needed_for_limits() -> set[tuple[str, str]]:
    """The (workload, relay) pairs that the limits need."""
    return {
        (figure_named(figure).workload, relay)
        for limit in LIMITS
        for figure, relay in filter(None, (limit.of, limit.to, *(limit.besides or ())))
    }
