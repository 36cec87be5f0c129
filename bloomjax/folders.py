"""Folders of the user's that are not a run's."""

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """Where to keep what can be made again; it need not exist yet. None for a user without a home,
    as a container's may be, unless XDG_CACHE_HOME names a place."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return base / "bloomjax"
