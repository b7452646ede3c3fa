"""UDP: flows, the table that keeps them, and the sockets on either side.

A datagram's way: listener -> (a client without a flow: relay -> table) -> flow -> its
server; and back: flow -> replies -> the listener's socket.
"""
