"""The plane's transports, held to what every stream transport must do."""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet import reactor

from relayd.plane.endpoints import (
    PlaneSocketEndpoint,
    PlaneTCPListenerEndpoint,
    PlaneUNIXListenerEndpoint,
)
from tests.net.test_transports_contract import _Accepting, _Dialling
from tests.support.contracts import Contract


class TestPlaneTCP(_Accepting, Contract):
    def endpoint(self) -> Any:
        return PlaneTCPListenerEndpoint(reactor, "127.0.0.1", 0, 16)


class TestPlaneTCP6(_Accepting, Contract):
    def endpoint(self) -> Any:
        return PlaneTCPListenerEndpoint(reactor, "::1", 0, 16)


class TestPlaneUNIX(_Accepting, Contract):
    resets = False

    def endpoint(self) -> Any:
        return PlaneUNIXListenerEndpoint(reactor, self.path(), 16)


class TestPlaneDialledTCP(_Dialling, Contract):
    def endpoint(self, port: int) -> Any:
        return PlaneSocketEndpoint(reactor, socket.AF_INET, ("127.0.0.1", port))
