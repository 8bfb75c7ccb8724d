"""`wan-local cache`: how much room the kept encodings of prompts and images take, and clear them."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import TYPE_CHECKING

from wan_local.cli.terminal import DONE
from wan_local.settings import load_settings

if TYPE_CHECKING:
    from wan_local.cli.flags import Commands


def add(commands: Commands) -> None:
    """Add the command with its flags."""
    parser = commands.add_parser("cache", help="show or clear the kept encodings of prompts and images")
    parser.set_defaults(run=_cache)
    parser.add_argument("action", nargs="?", choices=("show", "clear"), default="show")
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def _cache(options: argparse.Namespace) -> int:
    from wan_local.cache import EncodingCache

    settings = load_settings()
    cache = EncodingCache(settings.cache_dir, int(settings.cache_gigabytes * 1e9))
    if options.action == "clear":
        freed = cache.clear()
        print(json.dumps({"freed_bytes": freed}) if options.json else f"cleared, {freed / 1e6:.1f} MB")
        return DONE
    entries = cache.entries()
    kinds, total = Counter(entry.kind for entry in entries), sum(entry.file_bytes for entry in entries)
    if options.json:
        described = {"folder": str(settings.cache_dir), "entries": dict(kinds), "bytes": total}
        print(json.dumps({**described, "limit_gigabytes": settings.cache_gigabytes}, indent=2))
        return DONE
    what = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "nothing"
    print(f"{settings.cache_dir}: {what}; {total / 1e6:.1f} MB of at most {settings.cache_gigabytes:g} GB")
    return DONE
