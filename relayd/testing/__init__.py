"""For those who test what they put around a relay: a fake transport."""

from relayd.testing.fakes import FakeTransport

__all__ = ("FakeTransport",)
