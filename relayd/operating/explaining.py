"""Explains what becomes of a client: which rule, hours, limits, which server, and why.

Nothing is connected, looked up or changed.  What decides is what decides in a relay:
the gate, the pool and the policy are built of the relay's settings as ever, or are
those of a running relay, and are asked by methods that count nobody.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import attrs

from relayd.admission.client_rules import ClientRule
from relayd.admission.connect_rates import ConnectRates
from relayd.admission.gates import HoursGate, RulesGate, parts_of
from relayd.admission.hours import utc_now
from relayd.admission.session_limits import SessionLimits
from relayd.configuring.config import (
    Admission,
    AnyRelay,
    Config,
    FlowAdmission,
    Socks4Relay,
    UdpRelay,
)
from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.configuring.written import named
from relayd.core.errors import ConfigError, Refused
from relayd.core.names import is_address
from relayd.operating.admission import Admitting
from relayd.operating.explaining_pools import choice_of, pool_of
from relayd.operating.explanation import (
    Explanation,
    Instant,
    Moment,
    Step,
    StillClock,
    client_of,
    destination_of,
    instant_of,
)
from relayd.operating.socks4_relays import proxy_policy
from relayd.preludes.proxy_protocol import introduced_by
from relayd.socks.rules import Rule
from relayd.upstreams.pool import Pool

OK, REFUSED = "ok", "refused"

#: For the address of a name that is not looked up: no guard is about these (RFC 5737).
ANYWHERE = ("203.0.113.1", "198.51.100.1", "192.0.2.1")


@attrs.frozen(kw_only=True)
class State:
    """What is known of a relay that runs.

    :ivar gate: its gate; None: it has none.
    :ivar pool: of its first port; None: as its settings say; a proxy has none.
    :ivar ordinal: the sequence number of its next session; None: that is not known.
    :ivar stopped: it does not serve new clients: why.
    :ivar held: new clients are held, until an operator has them served.
    """

    gate: Any = None
    pool: Pool | None = None
    ordinal: int | None = None
    stopped: str = ""
    held: bool = False

    @classmethod
    def before(cls, relay: AnyRelay) -> State:
        """That of one that starts."""
        stopped = "" if relay.enabled else "it is stopped at start: enabled = false"
        gate = Admitting.of(relay.admission, StillClock()).gate
        return cls(gate=gate, stopped=stopped)

    @classmethod
    def of(cls, factory: Any, stopped: str = "") -> State:
        """That of a stream relay (:class:`relayd.stream.relay.StreamRelay`)."""
        ordinal = next(copy(factory.ordinals))
        pool = getattr(factory, "pool", None)
        return cls(gate=factory.gate, pool=pool, ordinal=ordinal, stopped=stopped)


class _Refused(Exception):
    """The client gets no further."""


def explain(
    relay: AnyRelay,
    client: str,
    *,
    at: Instant | None = None,
    dest: str | None = None,
    user: str = "",
    state: State | None = None,
) -> Explanation:
    """What becomes of a client of a relay.

    :param relay: its settings, which are valid.
    :param client: an address, with or without a port, or `unix`.
    :param at: when it comes, of the hours' clocks unless it names a zone; unless given,
        now.  Rates and limits are always as of now.
    :param dest: for a proxy: `HOST:PORT` that the client asks for.
    :param user: for a proxy: the user id that it gives.
    :param state: of the running relay; unless given, nobody has come yet.
    :raises ConfigError: an argument is not valid.
    """
    client = client_of(client)
    proxied = isinstance(relay, Socks4Relay)
    if (dest is not None or user) and not proxied:
        raise ConfigError(
            "a destination and a user are for SOCKS4 proxies: the servers of this"
            " relay are in its settings"
        )
    moment = utc_now() if at is None else instant_of(at, relay.admission.hours)
    steps: list[Step] = []
    server: str | None = None
    known = State.before(relay) if state is None else state
    try:
        if known.stopped:
            _met(steps, "state", REFUSED, known.stopped)
        if known.held:
            _met(steps, "state", "waits", "it is paused: until relayctl resume")
        _accept_proxy(steps, relay, client)
        _gates(steps, relay, known.gate, client, moment)
        _bandwidth(steps, relay.admission)
        if relay.filters:
            what = "datagrams" if isinstance(relay, UdpRelay) else "bytes"
            said = ", then ".join(f"--filter {str(each)!r}" for each in relay.filters)
            _met(steps, "filters", f"see its {what}", said)
        if isinstance(relay, Socks4Relay):
            server = _proxy(steps, relay, dest, user)
        else:
            pool = known.pool or pool_of(relay)
            choice = choice_of(pool, relay, client, known.ordinal)
            steps += choice.steps
            return Explanation(not choice.refused, steps, choice.server)
    except _Refused:
        return Explanation(False, steps, None)
    return Explanation(True, steps, server)


def _met(steps: list[Step], step: str, result: str, why: str) -> None:
    steps.append(Step(step, result, why))
    if result == REFUSED:
        raise _Refused


def _accept_proxy(steps: list[Step], relay: AnyRelay, client: str) -> None:
    if isinstance(relay, UdpRelay):
        return
    trusted = introduced_by(relay.stream.accept_proxy)
    if trusted is None:
        why = "no --accept-proxy: who connects is the client"
        _met(steps, "accept_proxy", OK, why)
    elif client in trusted.peers:
        _met(
            steps,
            "accept_proxy",
            "a header is expected",
            "--accept-proxy names this peer: it has to send a PROXY header, and what"
            " follows is about the client that the header names, or about this peer if"
            " it speaks for itself",
        )
    else:
        why = "--accept-proxy does not name this peer: it is the client itself"
        _met(steps, "accept_proxy", OK, why)


# -- gates


def _gates(
    steps: list[Step], relay: AnyRelay, gate: Any, client: str, moment: Moment
) -> None:
    by_kind = {type(each): each for each in parts_of(gate)}
    _rules(steps, by_kind.pop(RulesGate, None), client)
    _hours(steps, by_kind.pop(HoursGate, None), moment)
    _rates(steps, by_kind.pop(ConnectRates, None), client)
    limits = by_kind.pop(SessionLimits, None)
    if isinstance(relay, UdpRelay):
        _flow_limits(steps, relay)
    else:
        _limits(steps, limits, client)
    for each in by_kind.values():
        why = f"{type(each).__name__}: a gate that is not relayd's own is not asked"
        _met(steps, "gate", "not known", why)


def _rules(steps: list[Step], gate: RulesGate | None, client: str) -> None:
    if gate is None:
        _met(steps, "rules", OK, "no rule: all are served")
        return
    decision = gate.decide(client)
    if decision.why:
        _met(steps, "rules", REFUSED, decision.why)
    elif decision.rule is None:
        _met(steps, "rules", OK, "no rule is about this client, and none allows others")
    else:
        _met(steps, "rules", OK, _rule(decision.rule))


def _rule(rule: ClientRule) -> str:
    return f"--{'allow' if rule.allow else 'deny'}-client {rule.text}"


def _hours(steps: list[Step], gate: HoursGate | None, moment: Moment) -> None:
    if gate is None:
        _met(steps, "hours", OK, "no hours: always")
        return
    within = gate.hours.of(moment)
    there = moment.astimezone((within or gate.hours.hours[0]).zone)
    when = f"{there:%a %Y-%m-%d %H:%M} {there.tzinfo}"
    if within is None:
        _met(steps, "hours", REFUSED, f"{when} is outside {gate.hours}")
    else:
        _met(steps, "hours", OK, f"{when} is within --hours {within.text}")


def _rates(steps: list[Step], gate: ConnectRates | None, client: str) -> None:
    if gate is None:
        _met(steps, "rates", OK, "no --max-connects-per-client")
        return
    try:
        gate.foresee(client)
    except Refused as refusal:
        _met(steps, "rates", REFUSED, refusal.why)
        return
    left = gate.left(client)
    counted = "not counted" if left is None else f"{left} left at once"
    _met(steps, "rates", OK, f"--max-connects-per-client {gate.rate}: {counted}")


def _limits(steps: list[Step], gate: SessionLimits | None, client: str) -> None:
    if gate is None:
        _met(steps, "limits", OK, "no --max-sessions, no --max-sessions-per-client")
        _met(steps, "queue", OK, "no queue")
        return
    refusal: Refused | None = None
    waits = False
    try:
        waits = gate.foresee(client)
    except Refused as problem:
        refusal = problem
    if refusal is not None and refusal.reason != "queue":
        _met(steps, "limits", REFUSED, refusal.why)
    own = gate.sessions_of(client)
    most, each = gate.max_sessions, gate.max_sessions_per_client
    said = []
    if most is not None:
        said.append(f"--max-sessions {most}: {gate.sessions} now")
    if each is not None:
        now = "not counted" if own is None else f"{own} now"
        said.append(f"--max-sessions-per-client {each}: {now}")
    full = "full" if waits or refusal is not None else OK
    _met(steps, "limits", full, "; ".join(said))
    if refusal is not None:
        _met(steps, "queue", REFUSED, refusal.why)
    elif waits:
        limit = f"--queue-timeout {gate.patience:g}"
        _met(steps, "queue", "waits", f"behind {gate.waiting} others, {limit}")
    else:
        _met(steps, "queue", OK, "nobody waits: it need not")


def _flow_limits(steps: list[Step], relay: UdpRelay) -> None:
    limit = relay.udp.max_flows
    most = "as many as descriptors allow" if limit is None else str(limit)
    each = relay.udp.max_flows_per_client
    own = "" if each is None else f", --max-flows-per-client {each}"
    why = f"--max-flows {most}{own}: a new flow takes the place of one not in use"
    _met(steps, "limits", OK, why)


def _bandwidth(steps: list[Step], admission: FlowAdmission) -> None:
    said = [
        f"--{name.replace('_', '-')} {rates}"
        for name in ("bandwidth", "bandwidth_per_client", "bandwidth_per_session")
        if (rates := getattr(admission, name)) is not None
    ]
    if isinstance(admission, Admission) and admission.max_age:
        _met(steps, "age", "limited", f"--max-age {admission.max_age:g}")
    if said:
        _met(steps, "bandwidth", "limited", ", ".join(said))
    else:
        _met(steps, "bandwidth", OK, "not limited")


# -- proxies


def _proxy(
    steps: list[Step], relay: Socks4Relay, dest: str | None, user: str
) -> str | None:
    """What a proxy says to a request; where it leads, or None if that is not known."""
    policies = {
        policy.guarded: (listen, policy)
        for listen in reversed(relay.listeners)
        for policy in (proxy_policy(listen, relay),)
    }
    _, policy = next(iter(policies.values()))
    session: Any = None
    if relay.user_ids:
        try:
            policy.admit(user.encode(), session)
        except Refused as refusal:
            _met(steps, "user", REFUSED, refusal.why)
        _met(steps, "user", OK, f"--userid {user}")
    else:
        _met(steps, "user", OK, "no --userid: all users are served")
    if relay.socks4.ident:
        _met(steps, "ident", "not known", "--ident: its identd is not asked here")
    if dest is None:
        _met(steps, "destination", "not known", "none given: CONNECT needs one")
        return None
    host, port = destination_of(dest)
    for listen, each in policies.values():
        where = f" (by {listen})" if len(policies) > 1 else ""
        for result, why in _destination(each, host, port):
            _met(steps, "destination", result, f"{why}{where}")
    return dest


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
        yield "not known", why


def _anywhere(rules: Sequence[Rule]) -> str:
    """An address that no rule means, unless it means them all."""
    for each in ANYWHERE:
        address = ipaddress.ip_address(each)
        if all(rule.network is None or address not in rule.network for rule in rules):
            return each
    return ANYWHERE[0]


# -- files


def explain_file(
    path: str,
    relay: str | None,
    client: str,
    at: Instant | None = None,
    dest: str | None = None,
    user: str = "",
) -> dict[str, Any]:
    """The same of a file, as JSON has it (:attr:`Explanation.as_json`).

    :param path: of a file or a folder; `-` is standard input.
    :param relay: the name of one of its relays; None: it has one only.
    :raises ConfigError: the file is not valid, a line for each problem; or an argument.
    """
    found = relay_of_file(path, relay)
    return explain(found, client, at=at, dest=dest, user=user).as_json


def relay_of_file(path: str, relay: str | None = None) -> AnyRelay:
    """The settings of one relay of a file; see :func:`explain_file`."""
    layers = read_layers(path)
    config = configure(layers)
    names = [name for name, _ in named(layers)]
    return _one_of(dict(zip(names, config.relays, strict=True)), relay, f"{path}: ")


def relay_of(config: Config, relay: str | None = None) -> AnyRelay:
    """The settings of one relay of a process; see :func:`explain_file`.

    Relays without a name are `relay1` and so on here, in their order.
    """
    given = {each.name for each in config.relays}
    free = (name for n in range(1, 1 << 30) if (name := f"relay{n}") not in given)
    return _one_of({each.name or next(free): each for each in config.relays}, relay)


def _one_of(
    relays: dict[str, AnyRelay], name: str | None, prefix: str = ""
) -> AnyRelay:
    if name is None and len(relays) == 1:
        return next(iter(relays.values()))
    if name in relays:
        return relays[name]
    names = ", ".join(list(relays)[:10])
    more = f" and {len(relays) - 10} more" if len(relays) > 10 else ""
    what = "which relay" if name is None else f"there is no relay {name!r}"
    raise ConfigError(f"{prefix}{what}: there are {names or 'none'}{more}")
