"""Asks a running relayd over its control socket: HTTP/1.1 and JSON over a UNIX socket.

Each request has a connection of its own, an answer of bounded size, and a time by
which the whole of it must have arrived; but for an answer that goes on
(:class:`GoingOn`), which is read as it comes.  Whatever goes wrong is one clear line,
or what relayd says itself, with the exit code that scripts go by: see :func:`exit_of`.
"""

from __future__ import annotations

import json
import os
import pwd
import socket
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import quote, urlencode

from relayd.ctl.amounts import printable
from relayd.ctl.exits import CommandFailed, Exit
from relayd.ctl.places import VARIABLE, candidates

Json = dict[str, Any]

#: Within how many seconds an answer arrives: of a question, and of a change, which may
#: look up names and bind addresses.
QUESTION, CHANGE = 30.0, 120.0

#: The same where somebody waits for a completion.
AT_ONCE = 0.3

#: Within how many seconds an answer that goes on has ended, once no more is wanted.
TAIL = 5.0

#: The longest answer, in bytes: of 100,000 sessions it has some 50 MB.
LONGEST = 1 << 28

_PIECE = 1 << 20

#: How much of what is no answer is quoted, in characters.
_QUOTED = 80

#: The exit code of a status; of others, it is refused.
_EXITS: Mapping[int, Exit] = {
    400: Exit.INVALID,
    404: Exit.NOT_FOUND,
    422: Exit.INVALID,
    500: Exit.FAILED,
}

_WHERE = f"say where it is with --control or {VARIABLE}"


def exit_of(status: int) -> Exit:
    """The exit code of a status of HTTP that relayd refuses with."""
    return _EXITS.get(status, Exit.REFUSED)


def route(*parts: str) -> str:
    """The path of a resource, below /v1."""
    quoted = (quote(part, safe="", errors="surrogateescape") for part in parts)
    return "/".join(("/v1", *quoted))


def find_socket(control: str | None) -> str:
    """The path of the socket, which is there, whether or not anybody listens.

    :raises CommandFailed: it is not.
    """
    tried = candidates(control)
    hidden = ""
    for path in tried:
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError:
            hidden = hidden or path
            continue
        except (OSError, ValueError) as problem:
            raise _unreachable(path, _reason(problem)) from None
        if not stat.S_ISSOCK(found.st_mode):
            raise _unreachable(path, f"it is not a socket; {_WHERE}")
        return path
    if hidden:
        raise _not_permitted(hidden)
    raise _unreachable(
        " or ".join(tried),
        f"there is no such socket; start relayd with --control unix:PATH, or {_WHERE}",
    )


