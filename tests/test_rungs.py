"""Every rung that the loop and the VAE can go down is planned within 8 % of what is counted, and never below."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.live_bytes import live_bytes
from tests.test_planner import one_block
from tests.test_vae_cost import counted_decoding, counted_encoding
from wan_local import quantize
from wan_local.attention import KernelChoice
from wan_local.flat_block import FlatBlock
from wan_local.geometry import Geometry, Size
from wan_local.models import causal_layers
from wan_local.models.transformer import Transformer, stays_float32
from wan_local.models.vae import Vae
from wan_local.network_cost import LoopKernels, contexts_bytes, parked_bytes
from wan_local.offload import Residency, StreamedBlocks
from wan_local.planner import GIB, LIBRARY_BYTES, SLOTS, Machine, Plan, plan_within, shrink, spread
from wan_local.quantize import stays_as_stored
from wan_local.quantized_layers import hold_in_format
from wan_local.settings import AttentionName, load_model_config
from wan_local.stage import network_sizes
from wan_local.vae_cost import VaeHalf, vae_bytes
from wan_local.weight_format import Int8Arithmetic, WeightFormat, WeightFormats

REAL = load_model_config("flf2v_14b")
LARGE, SMALL = Geometry(Size(720, 1280), 81), Geometry(Size(480, 832), 81)
META = torch.device("meta")


def rungs(geometry: Geometry, name: str, formats: WeightFormats, machine: Machine) -> Iterator[Plan]:
    """Yield the first plan and all below it."""
    sizes = network_sizes(REAL, formats)
    plan: Plan | None = plan_within(geometry, REAL, sizes, machine)
    while plan is not None:
        yield plan
        plan = shrink(plan, name, REAL, sizes, machine)


@functools.cache
def weights_held(format_: WeightFormat, num_resident: int | None) -> int:
    """Return the bytes that the loop's weights hold: all of them, or those that stay and the real ring's."""
    with META:
        network = Transformer(REAL.transformer)
    hold_in_format(network, "transformer", WeightFormats(format_))
    for name, parameter in network.named_parameters():
        if not stays_float32(name) and not stays_as_stored(name, parameter.dtype):
            parameter.data = parameter.data.to(torch.bfloat16)
    if num_resident is None:
        return sum(parameter.nbytes for parameter in network.parameters())
    blocks, stay = list(network.blocks), spread(40, num_resident)  # type: ignore[call-overload]
    rest = sum(parameter.nbytes for name, parameter in network.named_parameters() if not name.startswith("blocks."))
    resident = sum(parameter.nbytes for index in stay for parameter in blocks[index].parameters())
    dtypes = {name: parameter.dtype for name, parameter in blocks[0].named_parameters()}
    layouts = [FlatBlock(block, dtypes.__getitem__) for block in blocks]
    with live_bytes() as ring:
        StreamedBlocks(blocks, layouts, lambda *_: None, Residency(stay, "file"), META).close()
    return rest + resident + ring.peak


LOOPS: list[tuple[Geometry, WeightFormat, Int8Arithmetic, AttentionName | None]] = [
    (LARGE, "int8", "w8a8", "int8"),
    (SMALL, "int4", "weight-only", None),
    (SMALL, "int8", "w8a8", None),
    (SMALL, "bf16", "weight-only", "sdpa"),
    (SMALL, "fp8", "weight-only", None),
]


@pytest.mark.parametrize(("geometry", "format_", "arithmetic", "fused"), LOOPS)
def test_every_rung_of_the_loop_is_planned_within_8_percent_and_never_below(
    geometry: Geometry,
    format_: WeightFormat,
    arithmetic: Int8Arithmetic,
    fused: AttentionName | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From 12 GiB down: weights as they lie in the real ring, activations of one block that runs on meta."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, attn_mask=None: torch.empty_like(q))
    monkeypatch.setattr(quantize, "integer_product", lambda a, b: a.new_empty((len(a), len(b)), dtype=torch.int32))
    transformer, inputs, modulation, context = one_block(geometry, format_, arithmetic)
    choice = KernelChoice(fused or "sdpa", fused=fused is not None)

    @functools.cache
    def counted_activations(chunk: int, together: bool) -> int:
        with live_bytes() as looping:
            contexts = [[context]] * (2 if together else 1)
            transformer(inputs, modulation, contexts, chunk_tokens=chunk, choice=choice)
        return looping.peak

    kernels = LoopKernels(fused is not None, attention=fused or "sdpa")
    machine = Machine("cuda:0", 12 * GIB, 64 * GIB, 2, arithmetic, kernels)
    peaks: list[int] = []
    for plan in rungs(geometry, "denoise", WeightFormats(format_), machine):
        loop = plan.stage("denoise")
        activations = counted_activations(plan.chunk_tokens, loop.together)
        waiting = parked_bytes(REAL, 2, SLOTS) if loop.parked else contexts_bytes(REAL, 2)
        counted = weights_held(format_, loop.resident_blocks) + waiting + activations + LIBRARY_BYTES
        here = f"{plan.chunk_tokens} tokens, {loop.resident_blocks} resident, {loop.together=}, {loop.parked=}"
        assert counted <= loop.peak_bytes <= 1.08 * counted, f"{here}: {loop.peak_bytes / counted:.3f}"
        peaks.append(loop.peak_bytes)
    assert peaks == sorted(set(peaks), reverse=True) and len(peaks) >= 4, peaks


def keeping_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend as torch does on a card to values that do not lie in rows: with all scores of these queries, twice."""
    scores = q @ k.transpose(-2, -1)
    return scores.softmax(dim=-1) @ v


