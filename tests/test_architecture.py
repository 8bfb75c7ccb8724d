"""The house stays as it was drawn: imports point one way, nothing swallows errors, nothing grows without bound."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "wan_local"
KERNELS = ROOT / "kernels" / "wan_kernels"

# A module may import from the lines above its own.
LINES = (
    ("errors", "durable", "home"),
    ("request", "geometry", "settings", "acceleration_config", "switch_config", "weight_format", "lock"),
    ("tiling",),
    ("vae_cost", "network_cost"),
    ("failure", "hub", "planner", "key_map", "header", "manifest", "runs"),
    ("timing", "fitting"),
    ("anatomy", "gguf_header", "pickle_header"),
    ("lora_header", "page_cache"),
    ("weight_files", "kinds", "scales"),
    ("stored_tensor", "tokenizer_file"),
    ("inspection",),
    ("extent", "dequantize"),
    ("tensor_reader",),
    ("lora",),
    ("device", "download", "image", "metadata", "checkpoint", "quantize", "safety", "record"),
    ("block_reader", "flat_block"),
    ("sources", "host_blocks"),
    ("attention", "layers"),
    ("fusions", "probe"),
    ("doctor",),
    ("models", "quantized_layers", "lora_branch"),
    ("offload", "store_layout", "store_journal", "diffusers_config"),
    ("parking",),
    ("store_file", "quanto"),
    ("convert",),
    ("stage",),
    ("expander",),
    ("conditioning", "scheduler", "acceleration", "denoise", "preview", "decode", "video", "report", "expansion"),
    ("identity", "cache", "ladder", "answers", "order"),
    ("workspace", "unfinished", "switches", "likeness"),
    ("encoders", "denoiser"),
    ("preparation",),
    ("pipeline",),
    ("jobs", "file_server", "quality"),
    ("webhook", "journal", "encoding", "lifecycle", "auth"),
    ("service",),
    ("handle", "realtime_connection", "submission"),
    ("client_async",),
    ("client", "server"),
    ("stand_in",),
    ("cli",),
    ("__init__", "__main__"),
)
# Within a line, these alone, from left to right: (importer, imported).
NEIGHBOURS = {
    ("durable", "errors"),
    ("image", "download"),
    ("settings", "acceleration_config"),
    ("settings", "geometry"),
    ("settings", "switch_config"),
    ("settings", "weight_format"),
    ("quantize", "checkpoint"),
    ("denoise", "scheduler"),
    ("denoise", "acceleration"),
    ("decode", "preview"),
    ("order", "identity"),
    ("__main__", "__init__"),
}
WITHOUT_TORCH = (
    "errors",
    "request",
    "geometry",
    "settings",
    "acceleration_config",
    "switch_config",
    "weight_format",
    "manifest",
    "planner",
    "fitting",
    "header",
    "anatomy",
    "gguf_header",
)
WITHOUT_TORCH += ("tiling", "vae_cost", "network_cost", "timing")
WITHOUT_TORCH += ("pickle_header", "weight_files", "lora_header", "kinds", "scales", "stored_tensor", "inspection")
WITHOUT_TORCH += ("hub", "durable", "home", "lock", "runs", "tokenizer_file")
IMPORTERS_OF_KERNELS = ("attention", "fusions", "layers", "device", "doctor")
VAGUE_NAMES = ("utils", "util", "common", "helpers", "helper", "base", "misc")

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 450
MAX_PARAMETERS = 9

FILES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])
MODULES = sorted(PACKAGE.rglob("*.py"))

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def room(path: Path) -> str:
    """Return the name under which LINES knows a file: `models/vae.py` is `models`."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def line_of(name: str) -> int:
    """Return the position of a room in LINES; a room that is not drawn there is a failure."""
    for position, line in enumerate(LINES):
        if name in line:
            return position
    pytest.fail(f"{name} is not drawn in LINES: where does it belong?")


