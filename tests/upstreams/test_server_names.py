"""Server names: the exact one, the longest wildcard, any other."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relayd.upstreams.server_names import ServerNames, checked_pattern

TABLE = {
    "www.example.com": 1,
    "*.example.com": 2,
    "*.eu.example.com": 3,
    "shop.eu.example.com": 4,
    "*.org": 5,
}

FOUND = [
    ("www.example.com", 1),
    ("WWW.Example.COM", 1),
    ("www.example.com.", 1),
    ("api.example.com", 2),
    ("a.b.c.example.com", 2),
    ("x.www.example.com", 2),
    ("a.eu.example.com", 3),
    ("a.b.eu.example.com", 3),
    ("eu.example.com", 2),
    ("shop.eu.example.com", 4),
    ("example.org", 5),
]
#: What looks like an entry, and is none.
OTHERS = [
    *("example.com", ".example.com", "org", "wwwxexample.com", "xexample.com"),
    *("www.example.com.evil.test", "*.example.com.evil.test", "com", "-", "192.0.2.1"),
    *("www.example.com..", "", None),
]


@pytest.mark.parametrize(("name", "found"), FOUND)
def test_the_exact_name_and_then_the_longest_wildcard(name: str, found: int) -> None:
    assert ServerNames(TABLE).find(name) == found
    assert ServerNames({**TABLE, "": 0}).find(name) == found


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_name_has_what_is_for_any_other(name: str | None) -> None:
    assert ServerNames(TABLE).find(name) is None
    assert ServerNames({**TABLE, "": 0}).find(name) == 0


def test_the_text_of_a_wildcard_is_no_name_that_it_is_not_about() -> None:
    """`*.example.com` is below example.com, as every text of that ending is."""
    table = {"*.example.com": 1, "*.org": 2}
    assert ServerNames(table).find("*.example.com") == 1
    assert ServerNames({"*.a.test": 1, "*.test": 2}).find("*.a.test") == 1
    assert ServerNames(table).find("*") is None


def test_it_is_a_mapping_of_patterns_as_they_are_compared() -> None:
    names = ServerNames({"WWW.Example.com.": 1, "*.Example.com": 2, "": 3})
    assert dict(names) == {"www.example.com": 1, "*.example.com": 2, "": 3}
    assert len(names) == 3
    assert names["*.example.com"] == 2
    assert ServerNames[int]({}).find("www.example.com") is None


@pytest.mark.parametrize(
    "text",
    ["*", "*.", "a.*.com", "*x.com", "**.com", "a b", "é.test", ".com", "1.2.3.4", ":"],
)
def test_what_is_no_pattern(text: str) -> None:
    with pytest.raises(ValueError, match="expected a host name") as caught:
        ServerNames({text: 1})
    assert repr(text) in str(caught.value)


def test_one_pattern_is_there_once() -> None:
    with pytest.raises(ValueError, match=r"'A\.test\.' is there twice"):
        ServerNames({"a.test": 1, "A.test.": 2})


# -- beside what the words say, read slowly

labels = st.sampled_from(["a", "b", "c", "A", "xa"])
some_names = st.lists(labels, min_size=1, max_size=4).map(".".join)
patterns = st.one_of(some_names, some_names.map("*.{}".format), st.just(""))


def slowly(table: list[str], name: str) -> str | None:
    """The pattern that is about a name."""
    about = [
        pattern
        for pattern in table
        if pattern in ("", name)
        or (pattern[0] == "*" and name.endswith(pattern[1:]) and name != pattern[2:])
    ]
    # Exact before all else, then the longest; the empty one is the shortest.
    return max(about, key=lambda one: (one == name, len(one)), default=None)


@given(st.lists(patterns, max_size=6), some_names)
@example(["*.a", "a", ""], "a.a")
def test_any_table_and_any_name(written: list[str], name: str) -> None:
    table = {checked_pattern(each): checked_pattern(each) for each in written}
    assert ServerNames(table).find(name) == slowly(list(table), name.lower())


@given(st.text(max_size=300))
def test_any_text_is_looked_for(name: str) -> None:
    assert ServerNames({"*.test": 1, "": 2}).find(name) in (1, 2)
