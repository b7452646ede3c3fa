"""Who hears of sessions, the line that says how one ended, and what is behind both."""

from __future__ import annotations

import json
from io import StringIO
from typing import Any

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from twisted.internet.address import UNIXAddress
from twisted.logger import (
    LogEvent,
    LogLevel,
    capturedLogs,
    formatEvent,
    formatEventAsClassicLogText,
    jsonFileLogObserver,
)
from zope.interface.verify import verifyObject

from relayd.core.addresses import address_name
from relayd.core.flows import Counters, FlowFacts
from relayd.core.interfaces import IObserver
from relayd.core.observers import Observer, Observers
from relayd.core.session import Direction, Ending, Session
from relayd.observing.log_fields import are_fields, as_fields
from relayd.observing.session_log import (
    QuietSessionLog,
    SessionLog,
    VerboseSessionLog,
)
from tests.conftest import LoggedFailures

HOOKS = ("opened", "dialing", "connected", "closed", "refused")


def direction(count: int) -> Direction:
    """One that has ended."""
    made = Direction()
    made.read, made.eof = count, True
    return made


def a_session(**facts: Any) -> Session:
    """A session that is over."""
    made = Session(
        id=7,
        ordinal=3,
        client="192.0.2.1:50000",
        listener="192.0.2.2:80",
        opened_at=100.0,
        relay="web",
        upstream="192.0.2.3:8080",
        dialed_at=100.0,
        attempts=1,
        connected_at=100.25,
        ended_at=101.5,
        up=direction(10),
        down=direction(20),
        ending=Ending.DONE,
    )
    for name, fact in facts.items():
        setattr(made, name, fact)
    return made


def tell_all(observer: Any, session: Session) -> None:
    """Call every hook."""
    for name in HOOKS:
        why = ["full"] if name == "refused" else []
        getattr(observer, name)(session, *why)


class Everything:
    """Hears everything; no subclass of Observer."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def opened(self, session: Session) -> None:
        self.heard.append(("opened", session))

    def dialing(self, session: Session) -> None:
        self.heard.append(("dialing", session))

    def connected(self, session: Session) -> None:
        self.heard.append(("connected", session))

    def closed(self, session: Session) -> None:
        self.heard.append(("closed", session))

    def refused(self, session: Session, why: str) -> None:
        self.heard.append(("refused", session, why))


class Ends(Observer):
    """Wants to hear of ends only."""

    def __init__(self) -> None:
        self.heard: list[Session] = []

    def closed(self, session: Session) -> None:
        self.heard.append(session)


class Broken(Observer):
    """Raises whenever it hears of an upstream."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def opened(self, session: Session) -> None:
        self.heard.append("opened")

    def dialing(self, session: Session) -> None:
        self.heard.append("dialing")
        raise ZeroDivisionError("of the observer")

    def closed(self, session: Session) -> None:
        self.heard.append("closed")


# -- several observers


def test_everyone_hears_everything_in_order() -> None:
    """Each hook, with its arguments, in the order in which they were given."""
    first, second = Everything(), Everything()
    second.heard = first.heard
    session = a_session()
    tell_all(Observers(first, second), session)
    assert (
        first.heard
        == [fact for name in HOOKS[:-1] for fact in [(name, session)] * 2]
        + [("refused", session, "full")] * 2
    )


def test_a_subclass_hears_what_it_overrides() -> None:
    """The rest costs nothing and disturbs nobody."""
    ends, session = Ends(), a_session()
    tell_all(Observers(ends), session)
    assert ends.heard == [session]
    tell_all(Observers(Observer()), session)
    tell_all(Observers(), session)


def test_observers_are_an_observer() -> None:
    """So are all of ours; several may be nested."""
    ends, session = Ends(), a_session()
    observers = Observers(Observers(ends), ends)
    for observer in (observers, Observer(), SessionLog(), VerboseSessionLog()):
        assert verifyObject(IObserver, observer)
    observers.closed(session)
    assert ends.heard == [session, session]


def test_an_observer_that_raises_is_logged_and_dropped(
    logged_failures: LoggedFailures,
) -> None:
    """Once, with its traceback; the others hear this and all that follows."""
    before, broken, after = Everything(), Broken(), Everything()
    observers = Observers(before, broken, after)
    session = a_session()
    tell_all(observers, session)
    tell_all(observers, session)
    assert broken.heard == ["opened", "dialing"]
    assert len(before.heard) == len(after.heard) == 2 * len(HOOKS)
    assert "in dialing" in logged_failures.take("of the observer")


