"""One request, from its arrival to its answer.

Steering answers at once, later (a Deferred), or in parts (a Work): these are made in
slices, a few at once, and stop if their client leaves; so does an answer that goes on
(a Stream, `control/streaming`).  A change that is under way goes on without its client.
Each of these two is logged: who asked, for what, and what became of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import suppress
from typing import Any, cast, get_args

from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import datetimeToString

from relayd.control.json_text import pieces
from relayd.control.openapi import document
from relayd.control.peers import Right
from relayd.control.reading import Heard, read
from relayd.control.routing import Asked, Route
from relayd.control.steering import Asker, Json, Refusal, Steering, Stream, Work
from relayd.control.streaming import Streams
from relayd.net.http_answers import Answers
from relayd.net.log_throttle import LogThrottle

log = Logger(namespace="relayd.control")

#: Long answers that are made at once; others wait.
MAX_WORKS = 4

#: Characters of a body that a line of the log has.
LOGGED = 500


class Exchanges:
    """What all requests of a site have in common.

    :param clock: of slices and timeouts.
    :param timeout: seconds for a client to take its answer.
    :param secrets: the keys of settings whose values are not logged.
    :param limits: returns where the site's own bounds stand, as /v1/limits has them.

    :ivar answers: those that are being made.
    :ivar streams: those that go on.
    :ivar strangers: how many requests came from those who may not ask for them.
    """

    def __init__(
        self,
        steering: Steering,
        clock: IReactorTime,
        timeout: float,
        secrets: Collection[str],
        limits: Callable[[], list[Json]],
    ) -> None:
        self.steering = steering
        self.answers = Answers(clock, timeout, log, "answer of the control socket")
        self.streams = Streams(clock)
        #: For long answers: who may only see is in no operator's way.
        self.works = {right: DeferredSemaphore(MAX_WORKS) for right in get_args(Right)}
        self.secrets = frozenset(secrets)
        self.limits = limits
        self.strangers = 0
        self._throttle = LogThrottle(clock)
        self._description: Json | None = None

    @property
    def description(self) -> Json:
        """What is served, as OpenAPI says it."""
        if self._description is None:
            self._description = document()
        return self._description

    def may_not(self, asker: Asker, what: str) -> None:
        """Somebody has asked for what they may not."""
        self.strangers += 1
        if self._throttle.is_due():
            log.warn(
                "{asker}: {what}: not allowed ({count} so far)",
                asker=asker,
                what=what,
                count=self.strangers,
            )


class Exchange:
    """A request and its answer.

    :param site: of the request.
    :param request: has arrived in whole.
    :param by: who asks, and what they may do.
    """

    def __init__(self, site: Exchanges, request: Any, by: Asker, right: Right) -> None:
        self._site = site
        self._request = request
        self._by = by
        self._right = right
        self._route: Route | None = None
        self._asked: Asked | None = None
        #: The connection is lost, or all is said.
        self._over = False
        self._place: Deferred[Any] | None = None
        #: What is waited for, if nothing changes by it.
        self._awaited: Deferred[Json] | None = None

    def begin(self) -> None:
        """Have it answered."""
        request, site = self._request, self._site
        request.notifyFinish().addBoth(self._end)
        heard = Heard(
            request.method.decode("ascii", "replace"),
            request.uri,
            request.clientproto,
            lambda name: request.requestHeaders.getRawHeaders(name) or [],
            request.content.getvalue(),
        )
        made: Json | Deferred[Json] | Work | Stream
        try:
            route, asked = read(heard, self._by, self._right, site.steering)
            if route is None:
                made = site.description
            else:
                self._route, self._asked = route, asked
                if route.streams:
                    self._stream(route)
                    return
                made = route.call(site.steering, asked)
        except Exception:
            self._fail(Failure())
            return
        if isinstance(made, Deferred):
            if route is not None and not route.changes:
                self._awaited = made
            made.addCallbacks(self._succeed, self._fail)
            made.addErrback(self._defect)
        elif isinstance(made, Generator):
            self._wait(made)
        else:
            self._succeed(cast(Json, made))

    def _end(self, _: object) -> None:
        """The answer is sent, or its client has left."""
        self._over = True
        if self._awaited is not None:
            # A change goes on; nobody else would read this.
            self._awaited.cancel()
        if self._place is None:
            return
        if self._place.called:
            self._site.works[self._right].release()
        else:
            self._place.cancel()

    # -- what goes on

    def _stream(self, route: Route) -> None:
        """Have an answer go on; of HEAD, say that it would.

        :raises Refusal: it can't.
        """
        site, request, asked = self._site, self._request, cast(Asked, self._asked)
        site.streams.check_place()
        stream = cast(Stream, route.call(site.steering, asked))
        self._head(200, {"content-type": route.streams})
        if request.method == b"HEAD":
            self._tell("done")
            request.finish()
            return
        site.streams.begin(request, stream, self._tell)

    # -- what Steering does in parts

    def _wait(self, work: Work) -> None:
        """Have it done once there is a place for it."""
        self._place = self._site.works[self._right].acquire()
        self._place.addCallbacks(
            lambda _: self._send(self._worked(work)), lambda _: work.close()
        )

    def _worked(self, work: Work) -> Iterator[bytes]:
        try:
            while True:
                try:
                    next(work)
                except StopIteration as made:
                    answer: Json = made.value
                    break
                yield b""
        except GeneratorExit:
            work.close()
            self._tell("stopped: its client has left")
            raise
        except Exception:
            yield from self._failed(Failure())
            return
        yield from self._succeeded(answer)

    # -- how it ends

    def _succeed(self, answer: Json) -> None:
        self._send(self._succeeded(answer))

    def _fail(self, reason: Failure) -> None:
        if self._over and reason.check(CancelledError):
            return
        self._send(self._failed(reason))

    def _defect(self, reason: Failure) -> None:
        log.failure("an answer could not be begun", reason)

    def _send(self, answer: Iterator[bytes]) -> None:
        if self._over:
            # What became of it is logged, and nobody reads it.
            next(answer, None)
            return
        self._site.answers.begin(self._request, answer)

    def _succeeded(self, answer: Json) -> Iterator[bytes]:
        self._tell("done")
        route, headers = self._route, {}
        if route is not None and self._asked is not None:
            if route.tag is not None:
                with suppress(Refusal):  # it is gone meanwhile
                    tag = route.tag(self._site.steering, self._asked)
                    headers["etag"] = f'"{tag}"'
            if route.answer == "Limits":
                answer = {**answer, "limits": answer["limits"] + self._site.limits()}
        self._head(200, headers)
        yield from pieces(answer)

    def _failed(self, reason: Failure) -> Iterator[bytes]:
        problem = reason.value
        if isinstance(problem, Refusal):
            status, problems = problem.status, problem.problems
            self._tell(f"{problem.outcome}, {status}: {'; '.join(problems)}")
            if status == 403:
                self._site.may_not(self._by, self._what())
        else:
            log.failure("{what} failed", reason, what=self._what())
            status, problems = 500, ["a defect of relayd: see its log"]
            self._tell("failed")
        self._head(status, getattr(problem, "headers", {}))
        yield from pieces({"problems": problems})

    def _head(self, status: int, headers: Json) -> None:
        if self._over:
            return
        request = self._request
        request.setResponseCode(status)
        own = {
            "server": "relayd",
            "date": datetimeToString().decode(),
            "content-type": "application/json",
            "cache-control": "no-store",
            "x-content-type-options": "nosniff",
        }
        for name, value in (own | headers).items():
            request.setHeader(name, value)

    # -- the log

    def _tell(self, outcome: str) -> None:
        """Log what has become of a change."""
        if self._route is not None and self._route.is_logged:
            log.info(
                "{asker}: {what}: {outcome}",
                asker=self._by,
                what=self._what(),
                outcome=outcome,
            )

    def _what(self) -> str:
        """What was asked for, on one line."""
        said = self._request.method + b" " + self._request.uri
        text = said.decode("latin-1").encode("unicode_escape").decode()
        given = {} if self._asked is None else self._asked.body
        shown = {
            key: self._without_secrets(value)
            for key, value in given.items()
            if value is not None
        }
        if shown:
            text = f"{text} {json.dumps(shown)}"
        return text if len(text) <= LOGGED else f"{text[:LOGGED]}..."

    def _without_secrets(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        secrets = self._site.secrets
        return {key: "***" if key in secrets else each for key, each in value.items()}
