"""What a relay relies on in a stream transport, whoever made it: all of it.

The tests say what Twisted documents, and what its transports do besides and programs
have come to rely on, whichever reactor runs them.  Where Twisted's documentation
promises more than its transports keep, a test asks for no more than both allow.
"""

from relayd.testing.closing import ClosingContract
from relayd.testing.losing import LossContract
from relayd.testing.producing import ProducerContract
from relayd.testing.reading import ReadingContract


class StreamTransportContract(
    ReadingContract, ProducerContract, ClosingContract, LossContract
):
    """A transport that passes this can stand in a relay.

    And in any program that was written for Twisted's own.
    """