def test_the_log_names_the_observer_that_failed(
    logged_failures: LoggedFailures,
) -> None:
    """Its operator has to find it."""
    with capturedLogs() as events:
        Observers(Broken()).dialing(a_session())
    [event] = events
    assert event["log_level"] is LogLevel.critical
    assert "Broken object" in formatEvent(event)
    assert "failed in dialing and is not called again" in formatEvent(event)
    logged_failures.take("of the observer")


def test_one_of_two_alike_is_dropped(logged_failures: LoggedFailures) -> None:
    """The one that raised, not its kind."""
    sound, broken = Ends(), Ends()
    broken.heard = None  # type: ignore[assignment]
    observers = Observers(broken, sound)
    observers.closed(a_session())
    observers.closed(a_session())
    assert len(sound.heard) == 2
    assert logged_failures.take("NoneType")


@pytest.mark.parametrize("depth", range(4))
@pytest.mark.parametrize("relays", [1, 2])
def test_an_observer_within_others_is_dropped(
    logged_failures: LoggedFailures, depth: int, relays: int
) -> None:
    """At any depth, and by every relay that has it from the same others."""
    broken, sound = Broken(), Everything()
    shared: Any = broken
    for _ in range(depth):
        shared = Observers(shared, sound)
    factories = [Observers(shared) for _ in range(relays)]
    session = a_session()
    for _ in range(3):
        for each in factories:
            tell_all(each, session)
    failures = relays if depth == 0 else 1
    assert broken.heard.count("dialing") == failures
    for _ in range(failures):
        assert "in dialing" in logged_failures[0]
        logged_failures.pop(0)
    heard = 3 * relays * depth
    assert len(sound.heard) == heard * len(HOOKS)


def test_an_observer_that_is_there_twice_is_dropped_twice(
    logged_failures: LoggedFailures,
) -> None:
    """Once it has raised nobody calls it, wherever it stands."""
    broken = Broken()
    whole = Observers(Observers(broken), broken, Observers(Observers(broken)))
    whole.dialing(a_session())
    # The round in which it raises goes on.
    assert len(broken.heard) == 3
    logged_failures.clear()
    whole.dialing(a_session())
    assert len(broken.heard) == 3


def test_a_hook_that_is_no_method_is_dropped(logged_failures: LoggedFailures) -> None:
    """By what it belongs to: a function, somebody else's method, something callable."""

    class Callable:
        def __call__(self, session: Session) -> None:
            raise ZeroDivisionError("of the hook")

        def method(self, session: Session) -> None:
            raise ZeroDivisionError("of the hook")

    for hook in (Callable(), Callable().method, lambda _: Callable()(_)):
        odd, ends = Everything(), Ends()
        odd.closed = hook  # type: ignore[assignment]
        observers = Observers(odd, ends)
        for _ in range(3):
            observers.closed(a_session())
            observers.opened(a_session())
        logged_failures.take("of the hook")
        assert len(ends.heard) == 3
        assert odd.heard == []


def test_an_observer_that_can_not_even_be_shown(
    logged_failures: LoggedFailures,
) -> None:
    """It is dropped all the same."""

    class Hidden(Broken):
        def __repr__(self) -> str:
            raise ZeroDivisionError("of its name")

    hidden, ends = Hidden(), Ends()
    observers = Observers(hidden, ends)
    for _ in range(2):
        tell_all(observers, a_session())
    logged_failures.take("Hidden object")
    assert len(ends.heard) == 2


# -- the line of a session


def logged(observer: Any, hook: str, *facts: Any) -> LogEvent:
    """The one event that a hook logs."""
    with capturedLogs() as events:
        getattr(observer, hook)(*facts)
    [event] = events
    assert event["log_namespace"] == "relayd.session"
    assert event["log_level"] is LogLevel.info
    return event


def test_the_line_of_a_session() -> None:
    """Its fields, in their order; README and users' scripts rely on them."""
    event = logged(SessionLog(), "closed", a_session())
    assert formatEvent(event) == (
        "session=7 relay=web client=192.0.2.1:50000 listener=192.0.2.2:80"
        " upstream=192.0.2.3:8080 connect=0.250 attempts=1 duration=1.500"
        " up=10 down=20 ending=done code=--"
    )


