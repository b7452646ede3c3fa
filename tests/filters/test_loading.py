"""How the filters of a relay are found and made, and what is said if they can't be."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest

from relayd.configuring.filter_settings import parse_filter
from relayd.core.errors import ConfigError
from relayd.core.filter_spec import FilterSpec
from relayd.core.filtering import FilterFactory, name_of
from relayd.core.setting_types import Kind
from relayd.filters import loading
from relayd.filters.built_in import BUILT_IN
from relayd.filters.loading import filter_of, filters_of
from relayd.operating.filtering import OF_FAULTS
from tests.support.filter_packages import Packages

#: A package's module.
CODE = """
from typing import Annotated, Literal
from relayd.filters import Filter, FilterFactory
from relayd.filters.option_types import Bytes, Milliseconds, Pattern

class Louder(FilterFactory):
    def __init__(
        self,
        by: int,
        *,
        word: Annotated[bytes, Bytes()] = b"",
        wait: Annotated[float, Milliseconds()] = 0.0,
        direction: Literal["up", "down"] | None = None,
        really: bool = False,
        much: float = 1.0,
        text: str = "",
    ) -> None:
        if by < 0:
            raise ValueError("by is how much: from 0 up")
        self.said = by, word, wait, direction, really, much, text

    def build_filter(self, way):
        return Filter()

class Seeking(FilterFactory):
    def __init__(self, pattern: Annotated[object, Pattern()], new: str):
        self.said = pattern, new

    def build_filter(self, way):
        return Filter()

class Dropping(FilterFactory):
    def build_datagram_filter(self, way):
        return None

class Both(Dropping):
    def build_filter(self, way):
        return None

class Neither(FilterFactory):
    pass

class Old:
    "No subclass of ours: what it has is what it serves."
    def build_filter(self, way):
        return None

def function():
    pass
