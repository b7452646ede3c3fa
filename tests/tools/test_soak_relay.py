"""What the soak reads of the relay from /proc."""

from __future__ import annotations

from soak.relay import count_kinds


def test_kinds_of_descriptors() -> None:
    assert count_kinds(
        [
            "socket:[4711]",
            "socket:[4712]",
            "pipe:[13]",
            "anon_inode:[eventpoll]",
            "/dev/null",
            "/tmp/socket:[1]",
        ]
    ) == {"socket": 2, "pipe": 1, "other": 3}
