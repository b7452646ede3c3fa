"""The results as files: a page of Markdown, and JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence

from attrs import asdict

from bench.datagrams import BURST, BURSTS, RATE_FLOWS, SIZE
from bench.datagrams import RATE as DATAGRAM_RATE
from bench.facts import Run
from bench.figures import (
    ENDED,
    FEW,
    FIGURES,
    FILTERS,
    GROWTH,
    MANY,
    MEMORY_PAIRS,
    OPERATING,
    POOLS,
    ROUTES,
    SIZES,
    SOCKS4,
    TRANSPARENT,
    UDP,
    Figure,
    Results,
)
from bench.limits import judge
from bench.loads import AT_ONCE, RATE, RATE_CONNECTIONS
from bench.report import (
    REFERENCES,
    SOCKS4_REFERENCES,
    UDP_REFERENCES,
    measured_text,
    ratio_text,
    with_range,
    word,
)

#: Columns of the Markdown's text.
WIDTH = 84

_FIGURES_TEXT = """\
The median of the rounds, with the lowest and the highest in brackets; `-` is not
measured. On Linux, relayd uses the plane by default."""

_PROCESSOR_TEXT = """\
The ratios depend on the processor, and on the Python. A relay in Python makes about the
same system calls as one in C; where they are cheap, the interpreter weighs more. Two
processors were compared, each with Debian's Python 3.11 and HAProxy 2.6, when
relayd still made its log's lines by Twisted's logger: a quiet short session took
1.20-1.29 times HAProxy's CPU on an AMD EPYC, and 1.43-1.59 on a newer Intel; with both
logs on, 1.81-1.95 and 2.4."""

_RATIOS_TEXT = """\
Each round's figure divided by the same round's of {}.
Below 1 is cheaper; for throughput, above 1 is faster."""

_GROWTH_TEXT = f"""\
The same costs while more connections are open, and how many times that at {FEW} they
are at {MANY:,}. All busy: wrk has a request under way on every connection. In turn:
{AT_ONCE} are under way at once, and every connection has its turn. Short connections
are closed first by the server, while so many others are open and idle. In the last two
there is a relay for each number of connections, and they are measured in turn."""

_SOCKS4_TEXT = f"""\
The SOCKS4 proxy, on the plane, beside others; CPU is that of all of a proxy's
processes.

- A short session: the client asks to be connected, awaits the reply, makes one HTTP
  request as above, and closes first. {AT_ONCE} are under way at once. All log: relayd
  and Dante a line when a session ends, `twistd socks` what it always does. Quiet: Dante
  without `logoutput`, `twistd socks` with a log that has no observer.
- Bulk: iperf3 with one stream. proxychains does the handshake, in iperf3's process and
  on iperf3's own socket, which is connected to the proxy. The TCP relay has the
  same load without a handshake.
- Dante has processes for each stage of a session, and decides itself how many. It
  connects from its client's port, and does so from an address of its own, as it would
  from a machine of its own: on its client's address that port is taken. Clients connect
  from ports outside the kernel's ephemeral range, since the others' connections would
  have to search for the few that Dante leaves."""

_SOCKS4_RATIOS_TEXT = """\
relayd's proxy, divided by the same round's figure of the others. Below 1 is cheaper."""

_UDP_TEXT = f"""\
The relay for datagrams beside others; a datagram has {SIZE} bytes.

- CPU is that of a round trip: a datagram to a server that echoes, and its echo. So many
  of a flow's are under way at once; whenever one comes back, the next one is sent.
  Flows are there before it counts: what a flow's begin costs is not in it.
- In turn: {BURSTS} flows have a burst of {BURST} under way; when all of it is back, the
  next flow in turn sends its own. The promise that many flows cost little more than few
  is about these, the same work with 50 and with 5,000 flows. 5,000 flows of 1 are
  another work than 50 of 4, whose datagrams can leave together: shown, not promised.
- Delivered: what came back of {DATAGRAM_RATE:,} datagrams a second, which {RATE_FLOWS}
  flows send in turn whether or not others have come back.
- Client and server are written in C, and send and receive in batches.
- All relays ask the kernel to keep 4 MB of datagrams for their listening socket.
- relayd and nginx log a line for each flow when it ends: after it was measured.
- Twisted: a relay with a DatagramProtocol for each client."""

_UDP_RATIOS_TEXT = """\
relayd's relay, on the plane, divided by the same round's figure of the others. Below 1
is cheaper; of what was delivered, 1 is as good."""

_POOLS_TEXT = """\
relayd with a thousand servers, which are one with as many names, beside relayd with one
server of which nothing is said. Each session has another client, by its address, of
10,000: with client-hash each is looked up for the first time. A figure is of all of
them, over five windows."""

_FILTERS_TEXT = """\
relayd as it is, which splices; made to copy every byte; with a filter that passes
everything on (what the filters themselves do is not in it); and with `first:64`, which
has seen enough at the first chunk, so that the rest is spliced."""

_ROUTES_TEXT = """\
relayd as it is; with a route that answers at once, and with one that answers when five
bytes have come (what the routes themselves do is not in it); and with `--sni`, beside
relayd with one server: there a session is TLS between client and server, which the
relay does not end. In short sessions the client closes first, and nothing is logged."""

_TRANSPARENT_TEXT = """\
relayd as it is, and with `--transparent`, where it dials from its client's address
(UDP: and port). Client, relay and server have a network namespace each, with veth pairs
between them, and the relay is the server's gateway. Each relay has three of its own, so
that the plain one does not pay for the rules that the other one takes. The kernel
charges a packet's way, and the rules that look at it, to whoever has it sent: of what
comes from the server, the handshake and the ACKs are in the figures, and the data are
not.