class ControlClient:
    """Speaks to one running relayd.

    :param control: where its socket is: a path, or `unix:PATH`.  Default: as
        relayctl(1) says.
    """

    def __init__(self, control: str | None = None) -> None:
        self._control = control

    def get(
        self,
        path: str,
        query: Mapping[str, Any] | None = None,
        *,
        within: float = QUESTION,
    ) -> Json:
        """Ask for something; what is None in the query is left out.

        :param within: seconds.
        :raises CommandFailed: there is no answer, or a refusal.
        """
        return self._ask("GET", path + _asked(query), within)[0]

    def get_tagged(self, path: str) -> tuple[Json, str]:
        """The same, and the ETag of what it is about; empty if it has none."""
        return self._ask("GET", path, QUESTION)

    def change(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any],
        *,
        takes: float = 0.0,
        tag: str = "",
    ) -> Json:
        """Change something.

        :param takes: the seconds that it may take by itself.
        :param tag: change it only if this is its ETag still.
        :raises CommandFailed: there is no answer, or a refusal.
        """
        content = json.dumps(body).encode()
        more = {"If-Match": tag} if tag else {}
        return self._ask(method, path, CHANGE + takes, content, more)[0]

    @contextmanager
    def going_on(
        self, path: str, query: Mapping[str, Any] | None = None
    ) -> Iterator[GoingOn]:
        """Ask for an answer that goes on, until the end of the block.

        :raises CommandFailed: there is no answer, or a refusal.
        """
        where = find_socket(self._control)
        connection = _Connection(where, QUESTION)
        try:
            response = _begun(where, connection, path + _asked(query))
            yield GoingOn(connection, response)
        finally:
            connection.end()

    def _ask(
        self,
        method: str,
        path: str,
        within: float,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[Json, str]:
        where = find_socket(self._control)
        connection = _Connection(where, within)
        try:
            _connect(where, connection)
            try:
                with connection.ask(method, path, body, headers) as response:
                    content = _content(response)
            except (OSError, HTTPException, ValueError) as problem:
                raise _no_answer(where, connection, method, problem) from None
            if connection.late:
                # What was cut off looks like an answer that has ended.
                raise _no_answer(where, connection, method, TimeoutError())
        finally:
            connection.end()
        answer = _answer(where, response.status, content)
        return answer, response.getheader("ETag", "")


class GoingOn:
    """An answer that goes on: its blocks, as they come."""

    def __init__(self, connection: _Connection, response: HTTPResponse) -> None:
        self._connection = connection
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        """:raises CommandFailed: it was cut off."""
        while True:
            try:
                piece = self._response.read1(_PIECE)
            except (OSError, HTTPException, ValueError):
                piece = None
            if piece is None or self._connection.late:
                line = "it was cut off: relayd has closed the connection, or has ended"
                raise CommandFailed(Exit.FAILED, line)
            if not piece:
                return
            yield piece

    def end(self) -> None:
        """No more is wanted: what is left comes, within :data:`TAIL` seconds."""
        self._connection.end_own_side(TAIL)


class _Connection(HTTPConnection):
    """A connection for one request, which ends in time.

    A timeout of the socket is about each read: whoever sends a byte now and then would
    never be done.  So a thread shuts the socket down when time is up.

    :ivar late: that has happened.
    """

    def __init__(self, path: str, within: float) -> None:
        super().__init__("localhost", timeout=within)
        self.within = within
        self.late = False
        self._path = path
        self._limit = threading.Timer(within, self._cut)
        self._limit.daemon = True
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def connect(self) -> None:
        self.sock = self._socket
        self.sock.settimeout(self.within)
        self.sock.connect(self._path)
        self._limit.start()

    def _cut(self) -> None:
        self.late = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        # Not close(): an answer that ends with its connection calls that before it is
        # read.
        self._limit.cancel()
        self.close()
        self._socket.close()

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        more: Mapping[str, str] | None = None,
    ) -> HTTPResponse:
        """One request, and the head of its answer.

        :param more: headers.
        :raises HTTPException: it is no answer, or only a part of one.
        """
        headers = {"Accept": "application/json", "Connection": "close", **(more or {})}
        if body is not None:
            headers["Content-Type"] = "application/json"
        with suppress(BrokenPipeError):
            # Who is refused at once is told so, and nothing is read from them.
            self.request(method, path, body, headers)
        return self.getresponse()

    def go_on(self) -> None:
        """The rest of the answer takes as long as it takes."""
        self._limit.cancel()
        self._socket.settimeout(None)

    def end_own_side(self, within: float) -> None:
        """Say no more, and wait no longer than that."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        self._limit.cancel()
        self._limit = threading.Timer(within, self._cut)
        self._limit.daemon = True
        self._limit.start()


def _asked(query: Mapping[str, Any] | None) -> str:
    given = {key: each for key, each in (query or {}).items() if each is not None}
    return f"?{urlencode(given, errors='surrogateescape')}" if given else ""


def _begun(where: str, connection: _Connection, path: str) -> HTTPResponse:
    """An answer that goes on, whose head has come.

    :raises CommandFailed: there is none, or a refusal.
    """
    _connect(where, connection)
    content = b""
    try:
        response = connection.ask("GET", path)
        if response.status == HTTPStatus.OK:
            connection.go_on()
        else:
            content = _content(response)
    except (OSError, HTTPException, ValueError) as problem:
        raise _no_answer(where, connection, "GET", problem) from None
    if connection.late:
        raise _no_answer(where, connection, "GET", TimeoutError())
    if response.status != HTTPStatus.OK:
        _answer(where, response.status, content)
        raise _unreachable(where, "what answers is not relayd: it has nothing to say")
    return response


def _connect(where: str, connection: _Connection) -> None:
    try:
        connection.connect()
    except OSError as problem:
        raise _not_connected(where, problem) from None


def _content(response: HTTPResponse) -> bytes:
    pieces = bytearray()
    while piece := response.read(_PIECE):
        pieces += piece
        if len(pieces) > LONGEST:
            raise HTTPException(f"an answer of more than {LONGEST >> 20} MiB")
    if response.length:
        raise HTTPException("half an answer")
    return bytes(pieces)


def _answer(where: str, status: int, content: bytes) -> Json:
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        answer = None
    if isinstance(answer, dict):
        if status // 100 == 2:
            return answer
        problems = answer.get("problems")
        if status >= 400 and isinstance(problems, list) and problems:
            lines = [printable(str(each)) for each in problems]
            raise CommandFailed(exit_of(status), *lines)
    raise _unreachable(
        where, f"what answers is not relayd (HTTP status {status}, no JSON of relayd)"
    )


def _unreachable(where: str, why: str) -> CommandFailed:
    line = f"relayd can't be reached at {where}: {why}"
    return CommandFailed(Exit.UNREACHABLE, printable(line))


def _reason(problem: Exception) -> str:
    reason = printable(getattr(problem, "strerror", None) or str(problem).strip())
    return reason if len(reason) <= _QUOTED else reason[:_QUOTED] + "..."


def _not_connected(where: str, problem: OSError) -> CommandFailed:
    if isinstance(problem, PermissionError):
        return _not_permitted(where)
    if isinstance(problem, ConnectionRefusedError):
        why = (
            "nobody listens; the relayd that made the socket has ended: start it again"
        )
    elif isinstance(problem, BlockingIOError):
        why = "too many clients wait already; ask again"
    else:
        why = f"{_reason(problem)}; {_WHERE}"
    return _unreachable(where, why)


def _not_permitted(where: str) -> CommandFailed:
    """Says whose the socket is, or the folder that hides it."""
    path = where
    while True:
        try:
            found = os.stat(path)
        except OSError:
            path = os.path.dirname(path)
            continue
        break
    owner = str(found.st_uid)
    with suppress(KeyError):
        owner = f"{pwd.getpwuid(found.st_uid).pw_name} (uid {owner})"
    what = "it" if path == where else f"the folder {path}"
    mode = stat.S_IMODE(found.st_mode)
    why = f"not permitted; {what} belongs to {owner}, mode {mode:04o}:"
    return _unreachable(where, f"{why} run relayctl as that user, or as root")


def _no_answer(
    where: str, connection: _Connection, method: str, problem: Exception
) -> CommandFailed:
    if connection.late or isinstance(problem, TimeoutError):
        why = f"no answer within {connection.within:g} s"
    elif isinstance(problem, ConnectionError):
        why = "it closed the connection without an answer; ask again"
    else:
        why = f"what answers does not speak as relayd does ({_reason(problem)})"
    if method != "GET":
        why += "; `relayctl status` and `relayctl diff` say whether the change was made"
    return _unreachable(where, why)
