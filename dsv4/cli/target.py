"""Files that a verb will write when its work is done: better to refuse them before it than after."""

from __future__ import annotations

import os
from pathlib import Path

from dsv4.errors import RequestError


def writable(*paths: Path | None) -> None:
    """RequestError for a path that cannot be written; None is none, and nothing is created."""
    for path in filter(None, paths):
        place = path if path.exists() else path.parent
        if path.is_dir() or not place.exists() or not os.access(place, os.W_OK):
            raise RequestError(
                "cannot write there", got=str(path), wanted="a file in a directory that is there and yours"
            )
