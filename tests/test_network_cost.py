from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.live_bytes import live_bytes
from wan_local.geometry import Geometry, Size
from wan_local.models.image_encoder import build_image_encoder, encode_pixels
from wan_local.models.text_encoder import build_text_encoder
from wan_local.models.transformer import ContextEmbedder, ContextKV, Modulation, Transformer, stays_float32
from wan_local.network_cost import (
    context_stage_bytes,
    contexts_bytes,
    image_bytes,
    loop_bytes,
    parked_bytes,
    text_bytes,
)
from wan_local.planner import GIB, LIBRARY_BYTES, SLOTS, Machine, chunk_tokens, plan_within
from wan_local.quantize import stays_as_stored
from wan_local.quantized_layers import hold_in_format
from wan_local.settings import TransformerConfig, load_model_config
from wan_local.stage import network_sizes
from wan_local.weight_format import WeightFormat, WeightFormats

REAL = load_model_config("flf2v_14b")
LARGE, SMALL = Geometry(Size(720, 1280), 81), Geometry(Size(480, 832), 81)
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def assert_predicted(predicted: int, counted: int) -> None:
    assert counted <= predicted <= 1.08 * counted, f"{predicted / GIB:.3f} GiB predicted, {counted / GIB:.3f} counted"


def cast(module: torch.nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in module.named_parameters():
        if not stays_float32(name):
            parameter.data = parameter.data.to(dtype)


def bytes_of(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def contexts_of(config: TransformerConfig, dtype: torch.dtype) -> list[ContextKV]:
    rows = (config.text_tokens, config.text_tokens, config.image_tokens, config.image_tokens)
    k, v, k_image, v_image = (torch.empty(1, count, 40, 128, dtype=dtype, device="meta") for count in rows)
    return [ContextKV(k, v, k_image, v_image, text_bias=None)] * config.num_layers


@pytest.mark.parametrize("together", [False, True], ids=["one branch", "both branches"])
@pytest.mark.parametrize("chunk_bytes", [GIB, GIB // 8], ids=["large chunks", "small chunks"])
@pytest.mark.parametrize(("geometry", "dtype"), [(SMALL, FLOAT32), (LARGE, BFLOAT16)], ids=["480p", "720p"])
def test_loop_peak_at_14b_size_is_predicted_within_8_percent_and_never_below(
    geometry: Geometry, dtype: torch.dtype, chunk_bytes: int, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks of the 40, of small chunks one; attention counted as a fused kernel's, which keeps no scores."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, attn_mask=None: torch.empty_like(q))
    config, latent = replace(REAL.transformer, num_layers=2 if chunk_bytes == GIB else 1), geometry.latent_size
    with torch.device("meta"):
        transformer = Transformer(config)
        inputs = torch.empty(1, config.in_channels, geometry.latent_frames, latent.height, latent.width)
        modulation = Modulation(torch.empty(1, config.dim), torch.empty(1, 6, config.dim))
    cast(transformer, dtype)
    chunk = chunk_tokens(config, geometry.tokens, dtype.itemsize, chunk_bytes)
    contexts = [contexts_of(config, dtype)] * (2 if together else 1)
    with live_bytes() as looping:
        transformer(inputs, modulation, contexts, chunk_tokens=chunk)
    assert_predicted(loop_bytes(geometry, REAL, chunk, dtype.itemsize, together=together), looping.peak)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("parked", [False, True])
def test_peak_of_embedding_the_context_is_predicted_within_8_percent_and_never_below(
    dtype: torch.dtype, parked: bool
) -> None:
    """Parked, each block's keys and values leave the device before the next block's are made: as with one block."""
    config = replace(REAL.transformer, num_layers=1) if parked else REAL.transformer
    with torch.device("meta"):
        embedder = ContextEmbedder(config)
        prompts = [torch.empty(1, config.text_tokens, config.text_dim) for _ in range(2)]
        images = torch.empty(1, config.image_tokens, config.image_dim)
    cast(embedder, dtype)
    with live_bytes() as embedding, pytest.MonkeyPatch().context() as patch:
        patch.setattr("wan_local.models.transformer.fold_padding", lambda embeds: (embeds, None))
        made = embedder.contexts(prompts, images)
    ring = SLOTS * bytes_of(embedder.blocks[0])
    assert_predicted(ring + context_stage_bytes(REAL, dtype.itemsize, parked=parked), ring + embedding.peak)
    held = {id(x): x.nbytes for branch in made for kv in branch for x in (kv.k, kv.v, kv.k_image, kv.v_image)}
    assert sum(held.values()) == contexts_bytes(replace(REAL, transformer=config), dtype.itemsize)


def test_parked_keys_and_values_hold_their_slots_alone() -> None:
    """Both branches', two blocks' each: a block's are what FlatBlock lays out, without a gap at these sizes."""
    one = contexts_of(REAL.transformer, BFLOAT16)[0]
    of_block = sum(x.nbytes for x in (one.k, one.v, one.k_image, one.v_image))
    assert parked_bytes(REAL, 2, SLOTS) == 2 * SLOTS * of_block < contexts_bytes(REAL, 2) / 10


@pytest.mark.parametrize("format_", ["bf16", "int8", "int4", "fp8"])
def test_text_encoders_peak_is_predicted_within_8_percent_and_never_below(format_: WeightFormat) -> None:
    """Of a prompt of full length, two layers of the 24, on a card where all the others stream."""
    config, tokens = replace(REAL.text_encoder, num_layers=2), REAL.transformer.text_tokens
    formats = WeightFormats.converted(format_)
    with torch.device("meta"):
        encoder = build_text_encoder(config).eval()
        embeds = torch.empty(1, tokens, config.d_model, dtype=BFLOAT16)
    hold_in_format(encoder, "text_encoder", formats)
    for name, parameter in encoder.named_parameters():
        if not stays_as_stored(name, parameter.dtype):
            parameter.data = parameter.data.to(BFLOAT16)
    machine = Machine("cuda:0", 0, 64 * GIB, 2, "w8a8")
    text = plan_within(LARGE, REAL, network_sizes(REAL, formats), machine).stage("text")
    assert text.resident_blocks == 0
    with live_bytes() as encoding:
        encoder(inputs_embeds=embeds).last_hidden_state.float()
    assert_predicted(text.peak_bytes, text.weight_bytes + encoding.peak + LIBRARY_BYTES)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_text_encoders_activations_are_predicted_within_8_percent_and_never_below(dtype: torch.dtype) -> None:
    """Beside the two layers that are there when they stream."""
    config, tokens = replace(REAL.text_encoder, num_layers=2), REAL.transformer.text_tokens
    with torch.device("meta"):
        encoder = build_text_encoder(config).eval().to(dtype)
        embeds = torch.empty(1, tokens, config.d_model, dtype=dtype)
    ring = SLOTS * bytes_of(encoder.encoder.block[1])
    with live_bytes() as encoding:
        encoder(inputs_embeds=embeds).last_hidden_state.float()
    assert_predicted(ring + text_bytes(REAL, dtype.itemsize), ring + encoding.peak)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_image_encoders_peak_is_predicted_within_8_percent_and_never_below(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = REAL.image_encoder
    with torch.device("meta"):
        encoder = build_image_encoder(config).eval().to(dtype)
        for module in encoder.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, buffer.to("meta"), persistent=False)
        pixels = torch.empty(2, 3, config.image_size, config.image_size, dtype=dtype)
    with live_bytes() as encoding:
        encode_pixels(encoder, pixels)
    weights = bytes_of(encoder)
    assert_predicted(weights + image_bytes(REAL, dtype.itemsize), weights + encoding.peak)