def imports(path: Path) -> Iterator[str]:
    """Yield the absolute name of every module that a file imports, anywhere in it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: relative import"
            if node.module == "wan_local":
                yield from (f"wan_local.{alias.name}" for alias in node.names)
            else:
                yield node.module


def rooms_imported(path: Path) -> Iterator[str]:
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first != "wan_local" or rest == "__version__":  # the version may be read by all: the package itself is lazy
            continue
        target = rest.partition(".")[0]
        yield target if (PACKAGE / f"{target}.py").exists() or (PACKAGE / target).is_dir() else "__init__"


def functions(path: Path) -> Iterator[Function]:
    yield from (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` for such an expression, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def offenders(paths: Iterable[Path], breaks: Callable[[Path], object]) -> dict[str, object]:
    """Return what `breaks` finds wrong, by file; a test asserts that it is empty."""
    found = {str(path.relative_to(ROOT)): breaks(path) for path in paths}
    return {name: what for name, what in found.items() if what}


def test_imports_point_one_way() -> None:
    def against_the_order(path: Path) -> list[str]:
        importer = room(path)
        return [
            imported
            for imported in rooms_imported(path)
            if line_of(imported) >= line_of(importer)
            and (importer, imported) not in NEIGHBOURS
            and (imported != importer or imported == "__init__")
        ]

    assert not offenders((path for path in MODULES if path.name != "__init__.py"), against_the_order)


def test_there_is_no_import_cycle() -> None:
    graph = {path: set(_files_imported(path)) for path in MODULES if path.name != "__init__.py"}
    while graph:
        leaves = [path for path, targets in graph.items() if not targets & graph.keys()]
        assert leaves, f"a cycle among {sorted(str(path.relative_to(ROOT)) for path in graph)}"
        for path in leaves:
            del graph[path]


def _files_imported(path: Path) -> Iterator[Path]:
    for name in imports(path):
        target = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        if target.is_relative_to(PACKAGE) and target.exists():
            yield target


def test_the_front_rooms_import_no_torch() -> None:
    def heavy(path: Path) -> set[str]:
        return {name.split(".")[0] for name in imports(path)} & {"torch", "diffusers", "transformers", "av"}

    assert not offenders((PACKAGE / f"{name}.py" for name in WITHOUT_TORCH), heavy)


def test_only_layers_and_device_import_kernels() -> None:
    def kernels(path: Path) -> bool:
        return "wan_kernels" in {name.split(".")[0] for name in imports(path)}

    assert not offenders((path for path in MODULES if room(path) not in IMPORTERS_OF_KERNELS), kernels)


def test_only_settings_reads_the_environment() -> None:
    def environment(path: Path) -> set[str]:
        names = {dotted(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
        return names & {"os.environ", "os.getenv", "os.environb", "os.putenv"}

    assert not offenders((path for path in FILES if path != PACKAGE / "settings.py"), environment)


def test_only_cli_prints() -> None:
    def printing(path: Path) -> set[str]:
        called = {dotted(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}
        return called & {"print", "sys.stdout.write", "sys.stderr.write", "rich.print"}

    assert not offenders((path for path in FILES if PACKAGE / "cli" not in path.parents), printing)


def test_nothing_catches_everything() -> None:
    def broad(path: Path) -> list[str]:
        return [name for name in _caught(path) if name in ("", "Exception", "BaseException")]

    assert not offenders(FILES, broad)


def _caught(path: Path) -> Iterator[str]:
    """Yield the name of each exception that is caught or suppressed; an empty one for a bare `except`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            yield from (dotted(kind) if kind is not None else "" for kind in kinds)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("suppress"):
            yield from map(dotted, node.args)


def test_functions_can_be_read_in_one_sitting() -> None:
    def long(path: Path) -> dict[str, int]:
        lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions(path)}
        return {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES}

    assert not offenders(FILES, long)


def test_functions_take_few_parameters() -> None:
    def greedy(path: Path) -> dict[str, int]:
        counts = {node.name: _parameters(node) for node in functions(path)}
        return {name: count for name, count in counts.items() if count > MAX_PARAMETERS}

    # client has fal_client's signatures, word for word
    assert not offenders((path for path in MODULES if room(path) not in ("client", "client_async")), greedy)


def _parameters(node: Function) -> int:
    arguments = node.args
    every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    return len([entry for entry in every if entry.arg not in ("self", "cls")])


def test_files_stay_short() -> None:
    def long(path: Path) -> int:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        return lines if lines > MAX_FILE_LINES else 0

    assert not offenders(MODULES, long)


def test_every_file_says_what_it_is() -> None:
    assert not offenders(FILES, lambda path: not ast.get_docstring(tree(path)))


def test_files_are_named_after_a_noun_of_the_field() -> None:
    assert not offenders(FILES, lambda path: path.stem in VAGUE_NAMES)


def test_nothing_is_global() -> None:
    assert not offenders(FILES, lambda path: any(isinstance(node, ast.Global) for node in ast.walk(tree(path))))


def test_the_folder_of_kernels_is_no_package() -> None:
    """A package called `kernels` would stand before Hugging Face's own, for every user of transformers."""
    assert [path.name for path in (ROOT / "kernels").glob("*.py")] == []