"""


@pytest.fixture
def loud(packages: Packages) -> Packages:
    packages.install(
        "loudness",
        CODE,
        louder="loudness:Louder",
        seeking="loudness:Seeking",
        dropping="loudness:Dropping",
        both="loudness:Both",
        neither="loudness:Neither",
        old="loudness:Old",
        function="loudness:function",
        nothing="loudness:Nothing",
        missing="no_such_module:Louder",
    )
    return packages


def made(text: str, kind: Kind = "tcp") -> Any:
    return filter_of(parse_filter(text), kind)


def why_not(spec: str | FilterSpec, kind: Kind = "tcp") -> str:
    """What is said of a filter, behind the filter."""
    spec = parse_filter(spec) if isinstance(spec, str) else spec
    with pytest.raises(ConfigError) as told:
        filter_of(spec, kind)
    begin = f"filter {str(spec)!r}: "
    assert str(told.value).startswith(begin)
    assert len(str(told.value).splitlines()) == 1
    return str(told.value).removeprefix(begin)


@pytest.mark.usefixtures("loud")
@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("louder:3", (3, b"", 0.0, None, False, 1.0, "")),
        ("louder:by=-0", (0, b"", 0.0, None, False, 1.0, "")),
        (
            r"louder:3,word=a\n\,,wait=2s,direction=up,really=on,much=.5,text=\n",
            (3, b"a\n,", 2000.0, "up", True, 0.5, r"\n"),
        ),
        (
            FilterSpec("louder", {"by": 3, "wait": 7, "really": True, "much": 2}),
            (3, b"", 7.0, None, True, 2.0, ""),
        ),
        (
            FilterSpec("louder", {"by": "3", "wait": "7ms", "really": "on"}),
            (3, b"", 7.0, None, True, 1.0, ""),
        ),
    ],
)
def test_options_are_the_parameters_of_the_class(
    spec: str | FilterSpec, said: tuple[Any, ...]
) -> None:
    spec = parse_filter(spec) if isinstance(spec, str) else spec
    found: Any = filter_of(spec, "tcp")
    assert type(found).__name__ == "Louder"
    assert found.said == said
    # What sessions and the log call it.
    assert name_of(found) == "louder"


@pytest.mark.usefixtures("loud")
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("loud", "there is no such filter; did you mean louder?"),
        ("Slow-Close:1", "there is no such filter; did you mean slow_close?"),
        ("xyz", "there is no such filter; there are replace, deny, first, capture, "),
        ("louder", "it needs a value: louder:NUMBER, or by=NUMBER"),
        ("seeking:a", "it needs new=TEXT"),
        ("seeking:new=a", "it needs a value: seeking:PATTERN, or pattern=PATTERN"),
        ("louder:3,wrd=a", "it has no 'wrd'; did you mean word?"),
        ("louder:3,x=a", "it has no 'x'; there are by, word, wait, direction, "),
        (
            "seeking:user=root,new=a",
            (
                "it has no 'user'; there are pattern and new; if user=... is the value"
                " itself, write pattern=user=..."
            ),
        ),
        ("louder:3,by=4", "by is given twice"),
        ("louder:x", "bad by 'x': expected a whole number"),
        ("louder:1.5", "bad by '1.5': expected a whole number"),
        ("louder:3,wait=1y", "bad wait '1y': expected 0 to 100000000000 milliseconds"),
        ("louder:3,direction=left", "bad direction 'left': expected up or down"),
        ("louder:3,really=yes", "bad really 'yes': expected on or off"),
        ("louder:3,much=nan", "bad much 'nan': expected a number"),
        (r"louder:3,word=\q", r"bad word '\\q': \q is no escape: expected \n, "),
        ("louder:3,word=\\\x1b", r"bad word '\\\x1b': \\x1b is no escape: expected "),
        ("louder:3,word=\\\udc80", r"bad word '\\\udc80': \\udc80 is no escape: "),
        ("seeking:re:(,new=a", "bad pattern 're:(': it does not compile: missing )"),
        ("louder:-1", "by is how much: from 0 up"),
        ("dropping:a=1", "it is for datagrams, not for a relay of tcp"),
        ("both:a", "it has no options"),
        (
            "neither",
            "it has neither build_filter nor build_datagram_filter of its own",
        ),
        (
            "function",
            (
                "loudness:function of the package loudness 1.0 is no class of filter"
                " factories"
            ),
        ),
        (
            "nothing",
            (
                "loudness:Nothing of the package loudness 1.0 can't be imported:"
                " AttributeError: module 'loudness' has no attribute 'Nothing'"
            ),
        ),
        (
            "missing",
            (
                "no_such_module:Louder of the package loudness 1.0 can't be imported:"
                " ModuleNotFoundError: No module named 'no_such_module'"
            ),
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line(text: str, says: str) -> None:
    assert why_not(text).startswith(says)


@pytest.mark.usefixtures("loud")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"by": 1.5}, "bad by 1.5: expected a whole number"),
        ({"by": True}, "bad by True: expected a whole number"),
        ({"by": 10**20}, "bad by 100000000000000000000: expected a whole number"),
        ({"by": 3, "word": 5}, "bad word 5: expected 0 to 16384 bytes"),
        ({"by": 3, "text": 5}, "bad text 5: expected text"),
        ({"by": 3, "really": 1}, "bad really 1: expected true or false"),
        ({"by": 3, "much": float("inf")}, "bad much inf: expected a number"),
        ({"by": 3, "direction": 1}, "bad direction 1: expected up or down"),
    ],
)
def test_what_a_table_can_not_have(options: dict[str, Any], says: str) -> None:
    assert why_not(FilterSpec("louder", options)).startswith(says)


@pytest.mark.usefixtures("loud")
def test_how_one_is_written() -> None:
    assert loading.kind_of("louder").usage() == (
        "louder:[by=]NUMBER[,word=BYTES][,wait=MILLISECONDS][,direction=up|down]"
        "[,really=on|off][,much=NUMBER][,text=TEXT]"
    )
    assert loading.kind_of("both").usage() == "both"
    assert (
        loading.kind_of("latency")
        .usage()
        .startswith("latency:[latency=]MILLISECONDS[,jitter=")
    )
    assert loading.kind_of("slow_close").usage({"seed", "toxicity"}) == (
        "slow_close:[delay=]MILLISECONDS[,direction=up|down]"
    )
    assert (
        loading.kind_of("timeout")
        .usage()
        .startswith("timeout[:[timeout=]MILLISECONDS][")
    )


@pytest.mark.usefixtures("loud")
def test_a_filter_serves_what_its_class_overrides() -> None:
    serves = {
        "louder:1": ["tcp", "socks4"],
        "dropping": ["udp"],
        "both": ["tcp", "udp", "socks4"],
        "old": ["tcp", "socks4"],
    }
    kinds: tuple[Kind, ...] = ("tcp", "udp", "socks4")
    for text, own in serves.items():
        for kind in kinds:
            if kind in own:
                made(text, kind)
            else:
                assert why_not(text, kind).endswith(f", not for a relay of {kind}")
    assert why_not("old", "udp") == "it is for connections, not for a relay of udp"


@pytest.mark.usefixtures("loud")
def test_all_that_is_wrong_is_said_at_once() -> None:
    specs = [parse_filter(each) for each in ("loud", "louder:1", "louder:x")]
    with pytest.raises(ConfigError) as told:
        filters_of(specs, "tcp")
    assert [line[:17] for line in str(told.value).splitlines()] == [
        "filter 'loud': th",
        "filter 'louder:x'",
    ]
    assert [type(each).__name__ for each in filters_of(specs[1:2], "tcp")] == ["Louder"]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit('gone')", "SystemExit: gone"),
        ("class", "SyntaxError: invalid syntax (broken.py, line 1)"),
        ("raise ValueError('a\\nb')", "ValueError: a b"),
        ("raise ImportError", "ImportError"),
        ("open('/no/such')", "/no/such: No such file or directory"),
    ],
)
def test_a_package_that_can_not_be_imported(
    packages: Packages, code: str, says: str
) -> None:
    packages.install("broken", code, broken="broken:Broken")
    assert why_not("broken") == (
        f"broken:Broken of the package broken 1.0 can't be imported: {says}"
    )


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise ValueError('no\\nway')", "no way"),
        ("raise ValueError('no way', self)", "no way"),
        ("raise ValueError", "ValueError"),
        ("open('/no/such/file', 'a')", "/no/such/file: No such file or directory"),
        ("1 / 0", "ZeroDivisionError: division by zero (in the package bad 1.0)"),
        ("exit()", "SystemExit: None (in the package bad 1.0)"),
    ],
)
def test_a_class_may_raise_anything(packages: Packages, code: str, says: str) -> None:
    packages.install(
        "bad",
        f"""
