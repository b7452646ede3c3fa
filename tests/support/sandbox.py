"""A sandbox for a process of the tests: system calls that fail with a chosen errno.

As containers and systemd's SystemCallFilter do it, with a seccomp filter (seccomp(2)):
a program for the kernel that looks at the number of each system call, and at the low
half of an argument where a name below says so, and lets it through or has it fail.  It
takes no privileges, holds for the process and its children, and can't be taken off.

:func:`refuse` is for a process that was just forked; `process.relay(refusing=…)`
starts a relay behind it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import socket
import struct
import sys
import termios
from collections.abc import Mapping

#: Whether there is one for this machine.
AVAILABLE = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")

#: prctl(2).
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2

#: linux/filter.h: load a word of the data, go on unless equal, answer.
_LOAD, _JUMP_UNLESS_EQUAL, _RETURN = 0x20, 0x15, 0x06

#: linux/seccomp.h: what a filter answers, and where `struct seccomp_data` has what.
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16

#: linux/audit.h, and the numbers of system calls (asm/unistd.h), by `platform.machine`.
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NUMBERS = {
    "x86_64": {
        "ioctl": 16,
        "accept": 43,
        "sendto": 44,
        "setsockopt": 54,
        "getsockopt": 55,
        "fcntl": 72,
        "epoll_ctl": 233,
        "splice": 275,
        "timerfd_create": 283,
        "accept4": 288,
        "epoll_create1": 291,
        "pipe2": 293,
        "recvmmsg": 299,
        "prlimit64": 302,
        "sendmmsg": 307,
    },
    "aarch64": {
        "epoll_create1": 20,
        "epoll_ctl": 21,
        "fcntl": 25,
        "ioctl": 29,
        "pipe2": 59,
        "splice": 76,
        "timerfd_create": 85,
        "accept": 202,
        "sendto": 206,
        "setsockopt": 208,
        "getsockopt": 209,
        "accept4": 242,
        "recvmmsg": 243,
        "prlimit64": 261,
        "sendmmsg": 269,
    },
}

_SOL_SOCKET, _IPPROTO_TCP = int(socket.SOL_SOCKET), int(socket.IPPROTO_TCP)

#: Parts of a system call: its name, and which argument is what.
_PARTS: dict[str, tuple[str, dict[int, int]]] = {
    "pipe2 O_NONBLOCK": ("pipe2", {1: os.O_CLOEXEC | os.O_NONBLOCK}),
    "F_SETPIPE_SZ": ("fcntl", {1: fcntl.F_SETPIPE_SZ}),
    "SIOCOUTQ": ("ioctl", {1: termios.TIOCOUTQ}),
    "MSG_MORE": ("sendto", {3: int(socket.MSG_MORE)}),
    "TCP_NODELAY": ("setsockopt", {1: _IPPROTO_TCP, 2: socket.TCP_NODELAY}),
    "TCP_QUICKACK": ("setsockopt", {1: _IPPROTO_TCP, 2: 12}),
    "SO_MEMINFO": ("getsockopt", {1: _SOL_SOCKET, 2: 55}),
    "TCP_INFO": ("getsockopt", {1: _IPPROTO_TCP, 2: 11}),
    "SO_KEEPALIVE": ("setsockopt", {1: _SOL_SOCKET, 2: socket.SO_KEEPALIVE}),
    "SO_OOBINLINE": ("setsockopt", {1: _SOL_SOCKET, 2: socket.SO_OOBINLINE}),
    "SO_LINGER": ("setsockopt", {1: _SOL_SOCKET, 2: socket.SO_LINGER}),
}


def _program(refused: Mapping[str, int]) -> list[tuple[int, int, int, int]]:
    """The filter's instructions: code, two jumps, and a constant."""
    machine = platform.machine()
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_JUMP_UNLESS_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _ALLOW),
    ]
    for name, number in refused.items():
        call, arguments = _PARTS.get(name, (name, {}))
        tests = [(_NUMBER_AT, _NUMBERS[machine][call])]
        tests += [(_ARGUMENTS_AT + 8 * at, is_) for at, is_ in arguments.items()]
        for left, (offset, value) in zip(
            range(len(tests) - 1, -1, -1), tests, strict=True
        ):
            # To whatever comes behind this rule: the tests left, and its answer.
            program += [
                (_LOAD, 0, 0, offset),
                (_JUMP_UNLESS_EQUAL, 0, 2 * left + 1, value),
            ]
        program.append((_RETURN, 0, 0, _ERRNO | number))
    program.append((_RETURN, 0, 0, _ALLOW))
    return program


class _Filter(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_char_p)]


def refuse(refused: Mapping[str, int]) -> None:
    """From now on these system calls fail in this process.

    :param refused: the errno by the name of a system call, or of a part of one, as the
        tables above have them.
    :raises OSError: the kernel has no seccomp.
    """
    program = _program(refused)
    code = b"".join(struct.pack("=HBBI", *each) for each in program)
    libc = ctypes.CDLL(None, use_errno=True)
    made = _Filter(len(program), code)
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(made), 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