def test_the_line_of_a_session_that_had_no_upstream() -> None:
    """A dash keeps the place, and a detail comes last, in quotes."""
    event = logged(
        SessionLog(),
        "closed",
        a_session(
            upstream="",
            attempts=0,
            connected_at=None,
            ending=Ending.NO_UPSTREAM,
            detail="it's\nempty",
        ),
    )
    assert formatEvent(event) == (
        "session=7 relay=web client=192.0.2.1:50000 listener=192.0.2.2:80"
        " upstream=- connect=- attempts=0 duration=1.500 up=10 down=20"
        ' ending=no_upstream code=SC detail="it\'s\\nempty"'
    )


def test_the_line_of_a_client_turned_away() -> None:
    """A refusal has the same line; the reason is its detail."""
    session = a_session(ending=Ending.REFUSED, detail="too many", upstream="")
    refused = logged(SessionLog(), "refused", session, "too many")
    assert formatEvent(refused) == formatEvent(logged(SessionLog(), "closed", session))
    assert "ending=refused code=PR detail='too many'" in formatEvent(refused)


def test_the_line_names_the_balancer_if_that_is_not_the_client() -> None:
    plain = logged(SessionLog(), "closed", a_session(peer="192.0.2.1:50000"))
    assert " peer=" not in formatEvent(plain)
    behind = logged(SessionLog(), "closed", a_session(peer="192.0.2.9:4000"))
    assert " client=192.0.2.1:50000 peer=192.0.2.9:4000 listener=" in formatEvent(
        behind
    )
    assert behind["peer"] == "192.0.2.9:4000"


def test_the_quiet_log_leaves_out_those_that_ended_well() -> None:
    """What both sides ended, with all of it delivered, is no news; the rest is."""
    log = QuietSessionLog()
    with capturedLogs() as events:
        log.closed(a_session())
    assert events == []
    reset = a_session(ending=Ending.UPSTREAM_RESET)
    for event in (logged(log, "closed", reset), logged(log, "refused", reset, "")):
        assert " ending=upstream_reset " in formatEvent(event)


def test_a_session_without_an_ending_has_a_line_all_the_same() -> None:
    """Nobody should report one, and nobody should fail over it."""
    event = logged(SessionLog(), "closed", a_session(ending=None, ended_at=None))
    assert "duration=0.000" in formatEvent(event)
    assert formatEvent(event).endswith(" ending= code=")


def test_the_event_carries_the_same_facts() -> None:
    """For those who log as JSON: every field under the name it has in the line."""
    event = logged(SessionLog(), "closed", a_session(detail="because"))
    fields = {key: event[key] for key in event if not key.startswith("log_")}
    fields.pop("line")
    assert fields == {
        "session": 7,
        "relay": "web",
        "peer": "",
        "client": "192.0.2.1:50000",
        "listener": "192.0.2.2:80",
        "upstream": "192.0.2.3:8080",
        "connect": 0.25,
        "attempts": 1,
        "duration": 1.5,
        "up": 10,
        "down": 20,
        "ending": "done",
        "code": "--",
        "detail": "because",
    }
    out = StringIO()
    jsonFileLogObserver(out, recordSeparator="")(event)
    written = json.loads(out.getvalue())
    assert {key: written[key] for key in fields} == fields


class Fact:
    """Has no text."""

    def __str__(self) -> str:
        raise ZeroDivisionError("of the fact")

    def __repr__(self) -> str:
        raise ZeroDivisionError("of the fact")


class WithFacts(Session):
    """A session of somebody's own; `facts` may be anything, as may be in them."""

    own: Any = None

    @property
    def facts(self) -> Any:
        if isinstance(self.own, Exception):
            raise self.own
        return self.own


def with_facts(facts: Any) -> Session:
    """One that is over."""
    made = a_session()
    session = WithFacts(
        **{
            each.name: getattr(made, each.name)
            for each in attrs.fields(Session)
            if each.init
        }
    )
    session.own = facts
    return session


PLAIN = formatEvent(
    {
        "log_format": "session=7 relay=web client=192.0.2.1:50000"
        " listener=192.0.2.2:80 upstream=192.0.2.3:8080 connect=0.250"
        " attempts=1 duration=1.500 up=10 down=20 ending=done code=--"
    }
)


def test_a_session_may_have_facts_of_its_own() -> None:
    """They follow in their order, and the event has them as they are."""
    event = logged(SessionLog(), "closed", with_facts({"zone": "b", "cost": 3}))
    assert formatEvent(event) == f"{PLAIN} zone=b cost=3"
    assert (event["zone"], event["cost"]) == ("b", 3)


