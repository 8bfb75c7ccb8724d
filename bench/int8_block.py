"""int8 linears on a CPU: a transformer's blocks in W8A8 beside diffusers' in float32 and bfloat16, in one run.

python -m bench.int8_block [--tokens 2048] [--layers 8] [--runs 3] [--threads 1]

dim 1536, 12 heads of 128, ffn 8960, random weights. W8A8 pays where the CPU multiplies bytes (AVX512-VNNI): there the
products go through torch._int_mm. Without it the same integers are float32 products, exact and no faster than float32;
the row says which it was. On a CPU with AMX, ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI shows one without.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.world import Measured, append_row, describe
from wan_local.attention import KernelChoice
from wan_local.layers import Linear, rotary_embedding
from wan_local.models.fused_block import advance
from wan_local.models.transformer import ContextKV, Transformer, stays_float32
from wan_local.quantize import multiplies_bytes, quantize_weight
from wan_local.settings import TransformerConfig, load_model_config

DIM, HEADS, FFN_DIM = 1536, 12, 8960
LEAST_COSINE = 0.999
CPU = torch.device("cpu")


def mid_size(layers: int) -> TransformerConfig:
    return dataclasses.replace(
        load_model_config("flf2v_14b").transformer,
        num_layers=layers,
        num_attention_heads=HEADS,
        attention_head_dim=DIM // HEADS,
        ffn_dim=FFN_DIM,
    )


def random_blocks(config: TransformerConfig) -> Transformer:
    """Return a transformer with random weights of a sane size."""
    network = Transformer(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        fan_in = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 1
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = "norm" in name and name.endswith("weight")
        parameter.copy_(noise * 0.05 + 1 if is_scale else noise * 0.5 / fan_in**0.5)
    return network


def quantize_blocks(network: Transformer) -> None:
    for name, linear in network.named_modules():
        if isinstance(linear, Linear) and name.startswith("blocks."):
            weight = quantize_weight(linear.weight.data, "int8", rotated=True)
            held = {"weight": weight.data, "weight_scale": weight.scale}
            linear.hold(held, rotated=True, arithmetic="w8a8")


def compute_in_bfloat16(network: Transformer) -> None:
    """Let linears give bfloat16, and so attention take it; norms, scales and the residual stay float32."""
    for linear in network.modules():
        if isinstance(linear, Linear) and linear.bias is not None:
            linear.bias.data = linear.bias.data.bfloat16()


def _cast(context: ContextKV, dtype: torch.dtype) -> ContextKV:
    return ContextKV(*(x.to(dtype) for x in (context.k, context.v, context.k_image, context.v_image)), None)


def peer_blocks(network: Transformer, config: TransformerConfig, dtype: torch.dtype) -> list[Any]:
    """Return diffusers' blocks with the same weights, those that it keeps in float32 so."""
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    blocks = []
    for block in network.blocks:  # type: ignore[union-attr]
        peer = WanTransformerBlock(
            config.dim, config.ffn_dim, config.num_attention_heads, cross_attn_norm=True, eps=config.eps,
            added_kv_proj_dim=config.dim,
        )  # fmt: skip
        state = {**peer.state_dict(), **block.state_dict()}  # what only the peer has, keys and values of the context
        peer.load_state_dict(
            {name: t if stays_float32(name) else t.to(dtype) for name, t in state.items()}, assign=True
        )
        blocks.append(peer.eval().requires_grad_(False))
    return blocks


