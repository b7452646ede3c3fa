"""Checks of who may use the control socket; as all of
:mod:`relayd.configuring.configure`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from relayd.configuring.control_settings import (
    CONTROL,
    CONTROL_READ_UID,
    CONTROL_UID,
)
from relayd.configuring.given import RelaySection
from relayd.core.process_settings import DEMO
from relayd.core.setting_types import Setting

#: Settings of the process that do nothing without another one.
NEEDS: Sequence[tuple[Setting[Any], Setting[Any]]] = (
    (CONTROL_UID, CONTROL),
    (CONTROL_READ_UID, CONTROL),
)


def about_control(process: RelaySection) -> Iterator[str]:
    """What is wrong with it.

    :param process: what was given for the process.
    """
    for row, other in NEEDS:
        given = process.all(row.key)
        if given and not process.all(other.key):
            place = given[0].place
            yield (
                f"{place.prefix}{given[0]} does nothing alone: give"
                f" {place.option(other)}, too"
            )
    control, demo = process.one(CONTROL), process.one(DEMO)
    if control and demo and demo.value:
        yield f"{demo.place.prefix}{control} is not for {demo}: leave it out"
    may = {each.value: each for each in process.all(CONTROL_UID.key)}
    for each in process.all(CONTROL_READ_UID.key):
        if each.value in may:
            yield (
                f"{each.place.prefix}{each} is a user who may do all, by"
                f" {may[each.value]}: give one"
            )
