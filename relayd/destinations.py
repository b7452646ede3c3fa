"""Public names: what a program imports to say where a proxy's clients may go."""

from relayd.core.networks import Network
from relayd.socks.destinations import ProxyPolicy
from relayd.socks.rules import Rule, parse_rule

__all__ = ["Network", "ProxyPolicy", "Rule", "parse_rule"]
