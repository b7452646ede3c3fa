"""A filter of your own, `--filter louder:by=5`: each "!" from a server comes 5 times.

`pip install .` brings it to the relayd there, with this pyproject.toml beside it::

    [project]
    name = "louder"
    version = "1.0"
    entry-points."relayd.filters".louder = "own_filter:Louder"
"""

from attrs import field, frozen, validators

from relayd.filters import Filter, FilterFactory, Way


@frozen
class Louder(FilterFactory):
    by: int = field(default=3, validator=validators.in_(range(1, 100)))

    def build_filter(self, way: Way) -> Filter | None:
        return Repeating(self.by) if way.course == "down" else None


class Repeating(Filter):
    def __init__(self, by: int) -> None:
        self.growth = by

    def data(self, data: bytes) -> bytes:
        return data.replace(b"!", b"!" * self.growth)
