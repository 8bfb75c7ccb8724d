"""The language model of prompt expansion: found on disk, counted by its headers, placed by plan, loaded and freed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from wan_local.errors import CorruptModel, DoesNotFit, ModelNotFound, NotAvailable, WrongModel
from wan_local.flat_block import FlatBlock
from wan_local.header import TensorInfo
from wan_local.models.language_model import BLIND, LAYERS, SEEING, build_language_model, require_language_models
from wan_local.offload import CheckedBlocks, Residency, StreamedBlocks
from wan_local.planner import GIB, Machine, NetworkSize, StagePlan, spread, streamed_if_needed, usable_bytes
from wan_local.request import Check, unchecked
from wan_local.settings import Settings, load_expansion_config, usual_places
from wan_local.stage import freed_after
from wan_local.switch_config import ExpansionConfig, ExpansionModel
from wan_local.weight_files import read_json, read_part

Model = TypeVar("Model")
_HEAD = "lm_head.weight"
# Of a run, for the plan: two pictures, instructions and request; an answer; what they take beside the weights.
_READ_TOKENS, _ANSWER_TOKENS, _ACTIVATION_BYTES = 1000, 140, GIB // 2
# What a consumer's machine does, rounded down: bytes a second from file, bus, RAM and card memory; operations.
_FILE, _BUS, _RAM, _CARD = 1.5e9, 10e9, 15e9, 300e9
_CPU_FLOPS, _CARD_FLOPS = 1e11, 2e13


@dataclass(frozen=True, slots=True)
class Expander:
    """A language model on disk."""

    folder: Path
    kind: str
    tensors: Mapping[str, TensorInfo]
    size: NetworkSize

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def sees_pictures(self) -> bool:
        return self.kind == SEEING


def find_expanders(settings: Settings) -> list[Expander]:
    """Return the model that the settings name, else every known one that is here, the preferred one first.

    Raises ModelNotFound with what to download and how; NotAvailable, WrongModel, CorruptModel.
    """
    require_language_models()
    config = load_expansion_config()
    if settings.expansion_model is not None:
        folder = Path(settings.expansion_model).expanduser()
        if not (folder / "config.json").is_file():
            raise ModelNotFound(
                f"expansion_model is {str(folder)!r}, which holds no config.json. {how_to_get(config, settings)}"
            )
        return [open_expander(folder)]
    folders = [
        folder for known in config.models for folder in usual_places(settings, known.folder_name, known.repository)
    ]
    found = [open_expander(folder) for folder in folders if (folder / "config.json").is_file()]
    if not found:
        raise ModelNotFound(
            f"enable_prompt_expansion needs a language model, and none was found. {how_to_get(config, settings)} "
            "Or leave enable_prompt_expansion false. Nothing was generated."
        )
    return found


def open_expander(folder: Path) -> Expander:
    """Read the headers in `folder` and identify what it holds. Raises WrongModel, ModelNotFound, CorruptModel."""
    kind = str(read_json(folder / "config.json").get("model_type"))
    if kind not in LAYERS:
        raise WrongModel(
            f"{folder} holds a model of type {kind!r}; prompt expansion knows {SEEING!r} (Qwen3-VL, sees both images) "
            f"and {BLIND!r} (Qwen3, text only)."
        )
    _require_files(folder, kind)
    tensors = read_part(folder).tensors
    path = f"{LAYERS[kind]}."
    numbers = {name: math.prod(info.shape) for name, info in tensors.items()}
    layers = {name.removeprefix(path).split(".")[0] for name in numbers if name.startswith(path)}
    block = [count for name, count in numbers.items() if name.startswith(f"{path}0.")]
    size = NetworkSize(sum(numbers.values()), sum(block), len(layers), largest=(max(block, default=0), 0))
    return Expander(folder, kind, tensors, size)


def _require_files(folder: Path, kind: str) -> None:
    """Raise CorruptModel where one of the small files that are read beside the weights is missing."""
    needed = ("tokenizer.json", *(("preprocessor_config.json",) if kind == SEEING else ()))
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise CorruptModel(f"{folder} lacks {' and '.join(missing)}. Download the model again, with all of its files.")


def how_to_get(config: ExpansionConfig, settings: Settings) -> str:
    """Return the sentence that says what to download, how large it is, and the command."""
    first, small = config.models[:2]
    target = settings.models_dir / first.folder_name
    return (
        f"Download {first.repository} (about {first.download_gigabytes} GB) to {target} with `wan-local download "
        f"--expansion` (for small cards `wan-local download --expansion {small.folder_name}`, "
        f"{small.download_gigabytes} GB), or name the folder you have one in as expansion_model (or "
        "WAN_LOCAL_EXPANSION_MODEL)."
    )


def describe(settings: Settings) -> str:
    """Return one line on whether prompt expansion can be used here, and with what; nothing but headers is read."""
    try:
        found = find_expanders(settings)
    except (ModelNotFound, NotAvailable, WrongModel, CorruptModel) as error:
        return f"not available: {error}"
    return ", ".join(
        f"{model.name} ({model.size.total / 1e9:.1f} billion parameters, "
        f"{'sees both images' if model.sees_pictures else 'text only'}) in {model.folder}"
        for model in found
    )


def sizes_of(found: Sequence[Expander]) -> list[tuple[Expander, NetworkSize]]:
    return [(expander, expander.size) for expander in found]


def known_sizes(config: ExpansionConfig) -> list[tuple[ExpansionModel, NetworkSize]]:
    """Return the known models with their published sizes: what a plan can be made of before a download."""
    return [(known, NetworkSize(known.parameters, known.block_parameters, known.num_blocks)) for known in config.models]


def choose_model(sizes: Sequence[tuple[Model, NetworkSize]], machines: Sequence[Machine]) -> tuple[Model, StagePlan]:
    """Return the first model that stays whole on the run's device (`machines[0]`), else the one soonest done.

    Raises DoesNotFit where none fits any of the machines, or would be done in time.
    """
    plans = []
    for model, size in sizes:
        try:
            plan = plan_expansion(size, machines)
        except DoesNotFit as error:
            refusal = error
            continue
        if plan.device is None and plan.resident_blocks is None:
            return model, plan
        plans.append((model, plan))
    if not plans:
        raise refusal
    return min(plans, key=lambda pair: pair[1].seconds or math.inf)


def plan_expansion(size: NetworkSize, machines: Sequence[Machine]) -> StagePlan:
    """Return where a model of this size runs: whole or streamed, on the run's device (the first) or another.

    The placement with the fewest predicted seconds is taken. Raises DoesNotFit.
    """
    limit = load_expansion_config().max_seconds
    plans = [_placed(size, machine, machines[0]) for machine in machines]
    fitting = [plan for plan, machine in zip(plans, machines, strict=True) if plan.peak_bytes <= usable_bytes(machine)]
    best = min(fitting, key=lambda plan: plan.seconds or math.inf, default=None)
    if best is None or (best.seconds or 0.0) > limit:
        why = (
            ""
            if best is None
            else f"; the quickest way that fits would take {best.seconds:.0f} s, {limit} s are allowed"
        )
        free = ", ".join(f"{machine.free_bytes / GIB:.1f} GiB free on {machine.device}" for machine in machines)
        raise DoesNotFit(
            f"the language model for prompt expansion has {size.total / 1e9:.1f} billion parameters and needs at least "
            f"{min(plan.peak_bytes for plan in plans) / GIB:.1f} GiB ({free}){why}. Use a smaller one such as "
            "Qwen3-VL-2B-Instruct, or leave enable_prompt_expansion false. Nothing was generated."
        )
    return best


def _placed(size: NetworkSize, machine: Machine, run: Machine) -> StagePlan:
    whole = StagePlan("expansion", size.weight_bytes(machine.compute_bytes), _ACTIVATION_BYTES)
    plan = streamed_if_needed(whole, size, machine)
    device = None if machine.device == run.device else machine.device
    return replace(plan, device=device, seconds=_seconds(plan, size, machine))


def _seconds(plan: StagePlan, size: NetworkSize, machine: Machine) -> float:
    """Predict loading, reading the request, and writing the answer, for which each token needs every weight once."""
    on_cpu = machine.device == "cpu"
    waiting = 0 if plan.resident_blocks is None else (size.num_blocks - plan.resident_blocks) * size.block
    staying = (size.total - waiting) * machine.compute_bytes
    stored = 2  # bytes of a bfloat16 on disk
    way, path = (waiting * stored, _FILE) if plan.source == "file" else (waiting * machine.compute_bytes, _BUS)
    loading = (size.total - (waiting if plan.source == "file" else 0)) * stored / _FILE
    reading = 2 * size.total * _READ_TOKENS / (_CPU_FLOPS if on_cpu else _CARD_FLOPS)
    writing = _ANSWER_TOKENS * (staying / (_RAM if on_cpu else _CARD) + way / path)
    return loading + reading + writing


@contextmanager
def expander_stage(
    expander: Expander, device: torch.device, dtype: torch.dtype, plan: StagePlan, *, check: Check = unchecked
) -> Iterator[Any]:
    """Hand out the model on `device` in `dtype`, placed as planned, and free it at the end.

    check: called before each tensor that is read and before each layer that runs.
    """
    module = build_language_model(expander.folder)
    with _Weights(expander, device, dtype, check) as weights, freed_after(module, device):
        _load(module, expander, weights, plan)
        yield module


class _Weights(ExitStack):
    """Reads an expander's tensors, one at a time, from files that stay open until the end of the `with` block."""

    def __init__(self, expander: Expander, device: torch.device, dtype: torch.dtype, check: Check) -> None:
        super().__init__()
        self.device, self.dtype, self.check = device, dtype, check
        self._tensors = expander.tensors
        self._files: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        self.check()
        path = self._tensors[name].file
        if path not in self._files:
            self._files[path] = self.enter_context(safe_open(path, framework="pt"))
        tensor: Tensor = self._files[path].get_tensor(name)
        return tensor


