"""relayd relays traffic at layer 4, as a Twisted plugin or inside your program.

Start at :class:`relayd.tcp.RelayFactory`.
"""

# Python encodes the name of a host with a codec, which it imports when the first one is
# looked up.  In a jail (`twistd --chroot`) there are no modules by then.
import encodings.idna  # noqa: F401

__version__ = "0.1.0"
