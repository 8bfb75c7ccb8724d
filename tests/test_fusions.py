"""The fused block against the plain one, on the embedded model: same weights, same numbers but for rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wan_local.attention import KernelChoice
from wan_local.checkpoint import find_model
from wan_local.layers import Linear, Rotary
from wan_local.models.fused_block import advance
from wan_local.models.transformer import (
    ContextEmbedder,
    ContextKV,
    Modulation,
    Transformer,
    TransformerBlock,
    stays_float32,
)
from wan_local.quantize import quantize_weight
from wan_local.settings import load_model_config, load_settings
from wan_local.stage import load_network

CPU = torch.device("cpu")
FUSED = KernelChoice(fused=True)


@dataclass
class Model:
    """The tiny transformer with one prompt's context, and its block linears as they were loaded."""

    network: Transformer
    latents: Tensor
    modulation: Modulation
    context: list[ContextKV]
    weights: dict[str, Tensor]

    def velocity(self, choice: KernelChoice, chunk_tokens: int | None = None) -> Tensor:
        [velocity] = self.network(
            self.latents, self.modulation, [self.context], chunk_tokens=chunk_tokens, choice=choice
        )
        return velocity

    def quantize(self, weight_format: str, *, rotated: bool = False, skip: str = "nothing") -> None:
        for name, linear in block_linears(self.network).items():
            weight = quantize_weight(self.weights[name], weight_format, rotated=rotated)  # type: ignore[arg-type]
            tensors = {"weight": weight.data, "weight_scale": weight.scale, "weight_shift": weight.shift}
            if skip not in name:
                given = {key: tensor for key, tensor in tensors.items() if tensor is not None}
                linear.hold(given, rotated=rotated, arithmetic="w8a8")


def block_linears(network: Transformer) -> dict[str, Linear]:
    return {name: part for name, part in network.named_modules() if isinstance(part, Linear) and "blocks" in name}


@pytest.fixture
def model() -> Model:
    files = find_model(load_settings(model="tiny"))
    config = files.config.transformer
    embedder = load_network("context_embedder", files, CPU, torch.float32)
    network = load_network("transformer", files, CPU, torch.float32)
    assert isinstance(embedder, ContextEmbedder) and isinstance(network, Transformer)
    generator = torch.Generator().manual_seed(0)
    text = torch.zeros(1, config.text_tokens, config.text_dim)
    text[:, :20] = torch.randn(1, 20, config.text_dim, generator=generator)
    images = torch.randn(1, config.image_tokens, config.image_dim, generator=generator)
    latents = torch.randn(1, config.in_channels, 9, 10, 14, generator=generator)
    weights = {name: linear.weight.data.clone() for name, linear in block_linears(network).items()}
    return Model(network, latents, embedder.modulations(torch.tensor([700]))[700], embedder(text, images), weights)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@torch.no_grad()
def test_the_fused_block_of_plain_weights_is_the_plain_one(model: Model) -> None:
    assert error(model.velocity(FUSED), model.velocity(KernelChoice())) < 1e-5


@pytest.mark.parametrize(("attention", "limit"), [("int8", 0.03), ("int8_pv", 0.03)])
@torch.no_grad()
def test_int8_attention_is_close_whether_the_block_is_fused_or_not(model: Model, attention: str, limit: float) -> None:
    exact = model.velocity(KernelChoice())
    for fused in (False, True):
        assert error(model.velocity(KernelChoice(attention, fused)), exact) < limit  # type: ignore[arg-type]


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@torch.no_grad()
def test_the_fused_block_of_quantized_weights_is_near_the_plain_one(
    model: Model, weight_format: str, rotated: bool
) -> None:
    model.quantize(weight_format, rotated=rotated)
    assert error(model.velocity(FUSED), model.velocity(KernelChoice())) < 0.03


@torch.no_grad()
def test_a_block_that_is_quantized_in_part_runs_fused(model: Model) -> None:
    model.quantize("int8", skip="net.2")  # rows that are int8 on one side of a linear and floats on the other
    assert error(model.velocity(FUSED), model.velocity(KernelChoice())) < 0.03
    model.quantize("int8", skip="to_k")
    assert error(model.velocity(FUSED), model.velocity(KernelChoice())) < 0.03


@torch.no_grad()
def test_a_side_branch_counts_in_the_fused_block(model: Model) -> None:
    model.quantize("int8")
    without = model.velocity(FUSED)
    generator = torch.Generator().manual_seed(3)
    for linear in block_linears(model.network).values():
        for name, shape in linear.branch(4).items():
            linear.register_parameter(name, torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.05))
    plain = model.velocity(KernelChoice())
    assert error(model.velocity(FUSED), plain) < error(without, plain) / 3


