"""Public names: what a program imports to observe sessions."""

from relayd.core.observers import Observer, Observers
from relayd.observing.line_log import LineLog
from relayd.observing.session_log import QuietSessionLog, SessionLog, VerboseSessionLog

__all__ = [
    "LineLog",
    "Observer",
    "Observers",
    "QuietSessionLog",
    "SessionLog",
    "VerboseSessionLog",
]
