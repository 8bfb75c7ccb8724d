"""Where this user's own files go: the home folder, and what stands in where there is none. No torch."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def home_folder() -> Path:
    """Return the home folder; in a container whose user has neither a name nor HOME, the one of `temporary_folder`."""
    try:
        return Path.home()
    except RuntimeError:
        return temporary_folder()


def temporary_folder() -> Path:
    """Return this user's own folder among the temporary ones; it may not be there yet."""
    user = "user" if sys.platform == "win32" else str(os.getuid())
    return Path(tempfile.gettempdir()) / f"wan_local-{user}"