@functools.cache
def whole_layers(half: VaeHalf, geometry: Geometry) -> int:
    """Return the most bytes in the layers that see whole frames, which take their turn before or after the tiles'."""
    latent = geometry.latent_size
    with META:
        vae = Vae(REAL.vae, encodes=half == "encoder", decodes=half == "decoder")
        latents, features = (
            torch.empty(1, channels, frames, latent.height, latent.width)
            for channels, frames in ((REAL.vae.z_dim, 3), (384, 1))
        )
    with live_bytes() as counted:
        if half == "decoder":
            for made in vae._whole_features(latents):
                del made
        else:
            memory = causal_layers.Memory()
            for _ in range(3):
                causal_layers.run_layers(vae.encoder.whole_layers, features, memory)
    return counted.peak


SHAPES: list[tuple[VaeHalf, Geometry]] = [
    ("decoder", Geometry(Size(832, 480), 81)),
    ("encoder", Geometry(Size(832, 480), 81)),
    ("decoder", Geometry(Size(624, 624), 100)),
    ("decoder", LARGE),
]


@pytest.mark.parametrize(("half", "geometry"), SHAPES)
def test_every_rung_of_the_vae_is_planned_within_8_percent_and_never_below(
    half: VaeHalf, geometry: Geometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both shapes that are not landscape, and of 100 frames: what is held does not depend on how many there are."""
    name = {"decoder": "decode", "encoder": "condition"}[half]
    monkeypatch.setattr(F, "scaled_dot_product_attention", keeping_scores)
    sizes = network_sizes(REAL)
    weights = sizes[f"vae_{half}"].weight_bytes(4)
    tilings = []
    for plan in rungs(geometry, name, WeightFormats("bf16"), Machine("cuda:0", 6 * GIB, 64 * GIB, 2)):
        stage = plan.stage(name)
        if half == "decoder":
            activations = max(counted_decoding(geometry, stage.tiling), whole_layers(half, geometry))
        else:
            activations = max(counted_encoding(geometry, stage.tiling, monkeypatch), whole_layers(half, geometry))
        counted = weights + activations + LIBRARY_BYTES
        assert counted <= stage.peak_bytes <= 1.08 * counted, f"{stage.tiling}: {stage.peak_bytes / counted:.3f}"
        assert vae_bytes(half, replace(geometry, num_frames=13), REAL.vae, stage.tiling) <= stage.activation_bytes
        tilings.append(stage.tiling)
    assert len(set(tilings)) == len(tilings) >= 3, tilings