@pytest.mark.parametrize(
    "name",
    [
        *("session", "relay", "client", "listener", "upstream", "duration"),
        *("up", "down", "ending", "code", "detail", "line", "level", "format", "self"),
        *("log_time", "log_level", "log_namespace", "log_anything", "log_format"),
        *("message", "time", "system", "isError", "failure", "why"),
    ],
)
def test_a_fact_named_like_a_field_is_renamed(name: str) -> None:
    """The line's own fields and the logger's are what they were."""
    plain = logged(SessionLog(), "closed", a_session())
    log = SessionLog()
    session = with_facts({"before": 1, name: "X", "after": 2})
    for _ in range(2):
        event = logged(log, "closed", session)
        assert formatEvent(event) == f"{PLAIN} before=1 fact_{name}=X after=2"
        assert event[f"fact_{name}"] == "X"
        for field in {name, *plain} - {"line", "log_time", "log_source"}:
            assert event.get(field) == plain.get(field)
        assert lines(event) == 1


def test_a_renamed_fact_takes_nobodys_place() -> None:
    event = logged(
        SessionLog(), "closed", with_facts({"level": 1, "fact_level": 2, "line": 3})
    )
    assert formatEvent(event) == f"{PLAIN} fact_fact_level=1 fact_level=2 fact_line=3"


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"a": 1, "bad": Fact(), "z": 2}, " a=1 z=2"),
        ({"a": 1, 5: "x", "z": 2}, " a=1 z=2"),
        ({"a": 1, None: Fact(), b"z": 2}, " a=1"),
        (ZeroDivisionError("of the facts"), ""),
        (17, ""),
        (["a"], ""),
    ],
    ids=["text", "name", "both", "raises", "number", "list"],
)
def test_a_fact_that_can_not_be_said_costs_itself(
    logged_failures: LoggedFailures, facts: Any, says: str
) -> None:
    """And says so once, however many sessions have it; the line is written."""
    log = SessionLog()
    observers = Observers(log)
    with capturedLogs() as events:
        for _ in range(3):
            observers.closed(with_facts(facts))
            observers.closed(a_session())
    said = [formatEvent(event) for event in events if "session" in event]
    assert said == [f"{PLAIN}{says}", PLAIN] * 3
    logged_failures.take("a fact of a session can't be logged")


@given(
    st.dictionaries(
        st.text(max_size=12) | st.sampled_from(["level", "log_x", "fact_level", "up"]),
        st.text() | st.integers() | st.none(),
        max_size=6,
    )
)
def test_no_facts_keep_a_session_from_its_line(facts: dict[str, Any]) -> None:
    """All of them are in it, whatever they are called."""
    event = logged(SessionLog(), "closed", with_facts(facts))
    assert (event["up"], event["session"], event["log_format"]) == (10, 7, "{line}")
    values = [event[key] for key in event if key in facts or key.startswith("fact_")]
    assert all(fact in [*values, 10] for fact in facts.values())
    assert lines(event) == 1


def test_the_facts_of_flows_are_fields() -> None:
    """Those that there are need no other name; one that does gets it."""
    for kind in (FlowFacts, Counters):
        assert are_fields(tuple(attrs.fields_dict(kind)), frozenset())
    facts = {"level": 1, "client": 2}
    assert as_fields(facts) == {"fact_level": 1, "client": 2}
    assert facts == {"level": 1, "client": 2}


def test_the_plain_log_says_nothing_before_the_end() -> None:
    """One session, one line."""
    with capturedLogs() as events:
        for hook in ("opened", "dialing", "connected"):
            getattr(SessionLog(), hook)(a_session())
            getattr(Observers(SessionLog()), hook)(a_session())
    assert events == []


def test_the_verbose_log_says_every_step() -> None:
    """A line for each, and at the end the same as ever."""
    log, session = VerboseSessionLog(), a_session()
    assert formatEvent(logged(log, "opened", session)) == (
        "opened session=7 relay=web client=192.0.2.1:50000 listener=192.0.2.2:80"
    )
    for hook in ("dialing", "connected"):
        assert formatEvent(logged(log, hook, session)) == (
            f"{hook} session=7 relay=web upstream=192.0.2.3:8080"
        )
    assert formatEvent(logged(log, "closed", session)) == formatEvent(
        logged(SessionLog(), "closed", session)
    )


