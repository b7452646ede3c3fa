"""Public names: what a program imports to read and write SOCKS4."""

from relayd.core.prelude import BadRequest
from relayd.preludes.socks4 import (
    MAX_HOST,
    MAX_REQUEST,
    MAX_USER_ID,
    REPLY_SIZE,
    Code,
    Command,
    Reply,
    Request,
    read_reply,
    read_request,
    write_reply,
    write_request,
)

__all__ = [
    "MAX_HOST",
    "MAX_REQUEST",
    "MAX_USER_ID",
    "REPLY_SIZE",
    "BadRequest",
    "Code",
    "Command",
    "Reply",
    "Request",
    "read_reply",
    "read_request",
    "write_reply",
    "write_request",
]
