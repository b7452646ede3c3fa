"""A browser looks around in a folder through the relay."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.process import PATIENCE, RelayProcess, eventually, relay
from tests.system.programs import http_server, module, program

pytestmark = pytest.mark.system

TEXT = "".join(f"line {number}: the quick brown fox\n" for number in range(5000))

PAGE = """<!doctype html>
<title>A page behind the relay</title>
<p id="greeting">Relayed.</p>
<img id="picture" src="pictures/wide.png" alt="">
<a href="pictures/">more pictures</a>
"""

WIDTH, HEIGHT = 370, 23


def png(width: int, height: int) -> bytes:
    """A black picture, uncompressed so that it has some size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows = bytes(1 + width) * height
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows, 0))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the web server serves."""
    path = tmp_path / "served"
    (path / "pictures").mkdir(parents=True)
    (path / "notes.txt").write_text(TEXT)
    (path / "page.html").write_text(PAGE)
    (path / "pictures" / "wide.png").write_bytes(png(WIDTH, HEIGHT))
    return path


@pytest.fixture
def browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A headless Chromium with a fresh profile, which reaches 127.0.0.1 alone."""
    webdriver = module("selenium.webdriver")
    service = module("selenium.webdriver.chrome.service")
    # The driver is a local HTTP server, too.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium")
    for argument in (
        "headless",
        # It refuses to run sandboxed as root, and containers have no sandbox.
        "no-sandbox",
        # Containers have little shared memory.
        "disable-dev-shm-usage",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "no-proxy-server",
        # What it does by itself, and where that would go.
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
        f"user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(
        options=options, service=service.Service(program("chromedriver"))
    )
    try:
        driver.set_page_load_timeout(PATIENCE)
        driver.implicitly_wait(PATIENCE)
        # Leaving a page cancels its icon: a reset, if it comes at that moment.
        driver.execute_cdp_cmd("Network.enable", {})
        driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/favicon.ico"]})
        yield driver
    finally:
        driver.quit()


def link(browser: Any, text: str) -> Any:
    """The link that says this on the page that is shown."""
    return browser.find_element("link text", text)


def links(browser: Any) -> list[str]:
    """What the page's links say, from top to bottom."""
    return [each.text for each in browser.find_elements("tag name", "a")]


@pytest.mark.parametrize("protocol", ["HTTP/1.0", "HTTP/1.1"])
def test_browsing(browser: Any, folder: Path, protocol: str) -> None:
    """Listings, a text, a page with a picture and a subfolder show as they are.

    HTTP/1.0 is a connection for each of them, which the server ends; HTTP/1.1 a
    few that stay open until the browser goes.
    """
    with (
        http_server(folder, protocol) as server,
        relay(
            *("--listen", "127.0.0.1:0", "--dest", server.address, "--verbose")
        ) as running,
    ):
        root = f"http://127.0.0.1:{running.port}/"
        browser.get(root)
        eventually(lambda: browser.title == "Directory listing for /")
        assert links(browser) == ["notes.txt", "page.html", "pictures/"]

        link(browser, "notes.txt").click()
        eventually(lambda: browser.current_url == f"{root}notes.txt")
        shown = browser.find_element("tag name", "pre")
        assert shown.get_property("textContent") == TEXT

        browser.back()
        link(browser, "page.html").click()
        eventually(lambda: browser.title == "A page behind the relay")
        assert browser.find_element("id", "greeting").text == "Relayed."
        picture = browser.find_element("id", "picture")
        eventually(lambda: picture.get_property("complete"))
        assert picture.get_property("naturalWidth") == WIDTH
        assert picture.get_property("naturalHeight") == HEIGHT

        link(browser, "more pictures").click()
        eventually(lambda: browser.title == "Directory listing for /pictures/")
        assert links(browser) == ["wide.png"]

        # Now its connections end, whatever it kept open or opened just in case.
        browser.quit()
        for path in (
            *("/", "/notes.txt", "/page.html"),
            *("/pictures/", "/pictures/wide.png"),
        ):
            server.process.wait_for(rf'"GET {path} HTTP/1\.1" 200 ')
        assert_all_done(running)


def assert_all_done(running: RelayProcess) -> None:
    """Every session that was opened has ended, and well, and carried the files.

    How many connections a browser makes for that is its own business.
    """
    opening = r"\] opened session="
    running.sessions(len(running.wait_for(opening)))
    # What the relay has not logged when it has stopped, it never will.
    running.signal()
    assert running.wait() == 0
    opened, sessions = running.wait_for(opening), running.sessions()
    assert len(sessions) == len(opened)
    assert {(each["ending"], each["code"]) for each in sessions} == {("done", "--")}
    files = len(TEXT) + len(PAGE) + len(png(WIDTH, HEIGHT))
    assert sum(int(each["down"]) for each in sessions) > files
