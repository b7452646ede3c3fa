"""What `twistd` and `twist` find: the two services of relayd.

Twisted imports this file to list the plugins of every program it starts, so it
names the modules that do the work and imports none of them.
"""

from twisted.application.service import ServiceMaker

relayd = ServiceMaker(
    "relayd",
    "relayd.tap.relayd",
    "A TCP relay with backpressure, half-close and bounded memory.",
    "relayd",
)

socks4 = ServiceMaker(
    "relayd SOCKS4",
    "relayd.tap.socks4",
    "A SOCKS4/4a proxy with CONNECT and BIND.",
    "socks4",
)
