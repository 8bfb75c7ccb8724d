"""`python -m wan_local`: the command line."""

from __future__ import annotations

import sys

from wan_local.cli import main

if __name__ == "__main__":
    sys.exit(main())
