"""What sees the bytes: filters; and the names for programs that bring their own."""

from relayd.core.filtering import (
    LATER,
    MOST_HELD,
    SPLICE,
    Answer,
    Course,
    DatagramWay,
    EndSession,
    Filter,
    FilterFactory,
    IDatagramFilter,
    IFilter,
    IFilterFactory,
    Way,
)

__all__ = [
    "LATER",
    "MOST_HELD",
    "SPLICE",
    "Answer",
    "Course",
    "DatagramWay",
    "EndSession",
    "Filter",
    "FilterFactory",
    "IDatagramFilter",
    "IFilter",
    "IFilterFactory",
    "Way",
]
