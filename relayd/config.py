"""Public names: what a program imports to check what an operator may set."""

from relayd.configuring.config import is_local

__all__ = ["is_local"]
