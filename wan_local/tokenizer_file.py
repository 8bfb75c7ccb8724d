"""Where UMT5's tokenizer is, and whether it is that: by the vocabulary in `tokenizer.json`. No torch, no transformers.

A tokenizer of another vocabulary raises no error in a run: the text encoder reads other words than were written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_local.errors import CorruptModel, ModelNotFound, WrongModel
from wan_local.header import foreign_file
from wan_local.weight_files import read_json

GET_TOKENIZER = "Get tokenizer/ of Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers, or google/umt5-xxl: 20 MB, no weights."
TOKENIZER = "tokenizer.json"
_FOLDERS = ("tokenizer", "google/umt5-xxl", "umt5-xxl")
_SENTENCEPIECE = "spiece.model"  # the same in a form that takes a library of its own
_SPECIAL = {"<pad>": 0, "</s>": 1, "<unk>": 2}
_UNUSED_ROWS = 0.01  # at most: UMT5 has 256,384 rows for 256,300 tokens; mT5, whose tokens are others, has 250,100


def tokenizer_folder(folder: Path) -> Path | None:
    """Return the folder with UMT5's tokenizer in or below `folder`."""
    places = [*(folder / name for name in _FOLDERS), folder]
    found = [place / name for name in (TOKENIZER, _SENTENCEPIECE) for place in places if (place / name).is_file()]
    return found[0].parent if found else None


def check_tokenizer(folder: Path, *, rows: int) -> None:
    """Check that the tokenizer in `folder` is one for a text encoder whose table of embeddings has `rows`.

    Raises ModelNotFound where there is none, CorruptModel where it is damaged, WrongModel where it is another model's.
    """
    file = folder / TOKENIZER
    if not file.is_file():
        there = f"{_SENTENCEPIECE} without {TOKENIZER}" if (folder / _SENTENCEPIECE).is_file() else f"no {TOKENIZER}"
        raise ModelNotFound(f"{str(folder)!r} holds {there}, which the tokenizer is read from. {GET_TOKENIZER}")
    problem = _misfit(_tokens(file), rows)
    if problem:
        raise WrongModel(f"{str(file)!r} is the tokenizer of another model: {problem}. {GET_TOKENIZER}")


def _misfit(tokens: Mapping[str, int], rows: int) -> str:
    for name, wanted in _SPECIAL.items():
        if tokens.get(name) != wanted:
            number = f"token {tokens[name]}" if name in tokens else "none of its tokens"
            return f"{name!r} is {number} and should be {wanted}"
    count = max(tokens.values()) + 1
    fits = rows * (1 - _UNUSED_ROWS) <= count <= rows
    return "" if fits else f"it has {count:,} tokens, where the text encoder has {rows:,} rows for them"


def _tokens(file: Path) -> dict[str, int]:
    """Return the number of every token. Raises CorruptModel where the file is no tokenizer's."""
    table = _table(file)
    try:
        pieces = table["model"]["vocab"]
        tokens = dict(pieces) if isinstance(pieces, dict) else {entry[0]: at for at, entry in enumerate(pieces)}
        tokens |= {entry["content"]: entry["id"] for entry in table["added_tokens"]}
    except (KeyError, IndexError, TypeError) as error:
        raise CorruptModel(f"{str(file)!r} is no tokenizer's file, or damaged. {GET_TOKENIZER}") from error
    if not tokens or any(type(number) is not int for number in tokens.values()):
        raise CorruptModel(f"{str(file)!r} names no tokens with their numbers: it is damaged. {GET_TOKENIZER}")
    return tokens


def _table(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except CorruptModel as error:
        with file.open("rb") as stream:
            start = stream.read(64)
        what = foreign_file(start, "a tokenizer") if start else "empty: 0 bytes"
        if what is None or start.lstrip()[:1] in (b"{", b"["):
            raise CorruptModel(f"{str(file)!r} is damaged: {error}. {GET_TOKENIZER}") from error
        raise CorruptModel(f"{str(file)!r} is {what}. {GET_TOKENIZER}") from error
