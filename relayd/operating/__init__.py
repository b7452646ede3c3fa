"""Text to settings to a running service.

For programs that embed relays and steer them: :class:`EmbeddedRelays`, and
:class:`ControlService` for a control socket.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

#: Where the public names are; each is imported when it is used, with what it needs.
_PUBLIC = {
    "ControlService": "control_service",
    "EmbeddedRelay": "embedding",
    "EmbeddedRelays": "embedding",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
