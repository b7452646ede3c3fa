"""The gates that relayd has, for programs that embed a relay."""

from relayd.admission.bandwidth import Bandwidth
from relayd.admission.client_rules import ClientRule, parse_client_rule
from relayd.admission.connect_rates import ConnectRates
from relayd.admission.gates import Gates, HoursGate, RulesGate
from relayd.admission.hours import Hours, OpeningHours, parse_hours
from relayd.admission.lifetimes import Lifetime
from relayd.admission.per_client import (
    ClientPrefix,
    ConnectRate,
    parse_prefix,
    parse_rate,
)
from relayd.admission.rates import Rates, parse_rates
from relayd.admission.session_limits import SessionLimits
from relayd.core.leases import FREE
from relayd.net.from_asyncio import from_asyncio

__all__ = [
    "FREE",
    "Bandwidth",
    "ClientPrefix",
    "ClientRule",
    "ConnectRate",
    "ConnectRates",
    "Gates",
    "Hours",
    "HoursGate",
    "Lifetime",
    "OpeningHours",
    "Rates",
    "RulesGate",
    "SessionLimits",
    "from_asyncio",
    "parse_client_rule",
    "parse_hours",
    "parse_prefix",
    "parse_rate",
    "parse_rates",
]
