"""Packages that anyone can install, unpacked into a folder of our own: nothing is installed."""

from __future__ import annotations

import platform
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from typing import NamedTuple

from dsv4.errors import DSV4Error


class CorpusError(DSV4Error):
    """A source of text that cannot be had, or a corpus that is not as it should be."""


class Package(NamedTuple):
    """An unpacked package: its name, the version found, and the folder with its files."""

    name: str
    version: str
    root: Path


def run(*command: str, where: Path) -> str:
    """What the command prints; `CorpusError` with its last words if it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise CorpusError(f"there is no {command[0]}", do="build the corpus on Debian, or install it") from None
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise CorpusError(f"{' '.join(command[:3])} failed", got=" ".join(words), do="see the advice of the source")
    return done.stdout


def debian(names: tuple[str, ...], into: Path) -> Package:
    """The first of the Debian packages `names` that this release has, fetched by apt-get and unpacked by dpkg-deb."""
    into.mkdir(parents=True)
    into.chmod(0o755)  # apt-get fetches as a user of its own
    for name in names:
        try:
            run("apt-get", "download", name, where=into)
            break
        except CorpusError as e:
            problem = e
    else:
        raise CorpusError(
            f"no Debian package {' or '.join(names)}",
            got=problem.got or problem.what,
            do="run `apt-get update` on Debian 12 with its main and security sections, then again",
        )
    (archive,) = into.glob("*.deb")
    version = run("dpkg-deb", "--field", archive.name, "Version", where=into).strip()
    run("dpkg-deb", "--extract", archive.name, "root", where=into)
    return Package(f"{name} (Debian)", version, into / "root")


def pypi(name: str, version: str, into: Path) -> Package:
    """The source archive of one release on PyPI."""
    into.mkdir(parents=True)
    options = ("--no-deps", "--no-binary", ":all:", "--disable-pip-version-check", "--dest", ".")
    try:
        run(sys.executable, "-m", "pip", "download", *options, f"{name}=={version}", where=into)
    except CorpusError as e:
        raise CorpusError(f"no {name} {version} from PyPI", got=e.got, do="check pip's index and the network") from None
    (archive,) = into.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(into / "root", filter="data")
    return Package(f"{name} (PyPI)", version, into / "root")


def standard_library(into: Path) -> Package:
    """The library of the Python that runs this."""
    return Package("Python standard library", platform.python_version(), Path(sysconfig.get_paths()["stdlib"]))
