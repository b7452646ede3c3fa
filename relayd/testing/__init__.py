"""For those who put transports, or endpoints that make them, of their own into a relay.

`StreamTransportContract` is a suite of tests that a transport has to pass to be relayed
well: relayd's own pass it, and Twisted's.  A test case says how to connect one, and
inherits the tests::

    from twisted.trial.unittest import TestCase
    from relayd.testing import Peer, StreamTransportContract

    class TestMine(StreamTransportContract, TestCase):
        async def connect(self, protocol) -> Peer:
            ...

`examples/own_transport_contract.py` is a whole one.  Trial runs it, and so does pytest.
With pytest's plugin pytest-twisted a plain class will do, without TestCase.  Nothing
but what relayd itself needs is imported here.

- :class:`StreamTransportContract` asks for all that a relay relies on, of a transport
  whose other end is any :class:`Peer`; :class:`SocketTransportContract` asks for what
  sockets have besides, and its peers are :class:`SocketPeer`.
- :class:`ConnectionContract` and :class:`SocketConnectionContract` are the short forms,
  for a transport that differs from a tested one in its addresses alone.
- :class:`FakeTransport` is a transport without a network, for tests of protocols.

A transport whose peer can't reset it says `resets = False`.  One that keeps what waits
elsewhere than Twisted's do overrides :meth:`ConnectionContract.unsent`; a relay does
not find it there either, and takes the transport's buffer for empty.
"""

from relayd.testing.connection import ConnectionContract
from relayd.testing.contract import StreamTransportContract
from relayd.testing.fakes import FakeTransport
from relayd.testing.peers import Peer, SocketPeer
from relayd.testing.protocols import Plain, Producer, Recorder
from relayd.testing.sockets import SocketConnectionContract, SocketTransportContract
from relayd.testing.suite import turns, until

__all__ = (
    "ConnectionContract",
    "FakeTransport",
    "Peer",
    "Plain",
    "Producer",
    "Recorder",
    "SocketConnectionContract",
    "SocketPeer",
    "SocketTransportContract",
    "StreamTransportContract",
    "turns",
    "until",
)
