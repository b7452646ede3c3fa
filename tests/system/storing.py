"""A web server that serves a folder, and stores there what is PUT.

`python storing.py FOLDER` listens on a free port of 127.0.0.1, or of the address that
follows the folder, and says which.
"""

from __future__ import annotations

import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PIECE = 1 << 16


class Storing(SimpleHTTPRequestHandler):
    # Clients that send much ask first whether they may, and wait if nobody answers.
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        left = int(self.headers["Content-Length"])
        with Path(self.translate_path(self.path)).open("wb") as file:
            while left and (piece := self.rfile.read(min(left, PIECE))):
                file.write(piece)
                left -= len(piece)
        self.send_response(400 if left else 201)
        self.send_header("Content-Length", "0")
        self.end_headers()


def main(folder: str, address: str = "127.0.0.1") -> None:
    handler = partial(Storing, directory=folder)
    with ThreadingHTTPServer((address, 0), handler) as server:
        print(f"Serving on port {server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
