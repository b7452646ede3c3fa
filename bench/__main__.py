"""The command line of the benchmark.

python -m bench            everything, three rounds; writes the results' files
python -m bench quick      one short round of fewer relays; writes nothing
python -m bench check      only what the limits need; status 1 if one is missed
"""

from __future__ import annotations

import argparse
import datetime
import signal
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from bench import facts, page
from bench.children import CannotMeasure
from bench.figures import Results
from bench.limits import judge
from bench.relays import RELAYS
from bench.report import limit_lines
from bench.rounds import (
    MODES,
    Plan,
    check_requirements,
    lacking_workloads,
    measure,
)
from bench.workloads import WORKLOADS

#: The share of the machine's CPU in use from which there is a warning.
BUSY = 0.1

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    narrowed = given.only or given.workload
    if given.mode != "full" and given.output:
        parser.error(f"{given.mode} writes no files: --output is for full")
    if given.mode == "check" and narrowed:
        parser.error(
            "check takes neither --only nor --workload: it needs all it measures"
        )
    output = given.output
    if given.mode == "full" and not narrowed:
        output = output or RESULTS
    try:
        plan = Plan.of(
            MODES[given.mode],
            given.workload or (),
            given.only or (),
            rounds=given.rounds,
            seconds=given.seconds,
        )
        without = lacking_workloads(plan, given.workload or ())
        return _run(given.mode, plan, without, given.only or (), output)
    except CannotMeasure as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="What relaying costs: relayd beside other relays, in one run.",
    )
    parser.add_argument(
        "mode",
        nargs="?",
        choices=list(MODES),
        default="full",
        help="full (the default) measures everything and writes files; quick takes"
        " less than two minutes; check fails when a limit is missed",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where full writes its files (default: bench/results; with --only or"
        " --workload, nowhere)",
    )
    parser.add_argument(
        "--only",
        type=_names("relay", RELAYS),
        metavar="RELAY,…",
        help=f"measure these: {', '.join(RELAYS)}",
    )
    parser.add_argument(
        "--workload",
        type=_names("workload", WORKLOADS),
        metavar="WORKLOAD,…",
        help=f"measure these: {', '.join(WORKLOADS)}",
    )
    parser.add_argument("--rounds", type=_rounds, metavar="N", help="how often")
    parser.add_argument(
        "--seconds", type=_seconds, metavar="S", help="about how long a load lasts"
    )
    return parser


def _names(kind: str, known: Collection[str]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        given = text.split(",")
        for name in given:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is no {kind}; there are {', '.join(known)}"
                )
        return given

    return read


def _rounds(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= 100:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 100")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if 0.5 <= seconds <= 60:
        return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0.5 to 60")


def _run(
    mode: str,
    plan: Plan,
    left_out: Mapping[str, str],
    asked: Collection[str],
    output: Path | None,
) -> int:
    lacking = dict(left_out)
    _tell(lacking)
    plan = plan.without((), left_out)
    without = check_requirements(plan, asked)
    relays = {plan.titles[relay]: why for relay, why in without.items()}
    _tell(relays)
    lacking |= relays
    plan = plan.without(without)
    if output is not None:
        _check_output(output)
    busy = facts.busy()
    if busy > BUSY:
        print(
            f"bench: {busy:.0%} of this machine's CPU is in use already;"
            " the figures will show it",
            file=sys.stderr,
        )
    results = measure(plan)
    if mode == "check":
        processor = facts.machine_facts()["processor"]
        verdicts = judge(results, left_out, processor)
        print("\n".join(["", *limit_lines(verdicts)]))
        return 0 if all(verdict.ok for verdict in verdicts) else 1
    if output is not None:
        about = facts.Run(
            datetime.datetime.now(datetime.UTC).date().isoformat(),
            plan.rounds,
            plan.seconds,
            plan.windows,
            plan.window,
            busy,
            facts.machine_facts(),
            facts.versions(),
            lacking,
        )
        _write(about, results, plan.titles, output)
    return 0


def _tell(lacking: Mapping[str, str]) -> None:
    """Say what is left out, and why."""
    for what, why in lacking.items():
        print(f"bench: {what} is not measured: {why}", file=sys.stderr)


def _check_output(output: Path) -> None:
    if find_spec("matplotlib") is None:
        raise CannotMeasure(
            "matplotlib is not in this Python's environment; `make bench` sets one up"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotMeasure(f"cannot write to {output}: {error.strerror}") from error


def _write(
    about: facts.Run, results: Results, titles: dict[str, str], output: Path
) -> None:
    # Only here, so that matplotlib is needed only to write files.
    from bench.charts import draw

    (output / "results.json").write_text(page.json_text(about, results))
    (output / "results.md").write_text(page.markdown(about, results, titles))
    draw(results, titles, output)
    print(f"bench: written to {output}", file=sys.stderr)


if __name__ == "__main__":
    # On SIGTERM, too, children are stopped on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
