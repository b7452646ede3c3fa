"""Public names: what a program imports to observe sessions."""

from relayd.core.observers import Observer, Observers
from relayd.observing.session_log import QuietSessionLog, SessionLog, VerboseSessionLog

__all__ = [
    "Observer",
    "Observers",
    "QuietSessionLog",
    "SessionLog",
    "VerboseSessionLog",
]