def context_of(peer: Any, context: Tensor, images: int) -> ContextKV:
    """Return what our block's cross-attention sees, from the peer's weights: `context` is images first, then text."""
    attention, text, pictures = peer.attn2, context[:, images:], context[:, :images]

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(2, (HEADS, -1))

    return ContextKV(
        heads(attention.norm_k(attention.to_k(text))), heads(attention.to_v(text)),
        heads(attention.norm_added_k(attention.add_k_proj(pictures))), heads(attention.add_v_proj(pictures)), None,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(options.threads)
    config, grid = mid_size(options.layers), (options.tokens // 256, 16, 16)
    torch.manual_seed(0)
    hidden = torch.randn(1, grid[0] * 256, DIM)
    works = _works(config, grid, hidden)
    results = {name: work().float() for name, work in works.items()}  # this also warms up
    changes = {name: (x - hidden).double().flatten() for name, x in results.items()}  # what the blocks did
    truth = changes["diffusers float32"]
    cosines = {name: float(torch.nn.functional.cosine_similarity(x, truth, dim=0)) for name, x in changes.items()}
    for name, cosine in cosines.items():
        assert not name.startswith("wan_local") or cosine > LEAST_COSINE, f"{name}: cosine {cosine:.5f} to float32"
    times = _in_turn(works, options.runs)
    row = {"dim": DIM, "layers": options.layers, "tokens": hidden.shape[1], "threads": options.threads,
           "products": "int8 (VNNI)" if multiplies_bytes() else "float32 products of integers (no VNNI)",
           "isa_limit": os.environ.get("ONEDNN_MAX_CPU_ISA")}  # fmt: skip
    for name, measured in times.items():
        row |= {"who": name, "cosine_of_change": round(cosines[name], 6)}
        append_row("int8_block", {**row, **measured, "world": describe(CPU)})


def _works(config: TransformerConfig, grid: tuple[int, int, int], hidden: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return what is timed: diffusers' blocks in two dtypes, ours in float32 and twice in int8, of the same weights."""
    network, images = random_blocks(config), config.image_tokens
    projection, context = torch.randn(1, 6, DIM) * 0.5, torch.randn(1, images + config.text_tokens, DIM)
    rotary = rotary_embedding(grid, DIM // HEADS, CPU)
    turn = tuple(x.repeat_interleave(2, dim=1).view(1, -1, 1, DIM // HEADS) for x in (rotary.cos, rotary.sin))
    peers = {dtype: peer_blocks(network, config, dtype) for dtype in (torch.float32, torch.bfloat16)}
    contexts = [context_of(peer, context, images) for peer in peers[torch.float32]]

    def of_peers(dtype: torch.dtype) -> Tensor:
        x = hidden.to(dtype)
        for peer in peers[dtype]:
            x = peer(x, context.to(dtype), projection, turn)
        return x

    def of_ours(network: Transformer, choice: KernelChoice) -> Tensor:
        x = hidden.clone()
        for block, seen in zip(network.blocks, contexts, strict=True):  # type: ignore[call-overload]
            if choice.fused:
                compute = block.attn1.to_q.compute_dtype
                advance(block, x, projection, _cast(seen, compute), rotary, chunk_tokens=x.shape[1], choice=choice)
            else:
                block(x, projection, seen, rotary, x.shape[1])
        return x

    in_int8, narrow = copy.deepcopy(network), copy.deepcopy(network)
    for each in (in_int8, narrow):
        quantize_blocks(each)
    compute_in_bfloat16(narrow)
    fused = KernelChoice(fused=True)
    return {
        "diffusers float32": lambda: of_peers(torch.float32),
        "diffusers bfloat16": lambda: of_peers(torch.bfloat16),
        "wan_local float32": lambda: of_ours(network, KernelChoice()),
        "wan_local W8A8": lambda: of_ours(in_int8, fused),
        "wan_local W8A8, bfloat16 between": lambda: of_ours(narrow, fused),
    }


def _in_turn(works: dict[str, Callable[[], Tensor]], runs: int) -> dict[str, dict[str, Any]]:
    """Time works one after the other, `runs` times in turn, by the wall's clock and by this process's own.

    The latter does not count the time that other programs took: on a machine that others use it is the one to compare.
    """
    wall: dict[str, list[float]] = {name: [] for name in works}
    own: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(runs):
        for name, work in works.items():
            started, began = time.perf_counter(), time.process_time()
            work()
            own[name].append(time.process_time() - began)
            wall[name].append(time.perf_counter() - started)
    return {name: {**Measured(wall[name], None).row(), "median_cpu_seconds": round(statistics.median(own[name]), 4)}
            for name in works}  # fmt: skip


if __name__ == "__main__":
    main()
