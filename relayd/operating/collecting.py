"""Python's collector of garbage, which looks at all there is, now and then.

A long answer (a scrape, a list of sessions) makes enough objects for that.  With 1,000
relays it took 90 ms, in which nobody is served.
"""

from __future__ import annotations

import gc


def keep_for_good() -> None:
    """Have it look no more at what there is now: modules, and the relays.

    What of that is dropped later is freed all the same, unless it is a cycle.
    """
    gc.collect()
    gc.freeze()
