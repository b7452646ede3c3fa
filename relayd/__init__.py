"""relayd relays traffic at layer 4, as a Twisted plugin or inside your program.

Start at :class:`relayd.tcp.RelayFactory`.
"""

__version__ = "0.1.0"
