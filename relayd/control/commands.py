"""The routes that change something, or tell secrets; not everybody may ask for them."""

from __future__ import annotations

from relayd.control.routing import (
    ANY_RELAY,
    ANY_SERVER,
    CLIENT,
    NOTHING,
    RELAY,
    SERVER,
    Route,
    of_changes,
    of_levels,
    of_relay,
    of_server,
)
from relayd.control.values import (
    Field,
    Fields,
    Flag,
    Many,
    OneOf,
    Seconds,
    Table,
    Whole,
)

_WITHIN = Field(
    name="within",
    type=Seconds(),
    help="Sessions that are left then are ended. Unless given: of a relay, after the"
    " drain timeout; of a server, none.",
)

COMMANDS: tuple[Route, ...] = (
    Route(
        method="PATCH",
        path=ANY_RELAY,
        name="set",
        help="Change settings of a relay. The next connection has them; those under way"
        " are untouched.",
        answer="Relay",
        call=lambda to, asked: to.set(
            asked.path["relay"], asked.body["settings"], asked.by
        ),
        body=Fields(
            fields=[
                Field(
                    name="settings",
                    type=Table(),
                    help="By key, as a file has them; null: back to what the file"
                    " says.",
                    required=True,
                )
            ]
        ),
        changes=True,
        tag=of_relay,
    ),
    Route(
        method="POST",
        path=f"{ANY_RELAY}/start",
        name="start",
        help="Serve clients again.",
        answer="Relay",
        call=lambda to, asked: to.start(asked.path["relay"], asked.by),
        body=NOTHING,
        changes=True,
        tag=of_relay,
    ),
    Route(
        method="POST",
        path=f"{ANY_RELAY}/stop",
        name="stop",
        help="Refuse new clients; those under way stay.",
        answer="Relay",
        call=lambda to, asked: to.stop(
            asked.path["relay"], asked.body["cut"], asked.by
        ),
        body=Fields(
            fields=[
                Field(
                    name="cut",
                    type=Flag(),
                    help="End those that are under way, too.",
                    default=False,
                )
            ]
        ),
        changes=True,
        tag=of_relay,
    ),
    Route(
        method="POST",
        path=f"{ANY_RELAY}/drain",
        name="drain",
        help="Refuse new clients, and let those under way finish. Idle sessions are"
        " ended little by little in the time that there is.",
        answer="Relay",
        call=lambda to, asked: to.drain(
            asked.path["relay"], asked.body["within"], asked.by
        ),
        body=Fields(fields=[_WITHIN]),
        changes=True,
        tag=of_relay,
    ),
    Route(
        method="POST",
        path=f"{ANY_RELAY}/pause",
        name="pause",
        help="Hold new clients: nothing is read from them, and none is refused.",
        answer="Relay",
        call=lambda to, asked: to.pause(
            asked.path["relay"], asked.body["seconds"], asked.by
        ),
        body=Fields(
            fields=[
                Field(
                    name="seconds",
                    type=Seconds(),
                    help="For so long; unless given, until it is resumed.",
                )
            ]
        ),
        changes=True,
        tag=of_relay,
    ),
    Route(
        method="POST",
        path=f"{ANY_RELAY}/resume",
        name="resume",
        help="Serve the clients that were held, and new ones.",
        answer="Relay",
        call=lambda to, asked: to.resume(asked.path["relay"], asked.by),
        body=NOTHING,
        changes=True,
        tag=of_relay,
    ),
    Route(
        method="PATCH",
        path=ANY_SERVER,
        name="set_server",
        help="Take a server out or back, or give it another weight.",
        answer="Server",
        call=lambda to, asked: to.set_server(
            asked.path["relay"],
            asked.path["server"],
            asked.body["state"],
            asked.body["weight"],
            asked.body["within"],
            asked.by,
        ),
        body=Fields(
            fields=[
                Field(
                    name="state",
                    type=OneOf(["up", "down", "drain", "auto"]),
                    help="What it is from now on, whatever its checks say; a server"
                    " that drains gets no new sessions. auto: its checks decide.",
                ),
                Field(name="weight", type=Whole(), help="Its share of new sessions."),
                _WITHIN,
            ],
            one_of=["state", "weight"],
        ),
        changes=True,
        tag=of_server,
    ),
    Route(
        method="POST",
        path="/v1/kill",
        name="kill",
        help="End the sessions and flows that match all that is given.",
        answer="Killed",
        call=lambda to, asked: to.kill(
            asked.body["sessions"],
            asked.body["client"],
            asked.body["server"],
            asked.body["relay"],
            asked.by,
        ),
        body=Fields(
            fields=[
                Field(name="sessions", type=Many(Whole()), help="Their ids."),
                CLIENT,
                SERVER,
                RELAY,
            ],
            one_of=["sessions", "client", "server", "relay"],
        ),
        changes=True,
    ),
    Route(
        method="GET",
        path="/v1/sessions/{id}/capture",
        name="capture",
        help="What a session says from now on, as pcapng, until it ends or the client"
        " leaves; for those who may change something, as it is their clients' bytes.",
        answer="",
        call=lambda to, asked: to.capture(
            asked.path["id"], asked.query["bytes"], asked.by
        ),
        types={"id": Whole()},
        query=Fields(
            fields=[
                Field(
                    name="bytes",
                    type=Whole(1),
                    help="End after so many of each direction.",
                )
            ]
        ),
        secret=True,
        streams="application/octet-stream",
    ),
    Route(
        method="POST",
        path="/v1/reload",
        name="reload",
        help="Read the file again, and apply the difference as one step. A file with"
        " any error changes nothing.",
        answer="Reloaded",
        call=lambda to, asked: to.reload(
            asked.body["discard"], asked.body["confirm"], asked.by
        ),
        body=Fields(
            fields=[
                Field(
                    name="discard",
                    type=Flag(),
                    help="Drop the run-time changes.",
                    default=False,
                ),
                Field(
                    name="confirm",
                    type=Seconds(),
                    help="Go back after so long, unless it is confirmed.",
                ),
            ]
        ),
        changes=True,
        tag=of_changes,
    ),
    Route(
        method="POST",
        path="/v1/confirm",
        name="confirm",
        help="Keep what was reloaded.",
        answer="Confirmed",
        call=lambda to, asked: to.confirm(asked.by),
        body=NOTHING,
        changes=True,
    ),
    Route(
        method="PUT",
        path="/v1/log-levels/{namespace}",
        name="set_log_level",
        help="Log more, or less, of a namespace.",
        answer="Levels",
        call=lambda to, asked: to.set_log_level(
            asked.path["namespace"], asked.body["level"], asked.by
        ),
        body=Fields(
            fields=[
                Field(
                    name="level",
                    type=OneOf(["debug", "info", "warn", "error", "critical"]),
                    help="From this on.",
                    required=True,
                )
            ]
        ),
        changes=True,
        tag=of_levels,
    ),
)
