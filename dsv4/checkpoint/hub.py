"""Checkpoints by name: ORG/NAME or ORG/NAME@REVISION, found in the local cache of the Hugging Face hub or pulled there.

By huggingface_hub, an optional extra: the cache's layout, the credentials, the endpoint and the protocols of the hub
are its business, and other programs then find the same files. It reads its own variables (HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE, HF_ENDPOINT, …); nothing here does. What it leaves out is added here: it compares sizes alone, so
every file is hashed as well.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from dsv4.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

# Weights as safetensors alone: other formats of weights can run code when they are read. The folders hold the release's
# prompt texts and its own description of the model, as source that is parsed and never run.
WANTED: Final = (
    *("*.safetensors", "*.json", "LICENSE*", "README.md"),
    *(f"{folder}/*.{kind}" for folder in ("encoding", "inference") for kind in ("py", "md", "txt")),
)
INSTALL: Final = "pip install 'dsv4[hub]'"
_NAME: Final = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w-][\w./-]*))?", re.ASCII)
_PIECE: Final = 1 << 22
Progress = Callable[[str, int, int], None]  # file, bytes hashed, bytes in all


class Name(NamedTuple):
    """A repository of the hub and a branch, tag or commit in it."""

    repo: str
    revision: str = "main"


def read_name(text: str) -> Name | None:
    """The repository that `text` names, None if it is no such name."""
    found = _NAME.fullmatch(text)
    if found is None or ".." in text or "--" in text:  # the hub allows neither, and the cache spells "/" as "--"
        return None
    return Name(found["repo"], found["revision"] or "main")


def find_model(model: str | Path) -> Path:
    """The directory of a checkpoint: `model` itself, or where the local cache has the repository of that name.

    What is no such name comes back as it is, there or not: who reads it says what is missing. CheckpointError for a
    name that the cache lacks. Never asks the network.
    """
    name = None if Path(model).is_dir() else read_name(Path(model).as_posix())
    if name is None:
        return Path(model)
    missing = CheckpointError(
        f"{model} is neither a directory nor in the local cache of the hub", do=f"dsv4 pull {model} fetches it"
    )
    try:
        import huggingface_hub
        from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError
    except ImportError:
        raise CheckpointError(missing.what, do=f"{missing.do}, after {INSTALL}") from None
    try:
        found = huggingface_hub.snapshot_download(
            name.repo, revision=name.revision, allow_patterns=list(WANTED), local_files_only=True
        )
    except IncompleteSnapshotError:
        raise CheckpointError(f"{model} is not all in the local cache", do=f"dsv4 pull {model} goes on") from None
    except (LocalEntryNotFoundError, ValueError):
        raise missing from None
    return Path(found)


def pull(text: str, progress: Progress) -> Path:
    """Bring a repository's checkpoint into the local cache, whole and checked; returns its directory.

    What the cache has already is not fetched again, and a connection that drops is taken up where it broke. Each file
    is then held against the hub's own hash; one with other bytes is fetched once more. Where the library is told to be
    offline, the same is done with what is there. CheckpointError for anything that goes wrong.
    """
    name = read_name(text)
    if name is None:
        raise CheckpointError("a model on the hub", got=repr(text), wanted="ORG/NAME or ORG/NAME@REVISION")
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError("pulling needs huggingface_hub", do=INSTALL) from None
    with _in_words(text):
        directory = Path(_fetch(name.repo, name.revision))
        files = huggingface_hub.get_cached_repo_tree(name.repo, revision=directory.name)
        wanted = [file for file in files if any(fnmatch(file.path, pattern) for pattern in WANTED)]
        bad = [file for file in wanted if not _whole(directory, file, progress)]
        for file in bad:
            _drop(directory / file.path)
        if bad:
            _fetch(name.repo, directory.name)
        for file in bad:
            if not _whole(directory, file, progress):
                _drop(directory / file.path)
                raise CheckpointError(
                    f"{text}: {file.path} came twice with other bytes than the hub announces",
                    got=f"a hash that is not {_hash(file)[1]}",
                    do="the file is removed; something on the way changes it, or the hub is mending it: try later",
                )
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{text} holds no checkpoint", wanted="a config.json beside the weights")
    return directory


def _fetch(repo: str, revision: str) -> str:
    import huggingface_hub

    return huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(WANTED))


def _hash(file: RepoFile) -> tuple[Any, str]:
    """A fresh hash with what git puts before the content, and the digest that it must come to."""
    if file.lfs is not None:
        return hashlib.sha256(), str(file.lfs.sha256)
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False), str(file.blob_id)


def _whole(directory: Path, file: RepoFile, progress: Progress) -> bool:
    """Whether the bytes are those that the hub announces."""
    digest, wanted = _hash(file)
    done = 0
    with (directory / file.path).open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
            done += len(piece)
            progress(file.path, done, file.size)
    return bool(digest.hexdigest() == wanted)


def _drop(path: Path) -> None:
    """Remove a file of the cache with the bytes that its link leads to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


@contextmanager
def _in_words(text: str) -> Iterator[None]:
    """The library's errors as one line with what to do."""
    import httpx2  # what the library speaks with; its errors come through
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{text} asks for consent before it is downloaded", do="give it on the model's page, then set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"the hub has no {text}, or does not show it to you", do="check the name; if it is private, set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{text}: the hub has no such revision", do="name a branch, a tag or a commit") from None
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{text} is not all in the local cache and the hub cannot be asked", got=_cause(error), do=_AGAIN
        ) from None
    except errors.CachedRepoTreeNotFoundError:
        raise CheckpointError(
            f"{text} is in the local cache, but not the list of its hashes", do="pull it once with the network"
        ) from None
    except (errors.HfHubHTTPError, httpx2.HTTPError) as error:
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
            raise CheckpointError(
                f"the hub refuses {text}", got=error.response.status_code, do="set HF_TOKEN to a token that may read it"
            ) from None
        raise CheckpointError(f"{text}: the hub broke off", got=_line(error), do=_AGAIN) from None
    except ValueError as error:
        raise CheckpointError(f"{text}: the hub's answer makes no sense", got=_line(error)) from None


_AGAIN: Final = "dsv4 pull again goes on with what is there; HF_HUB_OFFLINE and HF_ENDPOINT decide whom it asks"


def _cause(error: BaseException) -> str:
    """The error at the bottom: why the hub could not be asked."""
    return _line(error if error.__cause__ is None else error.__cause__)


def _line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__
