"""The whole contract: all that a relay relies on in a stream transport.

The tests require what Twisted documents, and what else its transports do on every
reactor and programs have come to rely on.  Where Twisted's documentation promises more
than its transports do, a test requires no more than both.
"""

from relayd.testing.closing import ClosingContract
from relayd.testing.losing import LossContract
from relayd.testing.producing import ProducerContract
from relayd.testing.reading import ReadingContract


class StreamTransportContract(
    ReadingContract, ProducerContract, ClosingContract, LossContract
):
    """A transport that passes this can be used in a relay.

    And in any program that was written for Twisted's own.
    """