- A short session: as above, closed first by the client, quiet.
- UDP: round trips as above, of flows that stay; and new flows with one round trip each,
  through a relay that is full, so that each one's end is in the figure as well."""

_ENDED_TEXT = """\
A short session as above, closed first by the client, quiet, between namespaces, when
15,000 sessions to the same server have ended within a minute: more than half of the
ports are taken that there are for it. The clients' own ports can be taken again
(`net.ipv4.tcp_tw_reuse`), the relays' can't, which is Linux's default."""

_OPERATING_TEXT = """\
relayd with its defaults and many relays. These are times on the wall, of a machine with
nothing else to do; on a busy one they are longer.

- A scrape: curl fetches `/metrics` by HTTP, as Prometheus does, from a process with so
  many relays, each of which has had a session. Meanwhile one client makes requests on a
  kept connection through one of the relays, and another one short sessions through the
  same, one after the other with 2 ms between them. Shown are the longest of each
  scrape, and the longest in as long a time without a scrape. Of these, too, the median
  of all scrapes counts: one long delay may be the machine's. The limit is for the
  longest request or session as a whole, though what is promised is only that a scrape
  adds no more.
- A check: `relayctl check` of a file with so many relays, from its start to its end."""

_LIMITS_TEXT = """\
What `make bench-check` holds relayd's plane to, by the figures above."""

_HOW = f"""\
- In each round all relays of a workload are started, each with a server of its own, on
  loopback ports of their own, and get a little of the same work before it counts. Then
  they take turns in short windows, each of which counts as a round. SOCKS4 bulk has
  three times as many, and so have requests on connections in turn: their limits are
  near to what they are. With thousands of connections or flows, they have their windows
  one relay after the other. Latency, memory, connections that are all busy, and what is
  delivered are measured once in a round, each relay by itself.
- Each relay is one process with one thread that relays; socat is a process for each
  connection.
- CPU is the relay's process's (socat: with its children's), user and system, by the
  kernel's account. On loopback the kernel charges the sender with most of the
  receiver's cost, for all relays alike. The work of kernel threads is in no figure.
- All that can log sessions do, as relayd does by default: relayd, HAProxy (`log
  stdout`, `option tcplog`) and nginx write a line for each, and portforward the two
  that it writes by default, to standard output, which is /dev/null for all. HAProxy and
  nginx log nothing unless they are told to. Where it says quiet, none logs sessions
  (relayd: `--quiet`).
- Bulk and throughput: iperf3, as received. A GB is 10⁹ bytes.
- Request and response: wrk on {AT_ONCE} kept connections, to an nginx that answers with
  32 bytes.
- Short sessions: a connection with one such request each, {AT_ONCE} under way at once.
  The benchmark makes them itself and so knows who closes first; wrk would not wait for
  the server.
- Latency: h2load, {RATE:,} requests a second over {RATE_CONNECTIONS} kept connections.
  The load and the server share the cores with the relay, and their time is in it.
- Memory: what {MEMORY_PAIRS:,} idle pairs, each of which carried one request, add to
  the relay's own (anonymous) memory. The kernel's buffers are not in it.
- HAProxy with splice has `option splice-request` and `option splice-response`; with
  `option splice-auto` alone, it copied these loads. It is what relayd's limits are set
  by. "Smart" has `option tcp-smart-accept` and `option tcp-smart-connect` as well, with
  which the last segment of a handshake travels with the first data.
- Where it says other Python, relayd runs on its plane under a Python that is not the
  system's, as a version manager builds it, with the same packages. Both are named
  above."""


def json_text(run: Run, results: Results) -> str:
    """All results, as JSON."""
    return json.dumps({**asdict(run), "figures": results.values()}, indent=1) + "\n"


