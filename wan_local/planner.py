"""Will it fit, and where does the memory go: a `Plan` from geometry, byte counts and free memory. No torch.

Takes the geometry, each network's parameter count from the checkpoint's headers, and the bytes that are free on the
device and in RAM; gives the peak by stage. Whether that is too much, `fitting` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from wan_local.geometry import Geometry
from wan_local.network_cost import (
    PLAIN_LOOP,
    LoopKernels,
    context_stage_bytes,
    contexts_bytes,
    image_bytes,
    loop_bytes,
    parked_bytes,
    text_bytes,
    token_bytes,
)
from wan_local.settings import ModelConfig, TransformerConfig
from wan_local.tiling import WHOLE, Tiling
from wan_local.vae_cost import VaeHalf, kept_bytes, tilings, vae_bytes
from wan_local.weight_format import Int8Arithmetic

Source = Literal["ram", "file"]  # where streamed blocks wait

GIB = 2**30
HEADROOM = 0.1  # of what is free; the allocator's fragments and the other programs live there
_RUNG = 0.75  # of what a stage was planned to hold, when that turned out to be more than there is
_FLOAT32_BYTES = 4
_CHUNK_BYTES = GIB  # temporaries of the tokens in flight, where there is room
_SMALL_CHUNK_BYTES = GIB // 4  # and where there is not
_MIN_CHUNK = 1024  # fewer tokens at a time leave a card idle
_RAM_SHARE = 0.8  # of the free RAM that waiting blocks may take
_GROWTH_BYTES = GIB * 5 // 4  # that stay free for the process itself: beside a card it grew by 0.92 GB after the plan
W8A8_TOKENS = 2048  # whose sums of integers are held at a time
_DEQUANTIZING, _DEQUANTIZING_ON_CARD = 2**22, 2**26  # bytes of the rows of a weight that are float32 at a time
# what stages of one pass use int8 weights by: T5's outliers are too far out for int8 inputs, and speed matters little
_ONCE: Int8Arithmetic = "weight-only"
LIBRARY_BYTES = 2**26  # workspaces of cuBLAS and its like; an H200 held 20 MB in a stage that needs little else
_HEAP_BYTES = 3 * 2**27  # on a CPU: freed pieces of up to 32 MiB that the C library keeps; up to 0.28 GiB were measured
SLOTS = 2  # of the ring that streamed blocks pass through, and of the one in RAM for what is read from a file
SPAN_BYTES = 2**26  # that are read from a file and copied to the card at a time; one larger tensor where that is more


@dataclass(frozen=True, slots=True)
class NetworkSize:
    """How many numbers a network holds: in all, in one of its blocks, and in a table of which few rows are needed.

    `wide` of them stay float32 whatever the compute dtype. Quantized weights are not among them: they take `packed`
    bytes in all, whatever is computed in, and the largest one stands for `unpacked` numbers; `nibbles`: two of them in
    a byte; `integers`: all of them are whole numbers, so that int8 inputs can meet them. `blocks` has the numbers and
    the packed bytes of each block where these count or differ; `largest` those of the largest tensors in any of them,
    None where that is not known.
    """

    total: int
    block: int = 0
    num_blocks: int = 0
    table: int = 0
    wide: int = 0
    packed: int = 0
    unpacked: int = 0
    nibbles: bool = False
    integers: bool = False
    blocks: tuple[tuple[int, int], ...] = ()
    largest: tuple[int, int] | None = None

    def weight_bytes(self, compute_bytes: int) -> int:
        return self.total * compute_bytes + self.wide * (_FLOAT32_BYTES - compute_bytes) + self.packed

    def block_bytes(self, compute_bytes: int) -> list[int]:
        """Return the bytes of each block."""
        blocks = self.blocks or ((self.block, 0),) * self.num_blocks
        return [numbers * compute_bytes + packed for numbers, packed in blocks]

    def span_bytes(self, compute_bytes: int) -> int:
        """Return the most bytes of a block that are read from a file at a time."""
        block = max(self.block_bytes(compute_bytes), default=0)
        if self.largest is None:
            return block
        numbers, packed = self.largest
        return min(block, max(SPAN_BYTES, numbers * compute_bytes, packed))


def spread(num_blocks: int, num_resident: int) -> frozenset[int]:
    """Return which blocks stay: evenly between the streamed ones, so that each copy can hide behind equal compute."""
    streamed = num_blocks - num_resident
    gone = {(2 * index + 1) * num_blocks // (2 * streamed) for index in range(streamed)} if streamed else set()
    return frozenset(range(num_blocks)) - gone


@dataclass(frozen=True, slots=True)
class Machine:
    """What the planner knows: the device, the bytes free on it and in RAM, the bytes of one computed number.

    int8_arithmetic: what int8 weights are used by in the loop. kernels: what the loop computes with.
    """

    device: str
    free_bytes: int
    free_ram_bytes: int
    compute_bytes: int
    int8_arithmetic: Int8Arithmetic = "weight-only"
    kernels: LoopKernels = PLAIN_LOOP


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What one stage holds at its peak, in bytes.

    `resident_blocks` stay on the device and the others stream from `source`; None: all stay.
    `device` is where it runs, None for the run's own. `seconds` it will take about, None where that is not known.
    `int8_arithmetic` is what int8 weights are used by; None: as suits the device.
    `tiling` is of the VAE's frames. `together`: both branches of guidance go block by block, so that streamed weights
    move once a step. `parked`: keys and values of cross-attention wait in RAM. `ram_bytes` wait in RAM meanwhile where
    the device is a card: blocks, keys and values, features. `streamed_bytes` are copied to it in each pass.
    `whole_bytes`: what it would hold if nothing streamed and frames were whole, where that is not what it holds.
    """

    name: str
    weight_bytes: int
    activation_bytes: int
    resident_blocks: int | None = None
    source: Source | None = None
    device: str | None = None
    seconds: float | None = None
    int8_arithmetic: Int8Arithmetic | None = None
    tiling: Tiling = WHOLE
    together: bool = False
    parked: bool = False
    ram_bytes: int = 0
    streamed_bytes: int = 0
    whole_bytes: int | None = None

    @property
    def peak_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """A run that fits: what it makes, on which device, and what each stage holds at its peak."""

    geometry: Geometry
    device: str
    chunk_tokens: int
    stages: tuple[StagePlan, ...]
    free_bytes: int

    @property
    def usable_bytes(self) -> int:
        """Return what it may use of the free bytes; the rest is headroom."""
        return _usable(self.free_bytes)

    @property
    def peak(self) -> StagePlan:
        here = [stage for stage in self.stages if stage.device in (None, self.device)]
        return max(here, key=lambda stage: stage.peak_bytes)

    @property
    def peak_in_ram(self) -> StagePlan:
        """Return the stage with the most waiting in RAM beside a card."""
        return max(self.stages, key=lambda stage: stage.ram_bytes)

    def stage(self, name: str) -> StagePlan:
        return next(stage for stage in self.stages if stage.name == name)

    def preceded_by(self, *stages: StagePlan) -> Plan:
        """Return the plan with stages that run before all others."""
        return replace(self, stages=(*stages, *self.stages))

    def describe(self) -> str:
        geometry, looped = self.geometry, self.stage("denoise")
        streaming = ""
        if looped.resident_blocks is not None:
            streaming = f"; {looped.resident_blocks} transformer blocks stay, the others stream from {looped.source}"
        return (
            f"{geometry.size}, {geometry.num_frames} frames ({geometry.generated_frames} generated, "
            f"{geometry.tokens} tokens) on {self.device}; peak about {self.peak.peak_bytes / GIB:.2f} GiB "
            f"({self.peak.name}), {self.free_bytes / GIB:.1f} GiB free{streaming}"
        )


