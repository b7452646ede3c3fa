"""What the benchmark prints."""

from __future__ import annotations

from bench.figures import GROWTH, SIZES, Spread
from bench.limits import Limit, Verdict, judge
from bench.report import limit_lines, lines_of
from tests.tools.results import DATAGRAMS, PROXIES, TITLES, full_results, results_of


def test_a_missed_limit_differs_from_a_kept_one() -> None:
    results = results_of(
        request={
            "relayd-plane": [12.0, 10.0, 11.0],
            "haproxy-splice": [10.0, 10.0, 10.0],
            "portforward": [20.0, 20.0, 20.0],
        }
    )
    lines = {
        line.partition("  ")[0]: line.split("  ")[-1].strip()
        for line in limit_lines(judge(results))
    }
    assert lines["request and response: to HAProxy, splice"] == "ok"
    assert lines["request and response: to portforward"] == "MISSED"
    assert lines["bulk, 1 stream: to portforward"] == "not measured"


def test_a_limits_line_has_the_ratio_its_range_and_the_bound() -> None:
    limit = Limit("bulk", ("a", "b"), ("a", "c"), 0.9)
    [line] = limit_lines([Verdict(limit, Spread(0.9004, 0.8, 1.0))])
    assert " ".join(line.split()) == "bulk 0.900 (0.800-1.000) at most 0.9 MISSED"


def test_a_limits_line_says_what_keeps_it() -> None:
    of, to = ("turn@8000", "a"), ("turn@100", "a")
    limit = Limit("turns", of, to, 1.25, beside=("b", "B"))
    for theirs, said in ((1.5, "ok: B's is 1.500"), (1.2, "MISSED")):
        verdict = Verdict(limit, Spread.of([1.4]), Spread.of([theirs]))
        [line] = limit_lines([verdict])
        assert " ".join(line.split()) == f"turns 1.400 at most 1.25, or B's {said}"


def test_a_limit_of_a_figure_itself_has_its_unit() -> None:
    limit = Limit("scrape", ("scrape-100", "a"), None, 100.0)
    [line] = limit_lines([Verdict(limit, Spread(100.26, 90.0, 110.0))])
    assert " ".join(line.split()) == ("scrape 100.3 (90.0-110.0) at most 100 ms MISSED")
    [line] = limit_lines([Verdict(limit, None)])
    assert " ".join(line.split()) == "scrape - at most 100 ms not measured"


def test_a_figures_lines_compare_the_relays() -> None:
    _, title, ours, theirs = lines_of(["request"], full_results(), TITLES)
    assert title == "request and response (CPU µs)"
    assert " ".join(ours.split()) == (
        "relayd, plane 2.0 (1.0-3.0) 0.50 of HAProxy with splice"
    )
    assert " ".join(theirs.split()) == "HAProxy, splice 4.0 (2.0-6.0)"


def test_a_proxys_lines_compare_it_with_proxies() -> None:
    names = ["socks4-bulk"]
    _, title, plane, ours, dante = lines_of(names, full_results(), PROXIES)
    assert title == "SOCKS4, bulk (CPU ms per GB)"
    assert plane.split()[2:] == ["4", "(2-6)", "0.50", "of", "Dante"]
    assert " ".join(ours.split()) == (
        "relayd, SOCKS4 2 (1-3) 0.25 of Dante 0.50 of relayd's TCP relay"
    )
    assert " ".join(dante.split()) == "Dante 8 (4-12) 2.00 of relayd's TCP relay"


def test_a_udp_relays_lines_compare_it_with_udp_relays() -> None:
    _, title, ours, nginx = lines_of(["udp-1"], full_results(), DATAGRAMS)
    assert title == "UDP, 1 flow of 32 (CPU µs)"
    assert ours.split()[2:] == ["2.00", "(1.00-3.00)", "0.50", "of", "nginx", "stream"]
    assert nginx.split()[3:] == ["4.00", "(2.00-6.00)"]
    few = lines_of(["udp-turns-50"], full_results(), DATAGRAMS)[1]
    assert few == "UDP, 50 bursts of 4, 50 flows in turn (CPU µs)"


def test_a_growing_figures_lines_have_a_column_for_each_size() -> None:
    names = [GROWTH["turn"].at(size) for size in SIZES]
    _, title, sizes, ours, _ = lines_of(names, full_results(), TITLES)
    assert title == "request, connections in turn (CPU µs), by connections"
    assert sizes.split() == ["10", "100", "1,000", "8,000"]
    assert ours.split()[2:] == ["2.0", "(1.0-3.0)"] * len(SIZES)


def test_one_round_has_no_range() -> None:
    results = results_of(memory={"relayd-plane": [2.1]})
    [*_, line] = lines_of(["memory"], results, TITLES)
    assert line.split() == ["relayd,", "plane", "2.10"]
