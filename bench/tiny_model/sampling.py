"""Sampling with the tiny model as the package does it: UniPC on the official sigma grid, guidance in one batch."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from bench.tiny_model.cache import Shard
from bench.tiny_model.encoders import Encoders
from bench.tiny_model.export import build_scheduler
from bench.tiny_model.pools import encode, make_pool
from bench.tiny_model.sentences import DEFAULT_NEGATIVE_PROMPT
from bench.tiny_model.transformer import shorten_text


@dataclass(frozen=True)
class Sampler:
    """How to sample; the unconditional branch is the endpoint's default negative prompt."""

    guide_scale: float = 5.0
    shift: float = 5.0
    num_inference_steps: int = 20
    seed: int = 0
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT


@torch.no_grad()
def sample(
    model: WanTransformer3DModel, encoders: Encoders, shard: Shard, sampler: Sampler, prompts: list[str] | None = None
) -> Tensor:
    """Return normalised latents [N, 16, T, H, W] for all clips of a shard, by their captions or by other prompts."""
    device = next(model.parameters()).device
    guided = sampler.guide_scale != 1
    texts = prompts or shard.captions
    negatives = [sampler.negative_prompt] * len(texts) if guided else []
    prompts_and_negatives = encode(encoders, texts + negatives).to(str(device))
    stacked = prompts_and_negatives.texts(torch.arange(len(texts + negatives)))
    batch = make_pool(shard, encoders, str(device)).batch(torch.arange(len(shard)), stacked)
    shorten_text(model).bias = stacked.bias
    copies = 2 if guided else 1
    images = batch.images_BND.flatten(0, 1).repeat(copies, 1, 1)
    scheduler = build_scheduler(sampler.shift)
    scheduler.set_timesteps(sigmas=np.linspace(0.999, 0, sampler.num_inference_steps + 1)[:-1])
    latents = torch.randn(batch.x_BCTHW.shape, generator=torch.Generator().manual_seed(sampler.seed)).to(device)
    for timestep in scheduler.timesteps:
        inputs = torch.cat((latents, batch.condition_BCTHW), 1).repeat(copies, 1, 1, 1, 1)
        velocity = model(
            hidden_states=inputs,
            timestep=timestep.float().to(device).expand(len(inputs)),
            encoder_hidden_states=stacked.embeds,
            encoder_hidden_states_image=images,
            return_dict=False,
        )[0]
        if guided:
            conditional, unconditional = velocity.chunk(2)
            velocity = unconditional + sampler.guide_scale * (conditional - unconditional)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents.cpu()
