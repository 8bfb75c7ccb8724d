"""The training log: one line per event, to a file and to standard output."""

import sys
import time
from pathlib import Path


class Log:
    """Appends lines with the wall-clock time to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, text: str) -> None:
        """Write one line."""
        line = f"{time.strftime('%H:%M:%S')} {text}"
        with self.path.open("a") as file:
            file.write(line + "\n")
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