def _load(module: nn.Module, expander: Expander, weights: _Weights, plan: StagePlan) -> None:
    tied = _HEAD not in expander.tensors and bool(cast(Any, module).config.tie_word_embeddings)
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items() if not (tied and name == _HEAD)}
    _compare(expander, expected)
    path = LAYERS[expander.kind]
    layers = list(cast(nn.ModuleList, module.get_submodule(path)))
    resident = spread(len(layers), len(layers) if plan.resident_blocks is None else plan.resident_blocks)
    absent = tuple(f"{path}.{index}." for index in range(len(layers)) if index not in resident)
    here = [name for name in expected if not absent or not name.startswith(absent)]
    module.load_state_dict({name: weights[name].to(weights.device, weights.dtype) for name in here}, False, assign=True)
    if tied:
        cast(Any, module).lm_head.weight = cast(Any, module).get_input_embeddings().weight
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(name, buffer.to(weights.device), persistent=False)
    module.eval().requires_grad_(False)
    module.set_submodule(path, Layers(_blocks(layers, path, weights, plan, resident), len(layers)))


def _compare(expander: Expander, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WrongModel that lists what is missing, unexpected or of another shape."""
    missing, unexpected = (
        sorted(expected.keys() - expander.tensors.keys()),
        sorted(expander.tensors.keys() - expected.keys()),
    )
    wrong = [name for name in expected if name in expander.tensors and expander.tensors[name].shape != expected[name]]
    if missing or unexpected or wrong:
        raise WrongModel(
            f"the weights in {expander.folder} do not fit its config.json: {len(missing)} tensors missing "
            f"{missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}, {len(wrong)} of another shape {wrong[:3]}"
        )


def _blocks(
    layers: Sequence[nn.Module], path: str, weights: _Weights, plan: StagePlan, resident: frozenset[int]
) -> CheckedBlocks | StreamedBlocks:
    if len(resident) == len(layers):
        return CheckedBlocks(layers, weights.check)
    assert plan.source is not None, plan

    def fill(index: int, views: Mapping[str, Tensor]) -> None:
        for name, view in views.items():
            view.copy_(weights[f"{path}.{index}.{name}"])

    layouts, residency = (
        [FlatBlock(layer, lambda _: weights.dtype) for layer in layers],
        Residency(resident, plan.source),
    )
    return StreamedBlocks(layers, layouts, fill, residency, weights.device, check=weights.check)


class Layers(nn.Module):
    """Stands for a decoder's list of layers, streamed or not, also where it is asked for all of them as a slice."""

    def __init__(self, blocks: CheckedBlocks | StreamedBlocks, count: int) -> None:
        super().__init__()
        self.blocks, self._count = blocks, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[nn.Module]:
        yield from self.blocks

    def __getitem__(self, which: slice) -> Layers:
        assert which == slice(None, self._count), which  # how Qwen3 asks for all of them
        return self
