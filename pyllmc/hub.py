"""Files of the Hugging Face hub, through huggingface_hub: it goes on with a download that broke off, asks a busy server
again, and keeps what it fetched in its cache (HF_HOME says where). The extra `hub` installs it.

Whatever it raises becomes an OSError in one line, which ends in what else one can do.

Called by huggingface.py for models and by datasets/fineweb.py; calls extras.py.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .extras import needed

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

# What the errors of huggingface_hub, and of the libraries by which its versions reach the net, mean; by name, since no
# version has all of them. The first that fits is told.
_REASONS = {
    "LocalEntryNotFoundError": "no connection",
    "ConnectError": "no connection",
    "ConnectionError": "no connection",
    "TimeoutException": "no answer in time",
    "Timeout": "no answer in time",
    "RepositoryNotFoundError": "there is no such repository, or it is not public",
    "RevisionNotFoundError": "the repository has no such revision",
    "EntryNotFoundError": "the repository has no such file",
}


class RemoteFile(NamedTuple):
    """A file in a repository, and its size in bytes."""

    name: str
    size: int


def fetch_snapshot(repository: str, patterns: Sequence[str], otherwise: str) -> Path:
    """The folder of the cache with those files of a model's repository that fit the patterns."""
    with _asking(repository, otherwise) as library:
        return Path(library.snapshot_download(repository, allow_patterns=list(patterns)))


def list_dataset(repository: str, folder: str | None, otherwise: str) -> tuple[str, list[RemoteFile]]:
    """The newest revision of a dataset's repository and the files in one folder of it, sorted by name (None: those
    that are in no folder)."""
    with _asking(f"{repository}/{folder}" if folder else repository, otherwise) as library:
        api = library.HfApi()
        revision = api.dataset_info(repository).sha
        found = api.list_repo_tree(repository, folder, revision=revision, repo_type="dataset")
        # Folders have no size.
        return revision, sorted(RemoteFile(entry.path, entry.size) for entry in found if hasattr(entry, "size"))


def fetch_file(repository: str, name: str, revision: str, otherwise: str, folder: Path | None = None) -> Path:
    """A file of a dataset's repository: in the cache, or as `name` in `folder`."""
    with _asking(f"{repository}/{name}", otherwise) as library:
        options = {} if folder is None else {"local_dir": folder}
        return Path(library.hf_hub_download(repository, name, repo_type="dataset", revision=revision, **options))


def missing_in_cache(
    repository: str, files: Sequence[RemoteFile], revision: str, otherwise: str
) -> tuple[Path, list[RemoteFile]]:
    """The folder of the cache, and those files of a dataset's repository that `fetch_file` would bring there."""
    with _asking(repository, otherwise) as library:
        where = {"revision": revision, "repo_type": "dataset"}
        found = {file: library.try_to_load_from_cache(repository, file.name, **where) for file in files}
        return Path(library.constants.HF_HUB_CACHE), [file for file in files if not isinstance(found[file], str)]


@contextlib.contextmanager
def _asking(what: str, otherwise: str) -> Iterator:
    """huggingface_hub; an error of the block becomes an OSError about `what`. ImportError where it is not installed."""
    with needed("hub", what, otherwise):
        import huggingface_hub
    try:
        yield huggingface_hub
    except Exception as error:  # of a kind that depends on its version, and on the library that it reaches the net by
        if isinstance(error, OSError) and error.errno in _DISK:
            raise OSError(error.errno, f"cannot write what is fetched: {error.strerror}", error.filename) from None
        raise OSError(
            f"{what}: the Hugging Face hub does not give it ({_reason(error)}); try again, or {otherwise}"
        ) from None


def _reason(error: Exception) -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "OfflineModeIsEnabled" in kinds:
        return "HF_HUB_OFFLINE is set"
    for kind, reason in _REASONS.items():
        if kind in kinds:
            return reason
    return f"{(str(error) or type(error).__name__).splitlines()[0]:.160}"