def markdown(run: Run, results: Results, titles: Mapping[str, str]) -> str:
    """The results as Markdown, headed at the second level.

    :param titles: titles of relays by their names.
    """
    figures = [FIGURES[name] for name in FIGURES if name in results.values()]
    relays = results.measured(figures, titles)
    grown = [
        figure for figure in GROWTH.values() if figure.at(MANY) in results.values()
    ]
    parts = [
        "## Measured costs",
        _how(run),
        "### Figures",
        _FIGURES_TEXT,
        _figures_table(figures, results, relays),
    ]
    for to, called in REFERENCES.items():
        parts += [
            f"### Compared with {called}",
            _RATIOS_TEXT.format(called),
            *([_PROCESSOR_TEXT] if to == "haproxy-splice" else []),
            _ratios_table(to, figures, results, relays),
        ]
    parts += ["### Growth", _GROWTH_TEXT]
    parts += [_growth_table(figure, results, titles) for figure in grown]
    for title, text, ratios, of, relay, references in (
        (
            *("SOCKS4", _SOCKS4_TEXT, _SOCKS4_RATIOS_TEXT),
            *(SOCKS4, "relayd-socks4", SOCKS4_REFERENCES),
        ),
        ("UDP", _UDP_TEXT, _UDP_RATIOS_TEXT, UDP, "relayd-udp", UDP_REFERENCES),
    ):
        figures = [of[name] for name in of if name in results.values()]
        parts += [
            f"### {title}",
            text,
            _figures_table(figures, results, results.measured(figures, titles)),
            ratios,
            _compared_table(relay, references, figures, results),
        ]
    for title, text, shown in (
        ("Pools of a thousand servers", _POOLS_TEXT, POOLS),
        ("Filters", _FILTERS_TEXT, FILTERS),
        ("Routes", _ROUTES_TEXT, ROUTES),
        ("Transparent relaying", _TRANSPARENT_TEXT, TRANSPARENT),
        ("Ports that are taken", _ENDED_TEXT, ENDED),
    ):
        figures = [shown[name] for name in shown if name in results.values()]
        parts += [
            f"### {title}",
            text,
            _figures_table(figures, results, results.measured(figures, titles)),
        ]
    figures = [OPERATING[name] for name in OPERATING if name in results.values()]
    parts += [
        "### Operating many relays",
        _OPERATING_TEXT,
        _figures_table(figures, results, results.measured(figures, titles)),
        *("### Limits", _LIMITS_TEXT, _limits_table(results, run.machine)),
    ]
    return "\n\n".join(parts) + "\n"


def _how(run: Run) -> str:
    """How it was measured, and on which machine."""
    rounds = "one round" if run.rounds == 1 else f"{run.rounds} rounds"
    machine = run.machine
    programs = ", ".join(f"{name} {number}" for name, number in run.versions.items())
    facts = (
        f"Measured on {run.date}, in {rounds} with {run.windows} windows each, which"
        f" last about {run.window:g} s (what is measured once in a round:"
        f" {run.seconds:g} s). {machine['processor']},"
        f" {machine['cores']} cores, {machine['kernel']}, {machine['system']};"
        f" {run.busy:.0%} of the CPU was in use before it began. {programs}."
    )
    parts = [facts]
    parts += [f"Not measured: {title}: {why}." for title, why in run.lacking.items()]
    filled = [textwrap.fill(part, WIDTH, break_on_hyphens=False) for part in parts]
    return "\n\n".join([*filled, _HOW])


def _figures_table(
    figures: Sequence[Figure], results: Results, titles: Mapping[str, str]
) -> str:
    rows = []
    for figure in figures:
        spreads = [results.spread(figure.name, relay) for relay in titles]
        cells = [with_range(figure, spread) if spread else "-" for spread in spreads]
        rows.append([f"{figure.title}, {figure.unit}", *cells])
    return table(["", *titles.values()], rows)


def _ratios_table(
    to: str, figures: Sequence[Figure], results: Results, titles: Mapping[str, str]
) -> str:
    others = {relay: title for relay, title in titles.items() if relay != to}
    rows = []
    for figure in figures:
        ratios = [
            results.ratio((figure.name, relay), (figure.name, to)) for relay in others
        ]
        rows.append([figure.title, *map(ratio_text, ratios)])
    return table(["", *others.values()], rows)


def _growth_table(figure: Figure, results: Results, titles: Mapping[str, str]) -> str:
    sizes = [size for size in SIZES if figure.at(size) in results.values()]
    rows = []
    for relay, title in titles.items():
        spreads = [results.spread(figure.at(size), relay) for size in sizes]
        if any(spreads):
            cells = [
                with_range(figure, spread) if spread else "-" for spread in spreads
            ]
            ratio = results.ratio((figure.at(MANY), relay), (figure.at(FEW), relay))
            rows.append([title, *cells, ratio_text(ratio)])
    heads = [f"{size:,}" for size in sizes]
    return table([f"{figure.title}, {figure.unit}", *heads, f"{MANY:,} to {FEW}"], rows)


def _compared_table(
    relay: str,
    references: Mapping[str, str],
    figures: Sequence[Figure],
    results: Results,
) -> str:
    """One relay compared with each of the others."""
    rows = []
    for figure in figures:
        ratios = [
            results.ratio((figure.name, relay), (figure.name, to)) for to in references
        ]
        rows.append([figure.title, *map(ratio_text, ratios)])
    return table(["", *(f"to {called}" for called in references.values())], rows)


def _limits_table(results: Results, machine: Mapping[str, str]) -> str:
    rows = []
    for verdict in judge(results, processor=machine.get("processor", "")):
        limit = verdict.limit
        rows.append([limit.title, measured_text(verdict), limit.rule, word(verdict)])
    return table(["", "measured", "limit", ""], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
