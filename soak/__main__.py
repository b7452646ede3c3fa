"""The command line of the soak: `python -m soak`.

It tests each transport, one after the other, exits with status 0 if all passed, and
prints a seed that draws the same sessions again.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import resource
import signal
import sys
from collections.abc import Callable, Sequence

from soak.echoes import LISTENERS, flow_bound
from soak.relay import RelayFailed
from soak.run import Soak
from soak.stops import LONGEST

#: Descriptors that this process and the relay need in addition to connections.
SPARE = 300


def raise_descriptor_limit(connections: int, flows: int) -> None:
    """Raise the limit of descriptors to the hard limit, for this process and the relay.

    :raises SystemExit: the hard limit is too low.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    needed = 2 * connections + LISTENERS * flow_bound(flows) * bool(flows) + SPARE
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SystemExit(
            f"soak: {connections} connections and {flows} flows need {needed}"
            f" descriptors, and `ulimit -Hn` is {hard}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    :raises SystemExit: it is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m soak",
        description="Load a relay with misbehaving connections; status 0 if it holds.",
    )
    parser.add_argument(
        "--minutes",
        type=_positive,
        default=10.0,
        help="of traffic for each transport, beside the warm-up and the quiet moments"
        " (default: 10)",
    )
    parser.add_argument(
        "--connections",
        type=int,
        choices=range(1, 100_001),
        metavar="N",
        default=2000,
        help="to keep alive, about (default: 2000)",
    )
    parser.add_argument(
        "--flows",
        type=int,
        choices=range(2001),
        metavar="N",
        default=200,
        help="of datagrams, to keep alive beside them; 0: no datagrams (default: 200)",
    )
    parser.add_argument(
        "--stop",
        type=_up_to(LONGEST),
        metavar="SECONDS",
        default=10.0,
        help="that the relay is stopped for now and then; 0: never (default: 10)",
    )
    parser.add_argument(
        "--step",
        type=_up_to(24.0),
        metavar="HOURS",
        default=3.0,
        help="that its wall clock is set to be wrong by, at most; 0: never"
        " (default: 3)",
    )
    parser.add_argument(
        "--transport",
        choices=("plane", "twisted", "both"),
        default="both",
        help="the relay's --transport; both: one after the other (default)",
    )
    parser.add_argument(
        "--reactor", default="epoll", help="the relay's (default: epoll)"
    )
    parser.add_argument(
        "--seed", type=int, help="draw the sessions of an earlier soak again"
    )
    return parser.parse_args(arguments)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _positive(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"bad {text!r}: expected a number above 0")
    return value


def _up_to(most: float) -> Callable[[str], float]:
    def check(text: str) -> float:
        value = _number(text)
        if not 0 <= value <= most:
            raise argparse.ArgumentTypeError(
                f"bad {text!r}: expected a number from 0 to {most:g}"
            )
        return value

    return check


async def _run(options: argparse.Namespace, transport: str, seed: int) -> bool:
    running = asyncio.current_task()
    if running is not None:
        # Ctrl-C does the same.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    soak = Soak(
        transport=transport,
        reactor=options.reactor,
        connections=options.connections,
        flows=options.flows,
        seconds=options.minutes * 60,
        stop=options.stop,
        step=options.step,
        seed=seed,
    )
    return await soak.run()


def main() -> int:
    """Test each transport; returns the exit status."""
    options = parse_arguments()
    raise_descriptor_limit(options.connections, options.flows)
    seed = options.seed
    if seed is None:
        seed = random.SystemRandom().randrange(1 << 32)
    held = True
    try:
        for transport in (
            ("plane", "twisted")
            if options.transport == "both"
            else (options.transport,)
        ):
            held = asyncio.run(_run(options, transport, seed)) and held
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 1
    except RelayFailed as problem:
        raise SystemExit(f"soak: {problem}") from problem
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
