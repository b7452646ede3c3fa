"""Public names: what a program imports to plug something in."""

from relayd.core.interfaces import (
    ICaller,
    IDial,
    IDialer,
    IGate,
    IHearsLoss,
    IHearsReset,
    IHopListener,
    ILease,
    INamedClients,
    IObserver,
    IProxyPolicy,
    ISelector,
    IShedsClients,
    ISpliceable,
    ISplicer,
)

__all__ = [
    "ICaller",
    "IDial",
    "IDialer",
    "IGate",
    "IHearsLoss",
    "IHearsReset",
    "IHopListener",
    "ILease",
    "INamedClients",
    "IObserver",
    "IProxyPolicy",
    "ISelector",
    "IShedsClients",
    "ISpliceable",
    "ISplicer",
]