class Bad:
    def __init__(self):
        {code}
    def build_filter(self, way):
        return None
""",
        bad="bad:Bad",
    )
    assert why_not("bad").startswith(says)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ("self, a: bytes", "its parameter a can't be an option: annotate it as str, "),
        ("self, a: 'NoSuch'", "its annotations can't be read: name 'NoSuch' is not"),
        ("self, a, /", "its parameter a takes no keyword"),
        ("self, name: str", "its parameter name is what a file calls the filter"),
        ("self, a: int | str", "its parameter a can't be an option: annotate it as"),
    ],
)
def test_a_class_whose_parameters_are_no_options(
    packages: Packages, parameters: str, says: str
) -> None:
    packages.install(
        "bad",
        f"""
class Bad:
    def __init__({parameters}):
        pass
    def build_filter(self, way):
        return None
""",
        bad="bad:Bad",
    )
    assert why_not("bad:1").startswith(f"bad:Bad of the package bad 1.0: {says}")


def test_annotations_are_read_wherever_they_were_written(packages: Packages) -> None:
    """Texts, of attrs, of a dataclass, and of a base class in another module."""
    packages.install(
        "base",
        """
from __future__ import annotations
from typing import Literal
import attrs
from relayd.filters import FilterFactory
Way = Literal["up", "down"]

@attrs.frozen(kw_only=True)
class Base(FilterFactory):
    direction: Way = "down"
    def build_filter(self, way):
        return None
""",
    )
    packages.install(
        "further",
        """
from __future__ import annotations
import dataclasses
from typing import Annotated
import attrs
from base import Base
from relayd.filters import FilterFactory
from relayd.filters.option_types import Size

@attrs.frozen
class Attrs(Base):
    _size: Annotated[int, Size] = attrs.field(converter=lambda size: size + 1)
    plain = 5

@dataclasses.dataclass
class Data(FilterFactory):
    size: Annotated[int | None, "how many", Size()] = None
    def build_filter(self, way):
        return None
