"""Public names: what a program imports to catch and raise the errors of relayd."""

from relayd.core.errors import (
    CannotStart,
    ConfigError,
    HandshakeFailed,
    LeadsBack,
    ListenError,
    Refused,
    RelayError,
)

__all__ = [
    "CannotStart",
    "ConfigError",
    "HandshakeFailed",
    "LeadsBack",
    "ListenError",
    "Refused",
    "RelayError",
]
