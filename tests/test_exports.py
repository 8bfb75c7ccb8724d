"""The public names: all there, none heavy to import, and the same for people, programs and type checkers."""

from __future__ import annotations

import ast
import inspect
import statistics
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import wan_local

IMPORT_SECONDS = 0.3

_TIMED_IMPORT = """
import sys, time
start = time.perf_counter()
import wan_local
seconds = time.perf_counter() - start
heavy = {"torch", "pydantic", "numpy", "av", "PIL", "httpx", "transformers", "diffusers"} & set(sys.modules)
print(seconds, *sorted(heavy))
"""


def test_importing_is_quick_and_brings_nothing_heavy() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", _TIMED_IMPORT], check=True, capture_output=True, text=True).stdout.split()
        for _ in range(5)
    ]
    assert [heavy for _, *heavy in runs] == [[]] * 5
    assert statistics.median(float(seconds) for seconds, *_ in runs) < IMPORT_SECONDS


def test_all_is_the_table_of_names() -> None:
    assert wan_local.__all__ == ["__version__", *sorted(wan_local._HOME)]
    assert len(set(wan_local.__all__)) == len(wan_local.__all__)
    assert len(wan_local._HOME) == sum(map(len, wan_local._NAMES_BY_MODULE.values())), "a name has two homes"


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(inspect.getsource(wan_local))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module
        seen |= {alias.asname: node.module.removeprefix("wan_local.") for alias in node.names}
    assert seen == wan_local._HOME


@pytest.mark.parametrize("name", wan_local.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(wan_local, name)
    if name != "__version__":
        assert value is getattr(import_module(f"wan_local.{wan_local._HOME[name]}"), name)


def test_every_error_is_public() -> None:
    errors = import_module("wan_local.errors")
    kinds = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    assert kinds == set(wan_local._NAMES_BY_MODULE["errors"])


def test_dir_lists_names_that_were_not_used_yet() -> None:
    assert set(wan_local.__all__) <= set(dir(wan_local))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = wan_local.no_such_name


def test_package_says_that_it_is_typed() -> None:
    assert (Path(wan_local.__file__).parent / "py.typed").exists()
