"""What embedders import to observe datagrams, by the name that they know it by."""

from relayd.flow_lines import FlowLog, QuietFlowLog
from relayd.flows import Counters, Flow, FlowFacts, FlowObserver

__all__ = [
    "Counters",
    "Flow",
    "FlowFacts",
    "FlowLog",
    "FlowObserver",
    "QuietFlowLog",
]