def lines(event: LogEvent) -> int:
    """How many lines twistd writes for an event."""
    text = formatEventAsClassicLogText(event)
    assert text is not None
    assert "Unable to format" not in text
    return len(text.splitlines())


@given(st.text() | st.text("{}!r:.0[]\n\r\x1b\u2028 '\"\\=%"))
@example("{line}{session!r}{}")
@example("the\nline\r\nends\u2028here")
def test_a_detail_never_breaks_the_line(text: str) -> None:
    """It may quote what a peer or a program said, and has one line all the same."""
    event = logged(SessionLog(), "closed", a_session(detail=text))
    assert lines(event) == 1
    assert event["detail"] == text


def test_a_hostile_name_never_breaks_the_line() -> None:
    """Whoever chose the name, every line of the log is one event's."""
    broken = set()
    for field in ("client", "listener", "upstream"):
        for text in ("{line}{session!r}{}", "unix:/a\nb", "unix:/a\rb"):
            session = a_session(**{field: text})
            for log in (SessionLog(), VerboseSessionLog()):
                with capturedLogs() as events:
                    tell_all(log, session)
                if any(lines(event) != 1 for event in events):
                    broken.add((field, text))
    assert not broken


def test_a_unix_client_can_not_write_the_log() -> None:
    """It may bind its socket to any name, even one that looks like a line's fields."""
    forged = b"/tmp/x\nsession=8 client=10.0.0.1:1 ending=done code=--"
    session = a_session(client=address_name(UNIXAddress(forged)))
    text = formatEvent(logged(SessionLog(), "closed", session))
    assert len(text.splitlines()) == 1
    assert text.split().count("ending=done") == 1


# -- sessions and their endings


def test_every_ending_has_a_word_of_its_own() -> None:
    """Words are metric labels."""
    words = [ending.word for ending in Ending]
    assert len(set(words)) == len(words)
    for ending in Ending:
        assert ending.word == ending.name.lower()


def test_every_ending_has_two_letters_that_operators_know() -> None:
    """HAProxy's: who ended it (by a timeout, if small), and what was going on.

    A request that is read, connecting or transferring data; `--` is a good end, and
    what they filter out.
    """
    codes = {
        "--": {Ending.DONE},
        "CC": {Ending.CLIENT_LEFT},
        "SC": {
            Ending.CONNECT_REFUSED,
            Ending.CONNECT_FAILED,
            Ending.UNRESOLVED,
            Ending.NO_UPSTREAM,
        },
        "PC": {Ending.WRONG_PEER},
        "sC": {Ending.CONNECT_TIMEOUT, Ending.BIND_TIMEOUT},
        "CD": {Ending.DOWNSTREAM_RESET, Ending.DOWNSTREAM_WRITE_FAILED},
        "SD": {Ending.UPSTREAM_RESET, Ending.UPSTREAM_WRITE_FAILED},
        "cD": {
            Ending.DOWNSTREAM_LOST,
            Ending.DOWNSTREAM_STALLED,
            Ending.IDLE,
            Ending.HALF_CLOSED,
        },
        "sD": {Ending.UPSTREAM_LOST, Ending.UPSTREAM_STALLED},
        "IR": {Ending.ROUTE_FAILED},
        "PR": {
            Ending.REFUSED,
            Ending.LOOP,
            Ending.BAD_REQUEST,
            Ending.EVICTED,
            Ending.DENIED,
            Ending.IDENT_FAILED,
        },
        "cR": {Ending.HANDSHAKE_TIMEOUT},
        "DD": {Ending.UPSTREAM_DOWN},
        "KD": {Ending.DRAINED, Ending.KILLED, Ending.MAX_AGE, Ending.HOURS},
        "ID": {Ending.FAILED, Ending.FILTER_FAILED},
        "PD": {Ending.FILTERED},
    }
    assert codes == {
        code: {each for each in Ending if each.code == code}
        for code in {each.code for each in Ending}
    }


def test_a_session_lasts_from_accept_to_end() -> None:
    """And has no duration while it lives."""
    assert a_session().duration == 1.5
    assert a_session(ended_at=None).duration == 0.0


def test_sessions_are_told_apart_and_share_nothing() -> None:
    """Two with the same facts are two, each with counters of its own."""
    one, two = (Session(1, "a", "b", 0.0) for _ in range(2))
    assert one != two
    assert len({one, two}) == 2
    one.up.read += 1
    assert (one.down.read, two.up.read) == (0, 0)