@pytest.mark.parametrize("choice", [FUSED, KernelChoice("int8", True), KernelChoice("int8_pv", True)])
@torch.no_grad()
def test_chunks_change_no_bit(model: Model, choice: KernelChoice) -> None:
    model.quantize("int8")
    whole = model.velocity(choice)
    for chunk_tokens in (64, 130):
        assert torch.equal(model.velocity(choice, chunk_tokens), whole)


@torch.no_grad()
def test_a_redone_step_uses_quantized_weights_as_floats_once(model: Model) -> None:
    exact = model.velocity(KernelChoice())
    model.quantize("int8")
    rounded = model.velocity(KernelChoice())
    redone = model.velocity(KernelChoice(dequantize=True))
    assert error(redone, exact) < error(rounded, exact)
    assert torch.equal(model.velocity(KernelChoice()), rounded)


@torch.no_grad()
def test_half_sums_are_near_and_last_for_the_call(model: Model) -> None:
    exact = model.velocity(KernelChoice())
    halved = model.velocity(KernelChoice(half_sums=True))
    assert 0 < error(halved, exact) < 0.02
    assert torch.equal(model.velocity(KernelChoice()), exact)
    assert not torch.backends.cuda.matmul.allow_fp16_accumulation
    linear = next(iter(block_linears(model.network).values()))
    linear.weight.data[0, 0] = 1e6  # beyond float16
    assert not torch.isfinite(model.velocity(KernelChoice(half_sums=True))).all()


@torch.no_grad()
def test_the_fused_block_compiles_into_one_graph(model: Model) -> None:
    model.quantize("int8")
    block = model.network.blocks[0] if isinstance(model.network.blocks, torch.nn.ModuleList) else None
    block = block or next(iter(model.network.blocks))
    from wan_local.layers import rotary_embedding

    rotary = rotary_embedding((2, 5, 7), 32, CPU)
    hidden = torch.randn(1, 70, model.network.config.dim)
    operands = (model.modulation.projection, model.context[0], rotary)
    eager, graph = hidden.clone(), hidden.clone()
    choice = KernelChoice("int8", True)
    advance(block, eager, *operands, chunk_tokens=70, choice=choice)
    torch._dynamo.reset()
    compiled = torch.compile(advance, fullgraph=True, backend="aot_eager")
    compiled(block, graph, *operands, chunk_tokens=70, choice=choice)
    assert error(graph, eager) < 0.01


class Float32Made(TorchDispatchMode):
    """Keeps the shapes of float32 storages, as large as 64 rows of 5,120 or larger, that are made inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            large = isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes() >= 64 * 5120 * 4
            if large and leaf.dtype == torch.float32 and storage_of(leaf) not in given:
                self.shapes.add(tuple(leaf.shape))
        return result


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def block_of_14b(weight_format: str) -> TransformerBlock:
    """Return a block of the 14B model on meta, in bfloat16 where it may be, its linears quantized."""
    with torch.device("meta"):
        block = TransformerBlock(load_model_config("flf2v_14b").transformer)
        for name, parameter in block.named_parameters():
            if not stays_float32(name):
                parameter.data = parameter.data.bfloat16()
        for linear in (part for part in block.modules() if isinstance(part, Linear)):
            rows, columns = linear.shape
            held = {"weight": torch.empty(rows, columns, dtype=torch.int8), "weight_scale": torch.empty(rows)}
            if weight_format == "int4":
                group = torch.empty(rows, columns // 64, dtype=torch.bfloat16)
                packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
                held = {"weight": packed, "weight_scale": group, "weight_shift": group}
            linear.hold(held, rotated=True, arithmetic="w8a8")
    return block


@pytest.mark.parametrize(
    ("attention", "weight_format"), [("int8", "int8"), ("int8_pv", "int8"), ("sdpa", "int8"), ("int8_pv", "int4")]
)
@torch.no_grad()
def test_the_int8_block_makes_no_float32_of_tokens_by_channels_at_720p(
    attention: str, weight_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales of 8,128 queries of 40 heads are the most there is. The plain block shows that more would be seen."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, attn_mask=None: torch.empty_like(q))
    block, chunk, tokens = block_of_14b(weight_format), 8128, 75_600
    with torch.device("meta"):
        hidden, projection = torch.empty(1, tokens, 5120, dtype=torch.bfloat16), torch.empty(1, 6, 5120)
        rotary = Rotary(torch.empty(tokens, 64), torch.empty(tokens, 64))
        text, images = (torch.empty(1, rows, 40, 128, dtype=torch.bfloat16) for rows in (512, 514))
        operands = (hidden, projection, ContextKV(text, text, images, images, text_bias=None), rotary)
    choice = KernelChoice(attention, True)  # type: ignore[arg-type]
    with Float32Made() as fused:
        advance(block, *operands, chunk_tokens=chunk, choice=choice)
    with Float32Made() as plain:
        block(*operands, chunk)
    assert fused.shapes == set()
    assert (1, chunk, 5120) in plain.shapes