""",
        an_attrs="further:Attrs",
        data="further:Data",
    )
    found = made("an_attrs:1KiB,direction=up")
    assert (found._size, found.direction) == (1025, "up")
    assert made("an_attrs:1KiB") == made("an_attrs:size=1024")
    assert why_not("an_attrs:1,direction=x").startswith("bad direction 'x': expected")
    assert made("data:2kB").size == 2000
    assert made("data").size is None


# -- names


def test_a_package_can_not_take_a_name_of_ours(packages: Packages) -> None:
    """And is in nobody's way who does not use that name."""
    packages.install("thief", CODE, replace="thief:Both", both="thief:Both")
    assert why_not("replace:old=a,new=b") == (
        "the package thief 1.0 brings one of this name, too, which is relayd's own:"
        " uninstall it, or name its filter otherwise"
    )
    made("both")


def test_two_packages_can_not_have_one_name(packages: Packages) -> None:
    packages.install("one", CODE, both="one:Both", neither="one:Neither")
    packages.install("two", CODE, both="two:Both")
    said = why_not("both")
    assert "the package one 1.0" in said
    assert "the package two 1.0" in said
    assert said.endswith(" bring one of this name each: uninstall one")


def test_a_long_text_is_not_quoted_whole(packages: Packages) -> None:
    del packages
    with pytest.raises(ConfigError) as told:
        made(f"none:{'x' * 5000}")
    assert len(str(told.value)) < 600


def test_a_defect_is_not_hidden_from_programs(loud: Packages) -> None:
    """The line is for operators; what it was made of is its cause."""
    del loud
    with pytest.raises(ConfigError) as told:
        made("missing")
    assert isinstance(told.value.__cause__, ModuleNotFoundError)


# -- ours


@pytest.mark.parametrize("name", BUILT_IN)
def test_ours_are_what_the_table_says(name: str, tmp_path: Path) -> None:
    """Found, with options that can be read, and for a kind of relay."""
    module, _, found = BUILT_IN[name].where.partition(":")
    kind = loading.kind_of(name)
    assert kind.made_by is getattr(importlib.import_module(module), found)
    assert issubclass(kind.made_by, FilterFactory)
    assert kind.made_by.name in ("", name)
    assert attrs.has(kind.made_by), "equal options make equal filters"
    of_flows = name in ("loss", "duplicate", "reorder", "corrupt")
    assert kind.serves("tcp") is not of_flows
    assert kind.serves("udp") is (of_flows or name == "latency")
    assert kind.serves("tcp") == kind.serves("socks4")
    for each in kind.parameters:
        assert each.placeholder.isascii()
        assert each.type.describe()
    assert BUILT_IN[name].said.isascii()
    assert BUILT_IN[name].examples
    for text in BUILT_IN[name].examples:
        spec = parse_filter(text.replace("/var/tmp", str(tmp_path)))
        assert spec.name == name
        served: list[Kind] = [k for k in ("tcp", "udp") if kind.serves(k)]
        one, other = (filter_of(spec, served[0]) for _ in range(2))
        assert one == other


#: The rows of the table in docs/filters.md: names, and options.
ROWS = re.findall(
    r"^\| ((?:`[a-z_]+`(?:, )?)+) \| (.*?) \| .* \|$",
    (Path(__file__).parents[2] / "docs" / "filters.md").read_text(),
    re.MULTILINE,
)


def test_the_page_has_the_options_of_each() -> None:
    """With their defaults, where it says one; those of faults are said below it."""
    found = set()
    for names, said in ROWS:
        options = dict(
            re.match(r"(\w+)=?(.*)", each).groups()  # type: ignore[union-attr]
            for each in re.findall(r"`([^`]+)`", said)
        )
        of_faults = OF_FAULTS if "…" in said or "those of faults" in said else set()
        for name in re.findall(r"`(\w+)`", names):
            kind = loading.kind_of(name)
            found.add(name)
            own = {each.name: each for each in kind.parameters}
            assert set(options) == set(own) - of_faults
            for option, text in options.items():
                if text:
                    default = inspect.signature(kind.made_by).parameters[option].default
                    assert own[option].read(text) == default
    assert found == set(BUILT_IN)


def test_nothing_is_imported_that_no_relay_uses(tmp_path: Path) -> None:
    """Not even what finds them; a relay of none starts as fast as before."""
    code = """
import sys
from relayd.tap.relayd import Options
from relayd.operating.relays import unit_of
options = Options()
options.parseOptions(["-l", "127.0.0.1:0", "-d", "127.0.0.1:1"])
print(*[each for each in sys.modules if each.startswith("relayd.filters")])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout.split() == []
