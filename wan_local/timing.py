"""How long each stage will take on a card whose rates are known: operations over rates, or copies where these are more.

Modelled, not measured; loading from disk and starting up are not in it. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from wan_local.geometry import Geometry
from wan_local.planner import NetworkSize, Plan, StagePlan
from wan_local.settings import CardRates, ModelConfig, TransformerConfig
from wan_local.vae_cost import vae_flops

_NOT_REPEATED = 0.4  # of encoding a whole clip: what FLF2V's condition really computes


def timed(
    plan: Plan,
    config: ModelConfig,
    sizes: Mapping[str, NetworkSize],
    rates: CardRates | None,
    *,
    steps: int,
    branches: int,
) -> Plan:
    """Return the plan with seconds by stage; unchanged where the card's rates are not known.

    steps: of the sampling, none left out. branches: 2 with guidance, else 1.
    """
    if rates is None:
        return plan

    def encoding(network: str, tokens: int) -> float:
        size = sizes[network]
        numbers = size.total - size.table + (size.packed or 0)
        return 2.0 * numbers * tokens / rates.matmul_flops + (size.weight_bytes(2) - 2 * size.table) / rates.copy_bytes

    tokens = config.transformer.text_tokens
    seconds = {
        "text": encoding("text_encoder", branches * tokens),
        "image": encoding("image_encoder", 2 * config.image_encoder.tokens),
        "condition": _NOT_REPEATED * _vae_seconds(plan, "condition", config, rates),
        "context": encoding("context_embedder", branches * tokens + config.transformer.image_tokens),
        "denoise": steps * _step_seconds(plan.stage("denoise"), plan.geometry, config.transformer, rates, branches),
        "decode": _vae_seconds(plan, "decode", config, rates),
    }
    stages = tuple(replace(stage, seconds=seconds.get(stage.name, stage.seconds)) for stage in plan.stages)
    return replace(plan, stages=stages)


def _vae_seconds(plan: Plan, name: str, config: ModelConfig, rates: CardRates) -> float:
    half = "encoder" if name == "condition" else "decoder"
    return vae_flops(half, plan.geometry, config.vae, plan.stage(name).tiling) / rates.convolution_flops


def _step_seconds(
    stage: StagePlan, geometry: Geometry, transformer: TransformerConfig, rates: CardRates, branches: int
) -> float:
    """Seconds of one step: computing, or copying what streams where that takes longer."""
    products, attention = loop_flops(geometry, transformer)
    computing = branches * (products / rates.matmul_flops + attention / rates.attention_flops)
    passes = 1 if stage.together else branches
    return max(computing, passes * stage.streamed_bytes / rates.copy_bytes)


def loop_flops(geometry: Geometry, transformer: TransformerConfig) -> tuple[float, float]:
    """Return the floating-point operations of one call of the transformer: in linears, and in attention."""
    tokens, dim = geometry.tokens, transformer.dim
    context = transformer.text_tokens + transformer.image_tokens
    linear = 2.0 * tokens * dim * (6 * dim + 2 * transformer.ffn_dim)  # q, k, v, out; q and out over the context
    attention = 4.0 * tokens * dim * (tokens + context)
    return transformer.num_layers * linear, transformer.num_layers * attention
