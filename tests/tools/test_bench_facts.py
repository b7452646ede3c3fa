"""The facts that the benchmark's figures depend on."""

from __future__ import annotations

import platform

import pytest

from bench.facts import processor

EPYC = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
stepping\t: 1
"""


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (EPYC, "AMD EPYC (family 25, model 17)"),
        ("processor\t: 0\nmodel name\t: Some CPU\n", "Some CPU"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", platform.machine()),
    ],
)
def test_the_processor_is_named(text: str, name: str) -> None:
    """A virtual machine's name says little: the family and the model are added."""
    assert processor(text) == name