def plan_within(
    geometry: Geometry,
    config: ModelConfig,
    sizes: Mapping[str, NetworkSize],
    machine: Machine,
    *,
    most_tokens: int | None = None,
) -> Plan:
    """Return the plan with the least in memory that costs no more time than it must; it may not fit all the same.

    most_tokens: that may go at a time in the loop, if there is a limit.
    """
    compute, once = machine.compute_bytes, replace(machine, int8_arithmetic=_ONCE)
    denoising, chunk = _denoising(geometry, config, sizes["transformer"], machine, most_tokens or geometry.tokens)
    embedding = context_stage_bytes(config, compute, parked=denoising.parked)
    waiting = contexts_bytes(config, compute) if denoising.parked else 0

    def in_linear(network: str) -> int:
        return _quantized_bytes(sizes[network], config, once)

    def encoding(name: str, network: str, held: int) -> StagePlan:
        size = sizes[network]
        held += _library_bytes(machine, held)
        return StagePlan(name, size.weight_bytes(compute), held, int8_arithmetic=_ONCE if size.packed else None)

    text = encoding("text", "text_encoder", text_bytes(config, compute, in_linear=in_linear("text_encoder")))
    context = encoding("context", "context_embedder", embedding + in_linear("context_embedder"))
    context = replace(context, ram_bytes=waiting, parked=denoising.parked)
    stages = (
        streamed_if_needed(text, sizes["text_encoder"], machine, once=True),
        encoding("image", "image_encoder", image_bytes(config, compute) + in_linear("image_encoder")),
        _tiled("condition", "encoder", geometry, config, sizes["vae_encoder"], machine),
        streamed_if_needed(context, sizes["context_embedder"], machine, once=True),
        denoising,
        _tiled("decode", "decoder", geometry, config, sizes["vae_decoder"], machine),
    )
    return Plan(geometry, machine.device, chunk, stages, machine.free_bytes)


