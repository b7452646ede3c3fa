"""What the answers look like, as JSON Schema: the components of the description.

Each object has all of its keys; a later version may have more.
"""

from __future__ import annotations

from typing import Any

from relayd.control.steering import Json

TEXT: Json = {"type": "string"}
WHOLE: Json = {"type": "integer", "minimum": 0}
NUMBER: Json = {"type": "number"}
SECONDS: Json = {"type": "number", "minimum": 0, "description": "seconds"}
FLAG: Json = {"type": "boolean"}
TIME: Json = {
    "type": "string",
    "format": "date-time",
    "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$",
}
ANY: Json = {}


def maybe(schema: Json) -> Json:
    """The same, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def many(schema: Json) -> Json:
    return {"type": "array", "items": schema}


def word(*words: str) -> Json:
    return {"type": "string", "enum": list(words)}


def ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def each(schema: Json) -> Json:
    """An object with keys of any name."""
    return {"type": "object", "additionalProperties": schema}


def record(**keys: Json) -> Json:
    """An object that has these keys."""
    return {"type": "object", "properties": keys, "required": list(keys)}


_RELAY: dict[str, Any] = {
    "name": TEXT,
    "kind": word("tcp", "udp", "socks4"),
    "state": word("running", "stopped", "paused", "draining"),
    "listen": many(TEXT),
    "dest": many(TEXT),
    "sni": many(TEXT),
    "route": maybe(TEXT),
    "sessions": WHOLE,
    "older_sessions": {
        **WHOLE,
        "description": "under settings from before the last change",
    },
    "max_sessions": maybe(WHOLE),
    "refused": maybe(WHOLE),
    "retries": maybe(WHOLE),
    "bytes_up": maybe(WHOLE),
    "bytes_down": maybe(WHOLE),
}

_MATCHED: dict[str, Json] = {
    "matched": {**WHOLE, "description": "how many there are that match"},
    "total": {**WHOLE, "description": "how many there are"},
}

_FILTERS = {**many(TEXT), "description": "the names of those that are on it"}

SCHEMAS: dict[str, Json] = {
    "Problems": record(problems={**many(TEXT), "minItems": 1}),
    "Status": record(
        version=TEXT,
        pid=WHOLE,
        started_at=TIME,
        uptime=SECONDS,
        config=maybe(TEXT),
        loaded_at=maybe(TIME),
        state=word("running", "stopping", "draining"),
        relays=WHOLE,
        sessions=WHOLE,
        flows=WHOLE,
        changes={**WHOLE, "description": "run-time changes over the file"},
        needs_restart=many(TEXT),
        confirm=maybe(record(seconds_left=SECONDS)),
        last_reload=maybe(record(at=TIME, ok=FLAG, problems=many(TEXT))),
        netfilter=record(
            managed={**FLAG, "description": "its rules follow the relays"},
            mark=WHOLE,
            relays={**many(TEXT), "description": "those that have rules"},
            failures=WHOLE,
            lost=WHOLE,
            problems=many(TEXT),
        ),
    ),
    "Relay": record(**_RELAY),
    "RelayWithSettings": record(
        **_RELAY, settings=each(record(value=ANY, source=TEXT))
    ),
    "Relays": record(relays=many(ref("Relay"))),
    "Server": record(
        relay=TEXT,
        pool={**TEXT, "description": "`default`, or what the settings call it"},
        name=TEXT,
        label=maybe(TEXT),
        address=TEXT,
        state=word("up", "down", "drain", "disabled", "ejected", "draining"),
        why=maybe(TEXT),
        weight=WHOLE,
        max_sessions=maybe(WHOLE),
        sessions=WHOLE,
        fails={
            **maybe(WHOLE),
            "description": "dials that have failed; null of an only server of which"
            " nothing is said",
        },
        checked=FLAG,
        last_check=maybe(record(at=TIME, ok=FLAG, why=maybe(TEXT))),
        backup=FLAG,
        operator={"enum": ["up", "down", "drain", None]},
    ),
    "Servers": record(servers=many(ref("Server"))),
    "Session": record(
        id=WHOLE,
        relay=TEXT,
        client=TEXT,
        peer=TEXT,
        listener=TEXT,
        upstream=maybe(TEXT),
        stage=TEXT,
        age=SECONDS,
        idle={**maybe(SECONDS), "description": "null until it is relayed"},
        bytes_up=WHOLE,
        bytes_down=WHOLE,
        rate={**NUMBER, "description": "bytes a second over its age"},
        attempts=WHOLE,
        older=FLAG,
        filters=_FILTERS,
    ),
    "Sessions": record(sessions=many(ref("Session")), **_MATCHED),
    "Flow": record(
        relay=TEXT,
        client=TEXT,
        listener=TEXT,
        port=maybe(TEXT),
        server=maybe(TEXT),
        age=SECONDS,
        idle=SECONDS,
        datagrams_up=WHOLE,
        datagrams_down=WHOLE,
        bytes_up=WHOLE,
        bytes_down=WHOLE,
        replied=FLAG,
        filters=_FILTERS,
    ),
    "Flows": record(flows=many(ref("Flow")), **_MATCHED),
    "Entry": record(
        protocol=word("tcp", "udp"),
        relay=TEXT,
        client=TEXT,
        listener=TEXT,
        port={
            **maybe(TEXT),
            "description": "the relay's own address and port towards the server",
        },
        server=maybe(TEXT),
        age=SECONDS,
        idle=SECONDS,
        bytes_up=WHOLE,
        bytes_down=WHOLE,
        datagrams_up=maybe(WHOLE),
        datagrams_down=maybe(WHOLE),
    ),
    "Nat": record(entries=many(ref("Entry")), **_MATCHED),
    "Killed": record(killed=WHOLE),
    "Limits": record(
        limits=many(
            record(
                what=TEXT,
                relay=maybe(TEXT),
                limit=maybe(NUMBER),
                now=NUMBER,
                hits={**WHOLE, "description": "how often it was reached"},
            )
        )
    ),
    "Reloaded": record(
        added=many(TEXT),
        removed=many(TEXT),
        changed=many(TEXT),
        unchanged=WHOLE,
        needs_restart=many(TEXT),
        routes={**many(TEXT), "description": "routes that were imported anew"},
        overlay={**WHOLE, "description": "run-time changes that were kept"},
        dropped={**WHOLE, "description": "those that were dropped"},
        confirm_within=maybe(SECONDS),
    ),
    "Confirmed": record(confirmed={"const": True}),
    "Changes": record(
        changes=many(
            record(relay=TEXT, server=maybe(TEXT), key=TEXT, file=ANY, now=ANY)
        )
    ),
    "Merged": record(
        toml=TEXT,
        in_clear={
            **many(TEXT),
            "description": "keys with values of the environment, or of secret settings",
        },
    ),
    "Explanation": record(
        admitted=FLAG,
        steps=many(record(step=TEXT, result=TEXT, why=TEXT)),
        server=maybe(TEXT),
    ),
    "Levels": record(levels=each(word("debug", "info", "warn", "error", "critical"))),
}
