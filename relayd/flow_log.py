"""What embedders import to observe datagrams, by the name that they know it by."""

from relayd.core.flows import Counters, Flow, FlowFacts, FlowObserver
from relayd.observing.flow_lines import FlowLog, QuietFlowLog

__all__ = [
    "Counters",
    "Flow",
    "FlowFacts",
    "FlowLog",
    "FlowObserver",
    "QuietFlowLog",
]
