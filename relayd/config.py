"""Public names: what a program imports to check what an operator may set."""

from relayd.operating.config import is_local

__all__ = ["is_local"]
