"""The build backend: flit_core's, but a wheel gets a ready-made cubin for each architecture that a kernel declares.

An editable install and a source archive are flit_core's own and fetch nothing more. `-C cubins=none` makes a wheel
without cubins, whose kernels are compiled where they first run. Without NVRTC nothing but that can be made: there is no
wheel that lacks its cubins by accident.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from flit_core import buildapi
from flit_core.buildapi import (
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from flit_core.config import read_flit_config

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]
Settings = Mapping[str, str] | None
PROJECT = Path("pyproject.toml")  # a frontend calls with the source tree as the current directory


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What pip installs before it builds: the compiler, by the pins of the extra `cuda`."""
    compiler = [] if _plain(config_settings) else read_flit_config(PROJECT).reqs_by_extra["cuda"]
    return [*buildapi.get_requires_for_build_wheel(config_settings), *compiler]


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Build the wheel from a copy of the tree that the cubins are put into; the tree itself stays as it is."""
    if _plain(config_settings):
        print("cubins=none: kernels of this wheel are compiled where they first run", file=sys.stderr)
        return buildapi.build_wheel(wheel_directory, config_settings, metadata_directory)
    target = str(Path(wheel_directory).absolute())
    with _copy_of_the_tree():
        _make_cubins()
        return buildapi.build_wheel(target, config_settings, metadata_directory)


def _plain(config_settings: Settings) -> bool:
    asked = (config_settings or {}).get("cubins", "all")
    if asked not in ("all", "none"):
        raise ValueError(f"cubins; got {asked!r}; wanted 'all' or 'none'")
    return asked == "none"


@contextmanager
def _copy_of_the_tree() -> Iterator[None]:
    """The current directory, inside, is a copy of all that flit_core reads."""
    before = Path.cwd()
    with TemporaryDirectory() as made:
        ignore = shutil.ignore_patterns("__pycache__", "prebuilt")
        shutil.copytree("dsv4", Path(made, "dsv4"), ignore=ignore)
        for name in (PROJECT, "README.md", "LICENSE"):
            shutil.copy2(name, made)
        os.chdir(made)
        try:
            yield
        finally:
            os.chdir(before)


def _make_cubins() -> None:
    """Compile what the copy in the current directory declares, by its own rules."""
    sys.path.insert(0, str(Path.cwd()))
    from dsv4.errors import KernelError
    from dsv4.kernels import prebuilt

    try:
        made = prebuilt.make(prebuilt.FOLDER)
    except KernelError as error:
        raise RuntimeError(f"{error}; or say '-C cubins=none' for a wheel without ready-made kernels") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    print(f"{made} cubins made", file=sys.stderr)
