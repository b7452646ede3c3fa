"""A reload reads the certificates of listeners again, whose sockets stay."""

from __future__ import annotations

import shutil
import ssl
from pathlib import Path

from tests.live.test_control_socket import ask
from tests.support.certificates import Authority
from tests.support.process import Server, connect, read_exactly, relay


def serial_at(port: int, root: Authority) -> int:
    """The serial number of the certificate that a listener shows."""
    context = ssl.create_default_context(cafile=str(root.file))
    context.set_alpn_protocols(["h2", "http/1.1"])
    with context.wrap_socket(connect(port), server_hostname="localhost") as client:
        shown = client.getpeercert()
        assert shown is not None
        return int(str(shown["serialNumber"]), 16)


def test_a_certificate_that_was_renewed(tmp_path: Path, server: Server) -> None:
    """One that can't be read is refused, with its reason, and changes nothing."""
    root = Authority(tmp_path)
    pem, control, file = (tmp_path / each for each in ("web.pem", "c", "r.toml"))
    shutil.copy(root.issue("localhost"), pem)
    listener = f"ssl:0:interface=127.0.0.1:privateKey={pem}:certKey={pem}"
    text = f'control = "unix:{control}"\n[tcp.web]\nlisten = "{listener}"\n'
    file.write_text(f'{text}dest = "{server.address}"\n')
    with relay("--config", str(file)) as running:
        context = ssl.create_default_context(cafile=str(root.file))
        with context.wrap_socket(
            connect(running.port), server_hostname="localhost"
        ) as client:
            client.sendall(b"?")
            with server.accept() as upstream:
                assert read_exactly(upstream, 1) == b"?"
                before = serial_at(running.port, root)
                shutil.copy(root.issue("localhost"), pem)
                assert serial_at(running.port, root) == before
                status, answer = ask(control, "POST", "/v1/reload", {})
                assert (status, answer["unchanged"]) == (200, 1)
                assert serial_at(running.port, root) != before
                upstream.sendall(b"!")
                assert read_exactly(client, 1) == b"!"
        now = serial_at(running.port, root)
        pem.write_text("nonsense")
        status, answer = ask(control, "POST", "/v1/reload", {})
        assert status == 422
        assert f"relay web: bad endpoint {listener!r}" in answer["problems"][0]
        assert serial_at(running.port, root) == now
        shutil.copy(root.issue("localhost"), pem)
        settings = {"settings": {"idle_timeout": 60}}
        status, _ = ask(control, "PATCH", "/v1/relays/web", settings)
        assert status == 200
        assert serial_at(running.port, root) != now, "a change reads it, too"
