"""The routes that change nothing: what there is, and what would be."""

from __future__ import annotations

import attrs

from relayd.control.routing import (
    ANY_RELAY,
    ANY_SERVER,
    CLIENT,
    RELAY,
    SERVER,
    Asked,
    Route,
    of_changes,
    of_levels,
    of_relay,
    of_server,
)
from relayd.control.steering import LISTED, MAX_LISTED, FlowQuery, SessionQuery
from relayd.control.values import Field, Fields, OneOf, Text, Whole


def _sessions(asked: Asked) -> SessionQuery:
    return SessionQuery(**asked.query)


def _flows(asked: Asked) -> FlowQuery:
    return FlowQuery(**asked.query)


_LIST = Fields(
    fields=[
        RELAY,
        CLIENT,
        SERVER,
        Field(
            name="sort",
            type=OneOf(["bytes", "age", "rate"]),
            help="What comes first: those with the most.",
        ),
        Field(
            name="limit",
            type=Whole(1, MAX_LISTED),
            help="How many are listed.",
            default=LISTED,
        ),
    ]
)
VIEWS: tuple[Route, ...] = (
    Route(
        method="GET",
        path="/v1/status",
        name="status",
        help="How the process is.",
        answer="Status",
        call=lambda to, asked: to.status(),
    ),
    Route(
        method="GET",
        path="/v1/relays",
        name="relays",
        help="All relays.",
        answer="Relays",
        call=lambda to, asked: to.relays(),
    ),
    Route(
        method="GET",
        path=ANY_RELAY,
        name="relay",
        help="One relay, with its settings and where each comes from.",
        answer="RelayWithSettings",
        call=lambda to, asked: to.relay(asked.path["relay"]),
        tag=of_relay,
    ),
    Route(
        method="GET",
        path="/v1/servers",
        name="servers",
        help="The servers of all relays, or of one.",
        answer="Servers",
        call=lambda to, asked: to.servers(asked.query["relay"]),
        query=Fields(fields=[RELAY]),
    ),
    Route(
        method="GET",
        path=ANY_SERVER,
        name="server",
        help="One server, by its name or its label.",
        answer="Server",
        call=lambda to, asked: to.server(asked.path["relay"], asked.path["server"]),
        tag=of_server,
    ),
    Route(
        method="GET",
        path="/v1/sessions",
        name="sessions",
        help="The sessions that go on.",
        answer="Sessions",
        call=lambda to, asked: to.sessions(_sessions(asked)),
        query=_LIST,
    ),
    Route(
        method="GET",
        path="/v1/flows",
        name="flows",
        help="The flows of UDP relays.",
        answer="Flows",
        call=lambda to, asked: to.flows(_flows(asked)),
        query=_LIST,
    ),
    Route(
        method="GET",
        path="/v1/nat",
        name="nat",
        help="Sessions and flows in one table, with the relay's own addresses.",
        answer="Nat",
        call=lambda to, asked: to.nat(_flows(asked)),
        query=_LIST,
    ),
    Route(
        method="GET",
        path="/v1/limits",
        name="limits",
        help="What is bounded, and where it stands.",
        answer="Limits",
        call=lambda to, asked: to.limits(),
    ),
    Route(
        method="GET",
        path="/v1/diff",
        name="diff",
        help="The run-time changes over the file.",
        answer="Changes",
        call=lambda to, asked: to.diff(),
        tag=of_changes,
    ),
    Route(
        method="GET",
        path="/v1/merged",
        name="merged",
        help="What is in effect, as a file: the one that was read, with the run-time"
        " changes; for those who may make them, as it has the values of secret settings"
        " and of variables of the environment.",
        answer="Merged",
        secret=True,
        call=lambda to, asked: to.merged(),
    ),
    Route(
        method="POST",
        path="/v1/explain",
        name="explain",
        help="What would become of a client, and why; nothing is connected. A route of"
        " the relay is run, and what it does beside deciding happens; the answer waits"
        " for it, for as long as a client would, 10 s at most. For those who may change"
        " nothing it is not run.",
        answer="Explanation",
        call=lambda to, asked: to.explain(
            asked.body["relay"],
            asked.body["client"],
            asked.body["at"],
            asked.body["dest"],
            asked.body["first"],
            asked.body["sni"],
            runs=asked.may_change,
        ),
        body=Fields(
            fields=[
                attrs.evolve(RELAY, required=True),
                Field(
                    name="client",
                    type=Text(),
                    help="The address of the client.",
                    required=True,
                ),
                Field(
                    name="at",
                    type=Text(),
                    help="When, such as 2026-12-24T03:00; now unless given.",
                ),
                Field(
                    name="dest",
                    type=Text(),
                    help="Where it asks to go, of a proxy.",
                ),
                Field(
                    name="first",
                    type=Text(),
                    help="What it sends first, for a route; with the escapes \\n, \\r,"
                    " \\t, \\0, \\\\ and \\xHH.",
                ),
                Field(
                    name="sni",
                    type=Text(),
                    help="The server name that it asks for, by TLS.",
                ),
            ]
        ),
    ),
    Route(
        method="GET",
        path="/v1/log-levels",
        name="log_levels",
        help="What is logged, by namespace.",
        answer="Levels",
        call=lambda to, asked: to.log_levels(),
        tag=of_levels,
    ),
)
