"""An operator at work: files, relayctl, and what the metrics and the log say.

relayctl is run as a program, as people do.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import attrs

from tests.live.test_control_socket import ask
from tests.support.process import PATIENCE, RelayProcess
from tests.system.programs import LIMIT

RELAYCTL = str(Path(sys.executable).parent / "relayctl")

#: A metric with its labels, and its value.
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@attrs.frozen
class Operator:
    """Steers a relayd.

    :ivar folder: of its control socket, and its file.
    """

    folder: Path

    @property
    def socket(self) -> Path:
        """Its control socket."""
        return self.folder / "control.sock"

    @property
    def file(self) -> Path:
        """Its file."""
        return self.folder / "relayd.toml"

    def writes(self, text: str) -> None:
        """Write the file."""
        self.file.write_text(text)

    def runs(self, *words: str, code: int = 0) -> str:
        """Run relayctl; what it prints.

        :param code: with which it must end; if it is another than 0, what it says of
            the problem is there, too.
        """
        done = subprocess.run(
            [RELAYCTL, *words],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
            env={**os.environ, "RELAYD_CONTROL": str(self.socket)},
        )
        assert done.returncode == code, (words, done.stdout, done.stderr)
        return done.stdout if code == 0 else done.stdout + done.stderr

    def asks(self, *words: str, code: int = 0) -> Any:
        """The same, with --json; what it answers."""
        return json.loads(self.runs(*words, "--json", code=code))

    def ask(self, method: str, what: str, body: Any) -> Any:
        """The same without relayctl, which takes a while to start."""
        status, answer = ask(self.socket, method, f"/v1/{what}", body)
        assert status == 200, (method, what, body, answer)
        return answer

    def watches(self, *words: str, times: int = 2) -> str:
        """Watch until it has been shown so many times; what was shown."""
        shown = ""
        with subprocess.Popen(
            [RELAYCTL, *words, "--watch", "0.2"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "RELAYD_CONTROL": str(self.socket)},
        ) as watching:
            assert watching.stdout is not None
            try:
                while shown.count("RELAY ") < times:
                    line = watching.stdout.readline()
                    assert line, shown
                    shown += line
                watching.send_signal(signal.SIGINT)
                watching.wait(PATIENCE)
            finally:
                watching.kill()
        return shown

    def relay(self, name: str) -> Any:
        """A relay's row."""
        [found] = [
            each for each in self.asks("relays")["relays"] if each["name"] == name
        ]
        return found


class Metrics:
    """What is scraped at one moment."""

    def __init__(self, port: int) -> None:
        where = f"http://127.0.0.1:{port}/metrics"
        with urllib.request.urlopen(where, timeout=PATIENCE) as answer:
            self.text: str = answer.read().decode()

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of all samples with this name and these labels."""
        return sum(
            float(value)
            for found, said, value in _SAMPLE.findall(self.text)
            if found == name and labels.items() <= dict(_LABEL.findall(said)).items()
        )


@attrs.define
class Totals:
    """What became of a relay's sessions.

    :ivar endings: how often each was there.
    """

    endings: Counter[str] = attrs.field(factory=Counter)
    up: int = 0
    down: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.endings + other.endings, self.up + other.up, self.down + other.down
        )

    @classmethod
    def logged(cls, running: RelayProcess, relay: str) -> Totals:
        """Of the sessions that have ended, as the log says."""
        found = cls()
        for each in running.sessions(0):
            if each["relay"] == relay:
                found.endings[each["ending"]] += 1
                found.up += int(each["up"])
                found.down += int(each["down"])
        return found

    @classmethod
    def of_flows(cls, running: RelayProcess, relay: str) -> Totals:
        """The same of flows."""
        found = cls()
        for each in running.flows(0):
            if each["relay"] == relay:
                found.endings[each["ending"]] += 1
                found.up += int(each["up"].partition("/")[2])
                found.down += int(each["down"].partition("/")[2])
        return found

    @classmethod
    def measured(cls, metrics: Metrics, relay: str) -> Totals:
        """As the metrics say, of TCP and SOCKS4."""
        endings: Counter[str] = Counter()
        for name, said, value in _SAMPLE.findall(metrics.text):
            labels = dict(_LABEL.findall(said))
            if name == "relayd_sessions_closed_total" and labels["relay"] == relay:
                endings[labels["ending"]] += int(float(value))
        return cls(
            +endings,
            *(
                int(metrics("relayd_relayed_bytes_total", relay=relay, direction=each))
                for each in ("up", "down")
            ),
        )
