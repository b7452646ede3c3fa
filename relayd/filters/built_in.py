"""The filters that come with relayd, by their names.

A filter's module is imported when a relay uses it, and not before.  What is said of
each here is what the manual says; its options are read from its class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs


@attrs.frozen
class BuiltIn:
    """One of them.

    :ivar where: its class is: a module, and its name there.
    :ivar said: what it does, for its users: a sentence or two.
    :ivar examples: as one would write it behind `--filter`.
    """

    where: str
    said: str
    examples: tuple[str, ...]


BUILT_IN: Final[Mapping[str, BuiltIn]] = {
    "replace": BuiltIn(
        "relayd.filters.replacing:Replace",
        "Replaces what is found by other bytes, wherever a chunk of data ends. What is"
        " looked for is bytes, or, behind re:, a regular expression of Python's whose"
        " matches have a greatest length. The beginning of a match waits for the rest,"
        " for `wait` at most.",
        (
            "replace:old=Server: Apache,new=Server: none,direction=down",
            r"replace:re:Host: [a-z.]{1\,99},new=Host: example.com,direction=up",
        ),
    ),
    "deny": BuiltIn(
        "relayd.filters.replacing:Deny",
        "Resets a session in which a pattern is found: nothing of the match is passed"
        " on, unless it comes more slowly than `wait`; the last byte never is.",
        ("deny:DROP TABLE,direction=up", r"deny:re:(?i)select .{0\,100}from users"),
    ),
    "first": BuiltIn(
        "relayd.filters.first:First",
        "Notes the first bytes of each direction on the line of the access log, as"
        " first_up and first_down, escaped; then the session is relayed as if there"
        " were no filter.",
        ("first:64",),
    ),
    "capture": BuiltIn(
        "relayd.filters.capture:Capture",
        "Writes sessions to a file that Wireshark and tshark read. Each is a TCP stream"
        " with made-up headers. The file is renamed to FILE.1 and so on when it has"
        " `size`, and `keep` old ones stay. A disk that is full ends the capture, not"
        " the sessions. The bytes may be secrets: so is the file.",
        ("capture:/var/tmp/web.pcapng,size=100MiB,keep=5",),
    ),
    # Faults, with the names and the meanings that Toxiproxy has.
    "latency": BuiltIn(
        "relayd.filters.fault_latency:Latency",
        "Delays all data, give or take a jitter.",
        ("latency:100ms,jitter=20ms", "latency:1s,direction=up,toxicity=0.5,seed=7"),
    ),
    "bandwidth": BuiltIn(
        "relayd.filters.fault_bandwidth:Bandwidth",
        "Passes on so many kilobytes (1,000 bytes) a second, of each session.",
        ("bandwidth:100",),
    ),
    "slow_close": BuiltIn(
        "relayd.filters.fault_endings:SlowClose",
        "Passes the end of data on after a delay.",
        ("slow_close:500ms",),
    ),
    "timeout": BuiltIn(
        "relayd.filters.fault_endings:Timeout",
        "Drops all data, and closes the session after a time; 0: it is not closed.",
        ("timeout:2s",),
    ),
    "reset_peer": BuiltIn(
        "relayd.filters.fault_endings:ResetPeer",
        "Resets the session after a time, in which data is dropped; 0: at once.",
        ("reset_peer:250ms",),
    ),
    "slicer": BuiltIn(
        "relayd.filters.fault_slicer:Slicer",
        "Passes data on in small slices, with a delay behind each.",
        ("slicer:64,size_variation=16,delay=10ms",),
    ),
    "limit_data": BuiltIn(
        "relayd.filters.fault_endings:LimitData",
        "Closes the session when so many bytes have passed.",
        ("limit_data:10kB",),
    ),
    # Of datagrams; latency is for both.
    "loss": BuiltIn(
        "relayd.filters.datagram_faults:Loss",
        "Drops some datagrams.",
        ("loss:0.01",),
    ),
    "duplicate": BuiltIn(
        "relayd.filters.datagram_faults:Duplicate",
        "Sends some datagrams twice.",
        ("duplicate:0.01",),
    ),
    "reorder": BuiltIn(
        "relayd.filters.datagram_faults:Reorder",
        "Has some datagrams overtaken by those behind them.",
        ("reorder:0.1",),
    ),
    "corrupt": BuiltIn(
        "relayd.filters.datagram_faults:Corrupt",
        "Changes a bit of some datagrams.",
        ("corrupt:0.001",),
    ),
}
