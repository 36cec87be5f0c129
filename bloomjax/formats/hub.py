"""Models of the Hugging Face Hub: ORG/NAME or ORG/NAME@REVISION, through its cache.

The invariant: sizes are known and said before anything is downloaded, weights come last, only files
that we read are, and the commit that a revision stood for is recorded.
"""

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from bloomjax.errors import DoesNotFitError, InputError
from bloomjax.formats.hf import TOKENIZER
from bloomjax.formats.hf_config import ORIGIN

_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w-]+(?:[./][\w-]+)*))?", re.ASCII)
_SIDE = ["config.json", ORIGIN, *TOKENIZER]
# Weights, the better first. Hub patterns: "*" matches "/" too, so folders are left out afterwards.
_WEIGHTS = (
    ["model.safetensors", "model.safetensors.index.json", "model[-_]*-of-*.safetensors"],
    ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model[-_]*-of-*.bin"],
)


class Remote(NamedTuple):
    """A model of the Hub at one commit."""

    repository: str
    revision: str  # branch, tag or commit, as it was asked for
    commit: str
    files: tuple[str, ...]  # that we read
    size: int  # bytes of them
    missing: int  # bytes of those that the cache lacks

    def __str__(self) -> str:
        return (
            f"{self.repository}@{self.revision} (commit {self.commit}): {len(self.files)} files, "
            f"{self.size / 1e6:,.1f} MB, of which {self.missing / 1e6:,.1f} MB to download"
        )


def is_id(source: str) -> bool:
    """Whether `source` is spelt like a hub id (and a relative path can be: look for that first)."""
    return _ID.fullmatch(source) is not None


def find(source: str) -> Remote:
    """What a hub id stands for; nothing of it is downloaded.

    Where the Hub is off (HF_HUB_OFFLINE=1) or out of reach, the cache answers. InputError if there
    is no such model or revision, or if it has no weights that we read.
    """
    from huggingface_hub import errors, snapshot_download

    match = _ID.fullmatch(source)
    assert match, source
    repository, revision = match[1], match[2] or "main"
    patterns = [*_SIDE, *_WEIGHTS[0], *_WEIGHTS[1]]
    try:
        listed = snapshot_download(
            repository, revision=revision, allow_patterns=patterns, dry_run=True
        )
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{source}: expected a tag, branch or commit, found none") from error
    except errors.DryRunError as error:
        if isinstance(error.__cause__, errors.RepositoryNotFoundError):
            raise InputError(
                f"{source}: expected a folder, a file or a model of the Hub, found neither (or it "
                "is private: see `hf auth login`)"
            ) from error
        return _cached(source, repository, revision)
    except errors.HFValidationError as error:
        raise InputError(f"{source}: expected a model of the Hub, found no valid name") from error
    except Exception as error:  # whatever its HTTP client raises
        raise InputError(
            f"{source}: expected an answer of the Hub, found {type(error).__name__}: try again"
        ) from error
    sizes = {file.filename: file for file in listed if "/" not in file.filename}
    weights = next(filter(None, ([n for n in sizes if _any(n, kind)] for kind in _WEIGHTS)), None)
    if weights is None:
        raise InputError(f"{source}: expected safetensors or .bin files, found none")
    files = [name for name in sizes if name in _SIDE] + weights
    return Remote(
        repository,
        revision,
        listed[0].commit_hash,
        tuple(files),
        sum(sizes[name].file_size or 0 for name in files),
        sum(sizes[name].file_size or 0 for name in files if sizes[name].will_download),
    )


def _any(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _cached(source: str, repository: str, revision: str) -> Remote:
    """What the cache holds of a revision."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=["config.json"], local_files_only=True
            )
        )
    except OSError as error:
        raise InputError(
            f"{source}: expected a folder, a file or a model of the Hub, found no such "
            "path, nothing in the cache, and the Hub off or out of reach"
        ) from error
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    return Remote(repository, revision, folder.name, tuple(sizes), sum(sizes.values()), 0)


def fetch(
    source: str, before_weights: Callable[[Path], object] | None = None
) -> tuple[Path, dict[str, Any]]:
    """The folder of a model, downloaded as far as the cache lacks it, and its origin. A line on
    stderr tells the sizes before.

    Where something is to be downloaded, `before_weights` is called with the folder once all but the
    weights is in it, and may raise. Raises what `find` does, DoesNotFitError if the disk has no
    room, and InputError if the download breaks off.
    """
    from huggingface_hub import constants

    remote = find(source)
    print(remote, file=sys.stderr, flush=True)
    cache = Path(constants.HF_HUB_CACHE)
    disk = next(path for path in (cache, *cache.parents) if path.exists())
    if (free := shutil.disk_usage(disk).free) < remote.missing:
        raise DoesNotFitError(
            f"{remote}: found {free / 1e6:,.1f} MB free at {cache}: make room, or set HF_HUB_CACHE"
        )
    if before_weights and remote.missing:
        side = [name for name in remote.files if not name.endswith((".safetensors", ".bin"))]
        before_weights(_download(remote, side))
    folder = _download(remote, list(remote.files))
    # The cache calls a large file by its sha256, as the Hub does, and links to it.
    links = {name: os.path.basename(os.path.realpath(folder / name)) for name in remote.files}
    return folder, {
        "repository": remote.repository,
        "url": f"https://huggingface.co/{remote.repository}",
        "revision": remote.revision,
        "commit": folder.name,
        "files_sha256": {name: blob for name, blob in links.items() if len(blob) == 64},
    }


def _download(remote: Remote, files: list[str]) -> Path:
    """These files of a model, in the cache's folder for its commit."""
    from huggingface_hub import constants, snapshot_download

    try:
        found = snapshot_download(remote.repository, revision=remote.revision, allow_patterns=files)
    except Exception as error:  # whatever its HTTP client raises
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            place = constants.HF_HUB_CACHE
            raise DoesNotFitError(f"{remote}: found no space left at {place}") from error
        raise InputError(
            f"{remote}: expected to download it, found {type(error).__name__}: run again, what is "
            "there already is kept"
        ) from error
    return Path(found)