def shrink(
    plan: Plan, name: str, config: ModelConfig, sizes: Mapping[str, NetworkSize], machine: Machine
) -> Plan | None:
    """Return `plan` with the stage `name` planned for three quarters of its bytes; None where it cannot do with less.

    Fewer blocks stay on the device; where none does any more, fewer tokens go at a time.
    """
    stage = plan.stage(name)
    smaller = replace(machine, free_bytes=int(stage.peak_bytes * _RUNG / (1 - HEADROOM)))
    lesser_plan = plan_within(plan.geometry, config, sizes, smaller, most_tokens=plan.chunk_tokens)
    if lesser_plan.stage(name) == stage:
        if name != "denoise" or plan.chunk_tokens <= _MIN_CHUNK:
            return None
        half = max(plan.chunk_tokens // 2, _MIN_CHUNK)
        lesser_plan = plan_within(plan.geometry, config, sizes, smaller, most_tokens=half)
    lesser = lesser_plan.stage(name)
    stages = tuple(lesser if other.name == name else other for other in plan.stages)
    chunk = lesser_plan.chunk_tokens if name == "denoise" else plan.chunk_tokens
    return replace(plan, stages=stages, chunk_tokens=chunk)


def plan_on_cpu(
    geometry: Geometry, name: str, config: ModelConfig, sizes: Mapping[str, NetworkSize], machine: Machine
) -> StagePlan | None:
    """Return the stage `name` as `machine`, a CPU beside the run's card, can do it; None where there is no room."""
    stage = plan_within(geometry, config, sizes, machine).stage(name)
    return stage if stage.peak_bytes <= usable_bytes(machine) else None


def usable_bytes(machine: Machine) -> int:
    """Return what a plan may use of the free bytes; the rest is headroom."""
    return _usable(machine.free_bytes)


def _usable(free: int) -> int:
    return int(free * (1 - HEADROOM))


def usable_ram_bytes(machine: Machine) -> int:
    """Return what may wait in RAM beside a card: four fifths of what is free, and all but 1.25 GiB of it.

    The rest is for the process itself, which grows by CUDA's libraries and the encoder of the video, and everyone else.
    """
    return max(min(int(machine.free_ram_bytes * _RAM_SHARE), machine.free_ram_bytes - _GROWTH_BYTES), 0)


def free_ram_for(ram_bytes: int) -> int:
    """Return what has to be free for that much to wait in RAM: see `usable_ram_bytes`."""
    return max(math.ceil(ram_bytes / _RAM_SHARE), ram_bytes + _GROWTH_BYTES) if ram_bytes else 0


@dataclass(frozen=True, slots=True)
class _Way:
    """A way through the loop; see `StagePlan`."""

    chunk_bytes: int
    streamed: bool = False
    together: bool = False
    parked: bool = False


# What costs least time first: smaller chunks, then streaming, then moving the weights twice a step.
_WAYS = (
    _Way(_CHUNK_BYTES),
    _Way(_SMALL_CHUNK_BYTES),
    _Way(_CHUNK_BYTES, streamed=True, together=True),
    _Way(_SMALL_CHUNK_BYTES, streamed=True, together=True),
    _Way(_SMALL_CHUNK_BYTES, streamed=True, together=True, parked=True),
    _Way(_SMALL_CHUNK_BYTES, streamed=True, parked=True),
    _Way(_SMALL_CHUNK_BYTES // 2, streamed=True, parked=True),
)


def _denoising(
    geometry: Geometry, config: ModelConfig, size: NetworkSize, machine: Machine, most_tokens: int
) -> tuple[StagePlan, int]:
    """Return the loop's stage and its tokens at a time, the first of the ways that fits; the last where none does."""
    compute, transformer = machine.compute_bytes, config.transformer
    kernels = machine.kernels
    kernels = replace(kernels, int8_rows=size.integers and machine.int8_arithmetic == "w8a8")
    for way in _WAYS:
        if way.parked and machine.device == "cpu":
            continue  # all of it is in RAM
        chunk = min(chunk_tokens(transformer, geometry.tokens, compute, way.chunk_bytes), most_tokens)
        in_linear = _quantized_bytes(size, config, machine, rows=chunk)
        contexts = parked_bytes(config, compute, SLOTS) if way.parked else contexts_bytes(config, compute)
        looping = loop_bytes(
            geometry, config, chunk, compute, together=way.together, in_linear=in_linear, kernels=kernels
        )
        # in RAM: all of them, and a ring like the device's to copy from
        waiting = contexts_bytes(config, compute) + parked_bytes(config, compute, SLOTS) if way.parked else 0
        stage = StagePlan(
            "denoise",
            size.weight_bytes(compute),
            contexts + looping + _library_bytes(machine, contexts + looping),
            int8_arithmetic=machine.int8_arithmetic if size.packed else None,
            together=way.together,
            parked=way.parked,
            ram_bytes=waiting,
        )
        if way.streamed:
            stage = streamed_if_needed(stage, size, machine)
        if stage.peak_bytes <= usable_bytes(machine) and stage.ram_bytes <= usable_ram_bytes(machine):
            break
    return stage, chunk


def _tiled(
    name: str, half: VaeHalf, geometry: Geometry, config: ModelConfig, size: NetworkSize, machine: Machine
) -> StagePlan:
    """Return the VAE's stage with the tiles that cost least of those that fit; with the smallest where none fits."""
    plans: list[StagePlan] = []
    for tiling in tilings(geometry, config.vae, half):
        held = vae_bytes(half, geometry, config.vae, tiling)
        held += _library_bytes(machine, held)
        kept = kept_bytes(half, geometry, config.vae, tiling)
        on_cpu = machine.device == "cpu"
        plan = StagePlan(
            name,
            size.weight_bytes(_FLOAT32_BYTES),
            held + kept if on_cpu else held,
            tiling=tiling,
            ram_bytes=0 if on_cpu else kept,
            whole_bytes=plans[0].peak_bytes if plans else None,
        )
        if plan.peak_bytes <= usable_bytes(machine) and plan.ram_bytes <= usable_ram_bytes(machine):
            return plan
        plans.append(plan)
    return min(plans, key=lambda plan: plan.peak_bytes)


def streamed_if_needed(stage: StagePlan, size: NetworkSize, machine: Machine, *, once: bool = False) -> StagePlan:
    """Return the stage with as many blocks resident as fit beside the ring, where they do not all fit.

    once: each block is used once or, for two prompts, twice, so that the others stream from the file: filling RAM with
    them first would only make the first one wait.
    """
    budget, compute = usable_bytes(machine), machine.compute_bytes
    if stage.peak_bytes <= budget:
        return stage
    blocks = size.block_bytes(compute)
    rest = size.weight_bytes(compute) - size.table * compute - sum(blocks)
    activation = stage.activation_bytes
    for resident in range(max(0, len(blocks) - SLOTS), -1, -1):
        stay = spread(len(blocks), resident)
        waiting = [block for index, block in enumerate(blocks) if index not in stay]
        weights = rest + sum(blocks) - sum(waiting) + SLOTS * max(waiting)
        if machine.device == "cpu":
            weights += size.span_bytes(compute)  # there they also pass through a buffer in the file's dtypes
        if activation + weights <= budget:
            break
    on_cpu, in_ram = machine.device == "cpu", stage.ram_bytes + sum(waiting)
    source: Source = "ram" if not (on_cpu or once) and in_ram <= usable_ram_bytes(machine) else "file"
    if source == "file":
        in_ram = 0 if on_cpu else stage.ram_bytes + (SLOTS + 1) * size.span_bytes(compute)  # one: being converted
    return replace(
        stage,
        weight_bytes=weights,
        resident_blocks=resident,
        source=source,
        ram_bytes=in_ram,
        streamed_bytes=sum(waiting),
        whole_bytes=stage.peak_bytes,
    )


def _library_bytes(machine: Machine, held: int) -> int:
    """What libraries take beside the `held` bytes of tensors: workspaces on a card, in RAM what a heap keeps."""
    return min(_HEAP_BYTES, held // 2) if machine.device == "cpu" else LIBRARY_BYTES


def _quantized_bytes(size: NetworkSize, config: ModelConfig, machine: Machine, rows: int = W8A8_TOKENS) -> int:
    """Bytes that the largest quantized linear takes while it runs: dequantized, or its inputs and sums as integers."""
    if not size.packed:
        return 0
    if machine.int8_arithmetic == "w8a8":
        widest = max(config.transformer.ffn_dim, config.text_encoder.d_ff, config.image_encoder.intermediate_size)
        return min(rows, W8A8_TOKENS) * widest * (2 * _FLOAT32_BYTES + 1)
    wide = _DEQUANTIZING if machine.device == "cpu" else _DEQUANTIZING_ON_CARD
    return size.unpacked * machine.compute_bytes + wide * (2 if size.nibbles else 1)


def chunk_tokens(
    transformer: TransformerConfig, tokens: int, compute_bytes: int, chunk_bytes: int = _CHUNK_BYTES
) -> int:
    """Return how many tokens the blocks work on at a time, so that the temporaries stay within `chunk_bytes`."""
    return min(tokens, max(_MIN_CHUNK, chunk_bytes // max(token_bytes(transformer, compute_bytes))))
