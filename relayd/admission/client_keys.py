"""Which clients count as one: those whose addresses begin alike."""

from __future__ import annotations

from relayd.admission.client_rules import number_of
from relayd.admission.per_client import ClientPrefix
from relayd.core.addresses import host_of

#: What a client has in common with those that count as the same one: the IP version,
#: and the first bits of its address.  None: nothing tells it apart from another.
ClientKey = tuple[int, int] | None

#: Of those whose address is none: somebody's own kind of connections.
_UNKNOWN = (0, 0)


class ClientKeys:
    """Finds the keys of clients.

    :param prefix: how many bits of an address; unless given, /32 and /64.
    """

    def __init__(self, prefix: ClientPrefix | None = None) -> None:
        prefix = prefix or ClientPrefix()
        self._ipv4, self._ipv6 = 32 - prefix.ipv4, 128 - prefix.ipv6

    def of(self, client: str) -> ClientKey:
        """The key of a client; None for that of a UNIX socket.

        :param client: its name, as :func:`relayd.core.addresses.address_name` has it.
        """
        host = host_of(client)
        if not host:
            return None if client.startswith("unix:") else _UNKNOWN
        try:
            version, number = number_of(host)
        except ValueError:
            return _UNKNOWN
        return version, number >> (self._ipv4 if version == 4 else self._ipv6)
