"""The Pythons that relayd is measured under: this one, and another one if there is one.

This one is the system's, as `make bench` sets it up: what relayd is compared with is as
the system's distribution builds it.  Many programs run under a Python that a version
manager has built instead, often without profile-guided optimisation.  So relayd is
measured under one of those, too, as a relay of its own.

It is the file that the environment variable `BENCH_OTHER_PYTHON` names, or else the
`python3` of PATH unless that is the system's, or else the newest one in the folders of
pyenv, uv, mise and asdf.  What relayd requires is installed, in the versions that this
environment has, into a virtual environment beside this package.  There is one, which
the next run uses again, if it is still the right one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from attrs import frozen

from bench.children import CannotMeasure

#: The variable that names the other Python.
VARIABLE = "BENCH_OTHER_PYTHON"

ROOT = Path(__file__).parent.parent

#: The other Python's environment.
PLACE = ROOT / ".venv-bench-other"

#: The oldest Python that relayd takes.
OLDEST = (3, 11)

#: Seconds until a Python must have told about itself, and until it must have set up an
#: environment and installed into it.
ASKED, SET_UP = 10.0, 180.0

#: Where version managers keep Pythons: a variable that may name its folder, the default
#: in the home folder, and the Pythons in there.
MANAGERS = (
    ("PYENV_ROOT", ".pyenv", "versions/*/bin/python3"),
    ("UV_PYTHON_INSTALL_DIR", ".local/share/uv/python", "*/bin/python3"),
    ("MISE_DATA_DIR", ".local/share/mise", "installs/python/*/bin/python3"),
    ("ASDF_DATA_DIR", ".asdf", "installs/python/*/bin/python3"),
)

_TELL = """\
import json, sys, sysconfig
options = sysconfig.get_config_var("CONFIG_ARGS") or ""
print(json.dumps([sys.base_prefix, sys.version_info[:3], options]))
"""


@frozen
class Python:
    """An interpreter."""

    #: The folder that it is installed in, also if it was asked in an environment.
    prefix: str
    version: tuple[int, int, int]
    #: What its build was configured with.
    options: str = ""

    @property
    def path(self) -> Path:
        """Its file, outside of any environment."""
        return Path(self.prefix) / "bin" / f"python{self.version[0]}.{self.version[1]}"

    @property
    def managed(self) -> bool:
        """Whether it is another one than the system's."""
        return self.prefix != "/usr"

    def __str__(self) -> str:
        """Its version, where it is from, and how it was built, if that is known."""
        number = ".".join(map(str, self.version))
        if not self.managed:
            return f"{number} (the system's)"
        [name] = re.findall(r"/\.?(pyenv|uv|mise|asdf)/", self.prefix)[:1] or [None]
        source = f"{name}'s" if name else "not the system's"
        using = "with" if "--enable-optimizations" in self.options else "without"
        return f"{number} ({source}, configured {using} --enable-optimizations)"


def this_python() -> Python:
    """The Python that runs the benchmark and relayd."""
    return Python(
        sys.base_prefix,
        (sys.version_info.major, sys.version_info.minor, sys.version_info.micro),
        sysconfig.get_config_var("CONFIG_ARGS") or "",
    )


@cache
def other_python() -> Python:
    """The other Python.

    :raises CannotMeasure: there is none, or the one that is asked for can't be used.
    """
    return find(os.environ, Path.home(), this_python())


def find(environ: Mapping[str, str], home: Path, this: Python) -> Python:
    """The other Python, by these variables and below this home folder.

    :raises CannotMeasure: as :func:`other_python`.
    """
    if named := environ.get(VARIABLE):
        asked = ask(named)
        if asked is None:
            raise CannotMeasure(f"{VARIABLE}: {named} is no Python that runs")
        if asked.version < OLDEST:
            raise CannotMeasure(f"{VARIABLE}: {named} is older than Python 3.11")
        return asked
    # An environment's own folder comes first on PATH while it is active.
    path = shutil.which("python3", path=environ.get("PATH", ""))
    for group in ([path] if path else [], _managed(environ, home)):
        found = [
            python
            for file in group
            if (python := ask(file)) is not None
            and python.managed
            and python.prefix != this.prefix
            and python.version >= OLDEST
        ]
        if found:
            return max(found, key=lambda python: python.version)
    raise CannotMeasure(
        "there is no Python of a version manager, of 3.11 or newer, on PATH or in the"
        f" folders of pyenv, uv, mise or asdf; {VARIABLE} may name one"
    )


def _managed(environ: Mapping[str, str], home: Path) -> Iterator[str]:
    for variable, default, pattern in MANAGERS:
        folder = Path(environ.get(variable) or home / default)
        yield from map(str, sorted(folder.glob(pattern)))


def ask(file: str) -> Python | None:
    """What a Python says about itself; None if it doesn't."""
    try:
        done = subprocess.run(  # noqa: S603
            [file, "-I", "-c", _TELL],
            capture_output=True,
            text=True,
            check=True,
            timeout=ASKED,
        )
        prefix, (major, minor, micro), options = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return Python(prefix, (major, minor, micro), options)


@cache
def other_twistd() -> str:
    """The path of a twistd that runs relayd under the other Python.

    Its environment is set up if that was not done before.

    :raises CannotMeasure: there is no other Python, or its environment can't be set up.
    """
    python = other_python()
    needed = [f"{name}=={version(name)}" for name in _requirements("relayd")]
    mark = json.dumps([str(python.path), str(python), str(ROOT), needed])
    done = PLACE / "relayd-bench"
    if not done.exists() or done.read_text() != mark:
        shutil.rmtree(PLACE, ignore_errors=True)
        # Without pip, which this environment's own does for it.
        _run(str(python.path), "-m", "venv", "--without-pip", str(PLACE))
        _run(
            *(sys.executable, "-m", "pip", "--python", str(PLACE / "bin" / "python")),
            *("install", "-q", "--no-input", "--disable-pip-version-check", *needed),
        )
        # As an editable install does it: Twisted finds its plugins in there, too.
        [packages] = (PLACE / "lib").glob("python3.*/site-packages")
        (packages / "relayd.pth").write_text(f"{ROOT}\n")
        done.write_text(mark)
    return str(PLACE / "bin" / "twistd")


def _requirements(package: str) -> list[str]:
    """What a package that is installed here requires, and what that requires."""
    found: set[str] = set()
    wanted = [package]
    while wanted:
        for line in requires(wanted.pop()) or ():
            [word] = re.findall(r"^[\w.-]+", line)
            name = re.sub(r"[-_.]+", "-", word).lower()
            if "extra ==" in line or name in found:
                continue
            try:
                version(name)
            except PackageNotFoundError:
                # It is for another system or an older Python.
                continue
            found.add(name)
            wanted.append(name)
    return sorted(found)


def _run(*argv: str) -> None:
    try:
        subprocess.run(  # noqa: S603
            argv, capture_output=True, text=True, check=True, timeout=SET_UP
        )
    except subprocess.TimeoutExpired:
        raise CannotMeasure(
            f"the other Python's environment: not within {SET_UP:.0f} seconds"
        ) from None
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        last = (said.strip().splitlines() or ["no reason given"])[-1]
        raise CannotMeasure(f"the other Python's environment: {last}") from error
