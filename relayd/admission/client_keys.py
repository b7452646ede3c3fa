"""Which clients count as one: those whose addresses begin alike.

What is found of an address is kept for a while: clients return, and several gates are
asked about the same one in turn.
"""

from __future__ import annotations

import functools

from relayd.admission.client_rules import number_of
from relayd.admission.per_client import ClientPrefix
from relayd.core.addresses import host_of

#: What a client has in common with those that count as the same one: the IP version,
#: and the first bits of its address.  None: nothing tells it apart from another.
ClientKey = tuple[int, int] | None

#: Of those whose address is none: somebody's own kind of connections.
_UNKNOWN = (0, 0)


#: How many clients' keys, or rules, are kept.
KEPT = 1024


class _Hosts:
    """Finds the hosts of clients; of the same one in turn, once."""

    def __init__(self) -> None:
        self._client = self._host = ""

    def of(self, client: str) -> str:
        """See :func:`relayd.core.addresses.host_of`."""
        if client is not self._client:
            self._client, self._host = client, host_of(client)
        return self._host


hosts = _Hosts()


class ClientKeys:
    """Finds the keys of clients.

    :param prefix: how many bits of an address; unless given, /32 and /64.
    """

    def __init__(self, prefix: ClientPrefix | None = None) -> None:
        prefix = prefix or ClientPrefix()
        self._ipv4, self._ipv6 = 32 - prefix.ipv4, 128 - prefix.ipv6
        self._key = functools.lru_cache(maxsize=KEPT)(self._find)

    def of(self, client: str) -> ClientKey:
        """The key of a client; None for that of a UNIX socket.

        :param client: its name, as :func:`relayd.core.addresses.address_name` has it.
        """
        host = hosts.of(client)
        if host:
            return self._key(host)
        return None if client.startswith("unix:") else _UNKNOWN

    def _find(self, host: str) -> ClientKey:
        try:
            version, number = number_of(host)
        except ValueError:
            return _UNKNOWN
        return version, number >> (self._ipv4 if version == 4 else self._ipv6)
