"""A tokenizer is looked at before weights are read: another model's, or a damaged one, is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.layouts import TINY
from wan_local.checkpoint import open_model
from wan_local.cli import main
from wan_local.conditioning import load_tokenizer
from wan_local.errors import CorruptModel, ModelNotFound, WanLocalError, WrongModel
from wan_local.inspection import inspect
from wan_local.sources import open_source
from wan_local.tokenizer_file import check_tokenizer, tokenizer_folder

ROWS = 1024
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 16837417\n"


def unigram(*special: str, count: int = ROWS) -> str:
    """Return a tokenizer's file as sentencepiece's are written."""
    pieces = [*special, *(f"piece {number}" for number in range(len(special), count))]
    added = [{"id": number, "content": name} for number, name in enumerate(special)]
    vocabulary = [[piece, -1.0] for piece in pieces]
    return json.dumps({"added_tokens": added, "model": {"type": "Unigram", "vocab": vocabulary}})


UMT5 = ("<pad>", "</s>", "<unk>")
REFUSED: dict[str, tuple[str, type[WanLocalError], str]] = {
    "xlm-roberta's": (unigram("<s>", "<pad>", "</s>", "<unk>"), WrongModel, r"'<pad>' is token 1 and should be 0"),
    "clip's": (unigram("!", "a"), WrongModel, r"'<pad>' is none of its tokens and should be 0"),
    "mt5's": (unigram(*UMT5, count=999), WrongModel, r"999 tokens, where the text encoder has 1,024 rows"),
    "a larger one": (unigram(*UMT5, count=1025), WrongModel, r"1,025 tokens, where the text encoder has 1,024 rows"),
    "a pointer": (POINTER, CorruptModel, r"is a git-lfs pointer, not a tokenizer\. Run `git lfs pull`"),
    "a page": ("<!DOCTYPE html><html>", CorruptModel, r"is an HTML or XML page, not a tokenizer"),
    "nothing": ("", CorruptModel, r"is empty: 0 bytes"),
    "cut short": (unigram(*UMT5)[:900], CorruptModel, r"is damaged: 'tokenizer\.json' is not JSON"),
    "a list": ("[1]", CorruptModel, r"is damaged: 'tokenizer\.json' is a JSON list"),
    "another table": ('{"a": 1}', CorruptModel, r"is no tokenizer's file"),
    "words for numbers": (unigram(*UMT5).replace('"id": 2', '"id": "2"'), CorruptModel, r"no tokens with their num"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_umt5s_is_refused_with_where_to_get_it(name: str, tmp_path: Path) -> None:
    content, error, says = REFUSED[name]
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(error, match=rf"{says}.*google/umt5-xxl"):
        check_tokenizer(tmp_path, rows=ROWS)


@pytest.mark.parametrize(("count", "rows"), [(1024, 1024), (1020, 1024), (256_300, 256_384), (256_000, 256_384)])
def test_a_table_with_a_few_rows_more_than_tokens_fits(count: int, rows: int, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(unigram(*UMT5, count=count))
    check_tokenizer(tmp_path, rows=rows)


def test_sentencepieces_file_alone_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(b"\n\x0e\n\x05<pad>")
    assert tokenizer_folder(tmp_path) == tmp_path / "tokenizer"
    with pytest.raises(ModelNotFound, match=r"spiece\.model without tokenizer\.json.*google/umt5-xxl"):
        check_tokenizer(tmp_path / "tokenizer", rows=ROWS)
    shutil.copy(TINY / "tokenizer" / "tokenizer.json", tmp_path)
    assert tokenizer_folder(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["xlm-roberta's", "a pointer"])
def test_every_way_to_a_model_looks_at_its_tokenizer(name: str, tmp_path: Path, capsys: Any) -> None:
    content, error, says = REFUSED[name]
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    (folder / "tokenizer" / "tokenizer.json").write_text(content)
    for opened in (open_source, open_model):
        with pytest.raises(error, match=says):
            opened(folder)
    assert says.replace("\\", "") in inspect(folder).missing["tokenizer"]
    arguments = ["--start-image", "a.png", "--end-image", "b.png", "--prompt", "a bird", "--output", "o.mp4"]
    assert main(["generate", "--model", str(folder), *arguments]) == 1
    assert says.replace("\\", "") in capsys.readouterr().err


def spoil_table(folder: Path) -> None:
    table = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({name: table[name] for name in ("model",)}))


@pytest.mark.parametrize(
    "spoil", [spoil_table, lambda folder: (folder / "tokenizer_config.json").write_text("{")], ids=["table", "config"]
)
def test_a_tokenizer_that_cannot_be_loaded_is_damage(spoil: Callable[[Path], object], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY / "tokenizer", tmp_path / "tokenizer"))
    spoil(folder)
    with pytest.raises(CorruptModel, match=r"can't be loaded: .*google/umt5-xxl"):
        load_tokenizer(folder)
