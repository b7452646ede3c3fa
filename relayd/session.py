"""Public names: what a program imports to read what became of a session."""

from relayd.core.session import Direction, Ending, Session

__all__ = ["Direction", "Ending", "Session"]
