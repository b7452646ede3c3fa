"""The routes that are measured: they decide, and do nothing else."""

from __future__ import annotations

from typing import Any


async def at_once(conn: Any) -> Any:
    """Decides without a look at the client."""
    return conn.pool()


async def peeking(conn: Any) -> Any:
    """Decides once five bytes have come."""
    await conn.peek(5)
    return conn.pool()
