"""Configuration files, as text: what they say, and what is wrong with them."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from relayd.configuring.config import Config
from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.configuring.given import Layers
from relayd.core.errors import ConfigError

#: What a relay needs.
RELAY = 'listen = "8080"\ndest = "10.0.0.5:80"\n'


def layers_of(path: Path, text: str | bytes, **environ: str) -> Layers:
    """What a file gives.

    :param path: the file, which is written.
    """
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_layers(str(path), environ=environ)


def config_of(path: Path, text: str | bytes, **environ: str) -> Config:
    """The settings that a file makes."""
    return configure(layers_of(path, text, **environ))


def problems_of(layers: Layers) -> list[str]:
    """The lines that tell what is wrong, each printable; there is one at least."""
    with pytest.raises(ConfigError) as caught:
        configure(layers)
    lines = str(caught.value).split("\n")
    assert all(line.isprintable() for line in lines)
    return lines


def problems(path: Path, text: str | bytes, **environ: str) -> list[str]:
    """What is wrong with a file, without its name."""
    name = f"{path}: "
    lines = problems_of(layers_of(path, text, **environ))
    assert all(line.startswith(name) for line in lines)
    return [line.removeprefix(name) for line in lines]


def json_layers(text: bytes, environ: Mapping[str, str] = os.environ) -> Layers:
    """What standard input gives."""
    return read_layers("-", io.BytesIO(text), environ)
