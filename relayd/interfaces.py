"""Public names: what a program imports to plug something in."""

from relayd.core.filtering import IDatagramFilter, IFilter, IFilterFactory
from relayd.core.interfaces import (
    ICaller,
    IDial,
    IDialer,
    IGate,
    IHopListener,
    ILease,
    ILossListener,
    INamedClients,
    IObserver,
    IOnBehalf,
    IProxyPolicy,
    IResetListener,
    ISelector,
    IShedsClients,
    ISpliceable,
    ISplicer,
)

__all__ = [
    "ICaller",
    "IDatagramFilter",
    "IDial",
    "IDialer",
    "IFilter",
    "IFilterFactory",
    "IGate",
    "IHopListener",
    "ILease",
    "ILossListener",
    "INamedClients",
    "IObserver",
    "IOnBehalf",
    "IProxyPolicy",
    "IResetListener",
    "ISelector",
    "IShedsClients",
    "ISpliceable",
    "ISplicer",
]
