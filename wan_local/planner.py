"""Will it fit, and where does the memory go: a `Plan` from geometry, byte counts and free memory. No torch.

Takes the geometry, each part's parameter count from the checkpoint's headers, and the bytes that are free on the
device; gives the peak by stage, or refuses before a weight is read and names the nearest setting that fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wan_local.errors import DoesNotFit
from wan_local.geometry import Geometry
from wan_local.settings import ModelConfig

GIB = 2**30
_HEADROOM = 0.1  # of what is free; the allocator's fragments and the other programs live there
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What one stage holds at its peak, in bytes."""

    name: str
    weight_bytes: int
    activation_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """A run that fits: what it makes, on which device, and what each stage holds at its peak."""

    geometry: Geometry
    device: str
    compute_bytes: int
    stages: tuple[StagePlan, ...]
    free_bytes: int

    @property
    def peak(self) -> StagePlan:
        return max(self.stages, key=lambda stage: stage.peak_bytes)

    def describe(self) -> str:
        geometry = self.geometry
        return (
            f"{geometry.size}, {geometry.num_frames} frames ({geometry.generated_frames} generated, "
            f"{geometry.tokens} tokens) on {self.device}; peak about {self.peak.peak_bytes / GIB:.2f} GiB "
            f"({self.peak.name}), {self.free_bytes / GIB:.1f} GiB free"
        )


@dataclass(frozen=True, slots=True)
class Machine:
    """What the planner knows of the device: its name, bytes free on it, and bytes of one computed number."""

    device: str
    free_bytes: int
    compute_bytes: int


def make_plan(
    geometry: Geometry,
    config: ModelConfig,
    parameters: Mapping[str, int],
    machine: Machine,
    *,
    smaller: Geometry | None = None,
) -> Plan:
    """Return the plan, every part whole on the device while its stage lasts.

    parameters: number of parameters of each part. smaller: the geometry to suggest where this one does not fit.
    Raises DoesNotFit.
    """
    plan = _plan(geometry, config, parameters, machine)
    budget = int(machine.free_bytes * (1 - _HEADROOM))
    if plan.peak.peak_bytes <= budget:
        return plan
    advice = "Use a machine with more memory, or a smaller model."
    if smaller is not None:
        lesser = _plan(smaller, config, parameters, machine)
        if lesser.peak.peak_bytes <= budget:
            advice = f"{smaller.size} x {smaller.num_frames} frames would fit ({lesser.peak.peak_bytes / GIB:.1f} GiB)."
    peak = plan.peak
    raise DoesNotFit(
        f"{geometry.size} x {geometry.num_frames} frames needs {peak.peak_bytes / GIB:.1f} GiB on {machine.device} at "
        f"its peak ({peak.name}: {peak.weight_bytes / GIB:.1f} GiB of weights); {machine.free_bytes / GIB:.1f} GiB is "
        f"free, of which {budget / GIB:.1f} GiB may be used. {advice}"
    )


def _plan(geometry: Geometry, config: ModelConfig, parameters: Mapping[str, int], machine: Machine) -> Plan:
    compute = machine.compute_bytes
    activations = {
        "text": _text_bytes(config, compute),
        "image": 64 * 2**20,
        "condition": _vae_bytes(geometry, config, expand=1.5),
        "denoise": _denoise_bytes(geometry, config, compute),
        "decode": _vae_bytes(geometry, config, expand=2.0),
    }
    parts = {
        "text": ("text_encoder", compute),
        "image": ("image_encoder", compute),
        "condition": ("vae", _FLOAT32_BYTES),
        "denoise": ("transformer", compute),
        "decode": ("vae", _FLOAT32_BYTES),
    }
    stages = tuple(
        StagePlan(name, parameters[part] * item, int(activations[name])) for name, (part, item) in parts.items()
    )
    return Plan(geometry, machine.device, compute, stages, machine.free_bytes)


def _text_bytes(config: ModelConfig, compute: int) -> int:
    encoder, tokens = config.text_encoder, config.transformer.text_tokens
    return tokens * compute * (8 * encoder.d_model + 3 * encoder.d_ff) + encoder.num_heads * tokens * tokens * 8


def _vae_bytes(geometry: Geometry, config: ModelConfig, *, expand: float) -> float:
    """A handful of four-frame chunks at full resolution and base width, and every layer's memory of two frames."""
    pixels = geometry.size.height * geometry.size.width
    chunk = 4 * pixels * config.vae.base_dim * _FLOAT32_BYTES
    remembered = (2 * config.vae.num_res_blocks + 2) * 2 * pixels * config.vae.base_dim * _FLOAT32_BYTES
    return expand * (6 * chunk + 2 * remembered)


def _denoise_bytes(geometry: Geometry, config: ModelConfig, compute: int) -> int:
    """The hidden state, its float32 temporaries, q, k, v and the feed-forward's middle, and both contexts' K and V."""
    transformer, tokens = config.transformer, geometry.tokens
    hidden = tokens * transformer.dim * (compute + 6 * _FLOAT32_BYTES + 5 * compute)
    middle = 2 * tokens * transformer.ffn_dim * compute
    context_tokens = transformer.text_tokens + transformer.image_tokens
    contexts = 2 * transformer.num_layers * 2 * context_tokens * transformer.dim * compute
    return hidden + middle + contexts
