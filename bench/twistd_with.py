"""`twistd` with what only a benchmark needs: a relay that copies, a filter that passes.

    python -m bench.twistd_with copying|passing -n relayd …

`copying` never splices: every byte goes through the process, which is what a relay has
to be compared with whose filters see every byte.  `passing` has the filter `pass`,
which passes everything on; of what it costs, nothing is the filter's own work.
"""

from __future__ import annotations

import sys
from typing import Any

from twisted.scripts import twistd

from relayd.core.filtering import Filter, FilterFactory, Way
from relayd.filters import built_in
from relayd.plane import pacing, piping, splicing

#: More full reads in a row than there will be.
NEVER = 1 << 62


class Passing(FilterFactory):
    """Its filters pass everything on."""

    name = "pass"

    def build_filter(self, way: Way) -> Filter:
        """See :meth:`FilterFactory.build_filter`."""
        return Filter()


def main(what: str) -> None:
    """Run `twistd`, with the arguments that follow."""
    if what == "copying":
        modules: tuple[Any, ...] = (splicing, piping, pacing)
        for module in modules:
            module.FULL_READS = NEVER
    elif what == "passing":
        table: Any = built_in.BUILT_IN
        where = "bench.twistd_with:Passing"
        table["pass"] = built_in.BuiltIn(where, "Passes everything on.", ("pass",))
    else:
        raise SystemExit(f"copying or passing, not {what!r}")
    twistd.run()


if __name__ == "__main__":
    main(sys.argv.pop(1))
