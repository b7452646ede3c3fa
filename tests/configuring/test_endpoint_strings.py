"""Twisted's endpoint strings, as relayd reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.endpoints import (
    _parse,
    quoteStringArgument,
)

from relayd.configuring import endpoint_strings


@given(st.text(), st.dictionaries(st.text(st.characters(codec="ascii")), st.text()))
def test_any_arguments_are_read_as_twisted_reads_them(
    text: str, named: dict[str, str]
) -> None:
    """Its own function is the judge; what it can't read, we can't either."""
    quoted = ":".join(
        [quoteStringArgument(text).replace("=", "\\=")]
        + [
            f"{quoteStringArgument(each).replace('=', chr(92) + '=')}"
            f"={quoteStringArgument(value)}"
            for each, value in named.items()
        ]
    )
    assert endpoint_strings.parts(quoted) == ([text], named)
    for written in (text, quoted, "a:" + text):
        try:
            twisteds = _parse(written)
        except UnicodeError:
            # A name that Twisted refuses.
            pass
        except RuntimeError:
            with pytest.raises(ValueError, match="ends with a backslash"):
                endpoint_strings.parts(written)
        else:
            assert endpoint_strings.parts(written) == twisteds


@pytest.mark.parametrize("listens", [True, False])
def test_tls_without_its_packages_says_how_to_get_them(
    listens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twisted's own endpoints then fail on a name that nothing has defined."""
    problem = NameError("name 'optionsForClientTLS' is not defined")
    text = "ssl:443" if listens else "tls:example.com:443"

    def why() -> str:
        return endpoint_strings.what_is_wrong(text, problem, lambda: 0)

    assert why().startswith("Twisted can't use it (NameError: ")
    monkeypatch.setattr(endpoint_strings, "find_spec", lambda name: None)
    assert why() == (
        "TLS needs packages that are not installed: pip install 'relayd[tls]'"
    )


def test_the_name_of_sockets_that_systemd_passes_on() -> None:
    """Ours has nothing but a name; whatever else there is, is Twisted's."""
    name_of = endpoint_strings.passed_name
    assert name_of("systemd:web") == name_of("SystemD:web") == "web"
    assert name_of("systemd:INET") == "INET"
    for text in (
        "systemd:",
        "systemd:INET:0",
        "systemd:domain=INET:name=web",
        "systemd:a=b",
        "systemd:a\\b",
        "haproxy:systemd:web",
        "tcp:80",
    ):
        assert name_of(text) == ""


@pytest.mark.parametrize(
    "text",
    [
        "haproxy:tcp:1080",
        "HAProxy:tcp:1080:interface=127.0.0.1",
        "haproxy:ssl:1080:privateKey=key.pem",
        "haproxy:unix:/run/x.sock",
        # As a type that wraps others has them, one that we don't know.
        "other:1:endpoint=haproxy\\:tcp\\:1080",
        "other:haproxy\\:tcp\\:1080",
        "other:haproxy:tcp:1080",
    ],
)
def test_a_listener_that_reads_headers_by_itself(text: str) -> None:
    assert endpoint_strings.has_proxy_header(text)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        *(
            ("ssl:443:privateKey=k", True),
            ("TLS:443", True),
            ("txsni:/c:tcp:443", True),
        ),
        # As above.
        ("other:ssl:443:privateKey=k", True),
        ("other:1:endpoint=ssl\\:443", True),
        ("other:ssl\\:443:privateKey=k", True),
        ("other:tcp\\:443", False),
        *(("tcp:443", False), ("unix:ssl", False), ("unix:/x:lockfile=ssl\\:", False)),
        *(("systemd:domain=INET:index=0", False), ("other:a\\", False)),
    ],
)
def test_a_listener_that_ends_tls(text: str, ends: bool) -> None:
    assert endpoint_strings.ends_tls(text) is ends


@pytest.mark.parametrize(
    "text",
    [
        "tcp:1080:interface=127.0.0.1",
        "ssl:1080:privateKey=/etc/haproxy/key.pem",
        "ssl:1080:privateKey=haproxy",
        "unix:haproxy.sock",
        "unix:/run/haproxy",
        "tcp:1080:x=\\",
    ],
)
def test_a_name_is_only_a_name(text: str) -> None:
    assert not endpoint_strings.has_proxy_header(text)
