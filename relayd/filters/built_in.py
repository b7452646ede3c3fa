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
    "latency": "relayd.filters.fault_latency:Latency",
    "bandwidth": "relayd.filters.fault_bandwidth:Bandwidth",
    "slow_close": "relayd.filters.fault_endings:SlowClose",
    "timeout": "relayd.filters.fault_endings:Timeout",
    "reset_peer": "relayd.filters.fault_endings:ResetPeer",
    "slicer": "relayd.filters.fault_slicer:Slicer",
    "limit_data": "relayd.filters.fault_endings:LimitData",
    # Of datagrams; latency is for both.
    "loss": "relayd.filters.datagram_faults:Loss",
    "duplicate": "relayd.filters.datagram_faults:Duplicate",
    "reorder": "relayd.filters.datagram_faults:Reorder",
    "corrupt": "relayd.filters.datagram_faults:Corrupt",
}
