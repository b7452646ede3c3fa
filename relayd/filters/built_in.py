"""The filters that come with relayd, by their names.

A filter's module is imported when a relay uses it, and not before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

#: Where the class of each is: its module, and its name there.
BUILT_IN: Final[Mapping[str, str]] = {
    "replace": "relayd.filters.replacing:Replace",
    "deny": "relayd.filters.replacing:Deny",
    "first": "relayd.filters.first:First",
    "capture": "relayd.filters.capture:Capture",
    # Faults, with the names and the meanings that Toxiproxy has.
    "latency": "relayd.filters.faults:Latency",
    "bandwidth": "relayd.filters.faults:Bandwidth",
    "slow_close": "relayd.filters.faults:SlowClose",
    "timeout": "relayd.filters.faults:Timeout",
    "reset_peer": "relayd.filters.faults:ResetPeer",
    "slicer": "relayd.filters.faults:Slicer",
    "limit_data": "relayd.filters.faults:LimitData",
    # Of datagrams; latency is for both.
    "loss": "relayd.filters.datagram_faults:Loss",
    "duplicate": "relayd.filters.datagram_faults:Duplicate",
    "reorder": "relayd.filters.datagram_faults:Reorder",
    "corrupt": "relayd.filters.datagram_faults:Corrupt",
}
