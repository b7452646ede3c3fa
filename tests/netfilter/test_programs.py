"""How nft and ip are run: programs of the tests stand in for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from relayd.core.errors import NetfilterError
from relayd.netfilter import programs

#: What nft says to whom it does not let change anything; so ip.
NFT_REFUSED = """\
Operation not permitted (you must be root)
netlink: Error: cache initialization failed: Operation not permitted
"""
IP_REFUSED = "RTNETLINK answers: Operation not permitted\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the programs are; there are no others, but for those of a shell."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(programs, "_ADMIN", "/nowhere")
    return tmp_path


def make(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(0o755)


def said(folder: Path, text: str) -> str:
    """A command that says this on standard error, and fails."""
    (folder / "said").write_text(text)
    return f"cat {folder}/said >&2; exit 1"


def test_what_a_program_says(folder: Path) -> None:
    make(folder, "nft", 'echo "$@"; cat; echo "$LC_ALL"')
    done = programs.run("nft", "-f", "a b", given="rules é\n")
    assert done == programs.Ended("-f a b\nrules é\nC\n", "")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "Error: No such file or directory\nlist table\n^^",
            NONE := programs._NOTHING[0],
        ),
        (
            "internal:0:0-0: Error: Could not process rule: Busy\n\n",
            "Could not process rule: Busy",
        ),
        (
            "\nRTNETLINK answers: Network is down\n",
            "RTNETLINK answers: Network is down",
        ),
        ("", "exit code 1"),
    ],
)
def test_why_a_program_has_failed(folder: Path, text: str, line: str) -> None:
    make(folder, "ip", said(folder, text))
    assert programs.run("ip", "rule").problem == line
    if line is NONE:
        assert programs.listed("ip", "rule") is None
    else:
        with pytest.raises(NetfilterError, match=f"^ip rule: {line}$"):
            programs.listed("ip", "rule")
    with pytest.raises(NetfilterError, match=f"^ip rule add: {line}$"):
        programs.changed("ip", ["rule", "add"])


@pytest.mark.parametrize("text", [NFT_REFUSED, IP_REFUSED])
def test_without_the_right(folder: Path, text: str) -> None:
    make(folder, "nft", said(folder, text))
    with pytest.raises(NetfilterError) as caught:
        programs.run("nft", "list")
    assert str(caught.value) == (
        "rules of netfilter can't be seen or changed: that takes the right"
        " CAP_NET_ADMIN; run it as root"
    )


@pytest.mark.parametrize(("name", "package"), [("nft", "nftables"), ("ip", "iproute2")])
def test_without_the_program(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(programs.Missing) as caught:
        programs.run(name)
    assert str(caught.value) == (
        f"{name} is not installed: it is of the package {package}"
    )
    make(folder, name, "exit 0")
    (folder / name).chmod(0o644)
    with pytest.raises(
        NetfilterError, match=f"^{name} can't be run: Permission denied$"
    ):
        programs.run(name)


def test_one_that_does_not_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed."""
    monkeypatch.setattr(programs, "LIMIT", 0.05)
    make(folder, "nft", "exec sleep 600")
    with pytest.raises(NetfilterError, match="^nft has not ended within 0.05 s$"):
        programs.run("nft")


def test_what_is_listed(folder: Path) -> None:
    make(folder, "ip", "echo '[{\"priority\": 5}]'")
    assert programs.listed("ip", "rule") == [{"priority": 5}]
    make(folder, "ip", "exit 0")
    assert programs.listed("ip", "rule") == []
    for text in ("0: from all", "[" * 100_000):
        (folder / "text").write_text(text)
        make(folder, "ip", f"cat {folder}/text")
        with pytest.raises(NetfilterError, match="^ip rule does not list JSON: it may"):
            programs.listed("ip", "rule")
