"""The manual pages: `python -m relayd.ctl.manual FOLDER` writes them (`make man`).

They are made from the table of settings and from the commands' help, and kept in the
repository, so that the wheel has them; a test says when they are to be made again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from relayd.ctl.manual_of_command import relayctl_page
from relayd.ctl.manual_of_file import file_page
from relayd.ctl.manual_of_service import service_page
from relayd.ctl.roff import Page


def pages() -> list[Page]:
    """All of them."""
    return [relayctl_page(), file_page(), service_page()]


def write(folder: Path) -> None:
    """Write each into a folder."""
    folder.mkdir(exist_ok=True)
    for page in pages():
        (folder / page.file).write_text(str(page))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
