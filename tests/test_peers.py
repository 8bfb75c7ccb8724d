"""Our networks against diffusers' classes on random weights: the same names, the same numbers."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn

from tests.parity import relative_error
from wan_local.key_map import to_official, to_ours
from wan_local.models.transformer import ContextEmbedder, Transformer, in_context
from wan_local.models.vae import Vae
from wan_local.settings import TransformerConfig, VaeConfig, load_model_config

CONFIGS = [
    TransformerConfig(2, 2, 24, 80, 32, 40, 56, image_tokens=34),
    TransformerConfig(1, 3, 32, 96, 64, 64, 64, image_tokens=514),
    TransformerConfig(3, 4, 16, 128, 256, 32, 48, image_tokens=20, eps=1e-5),
]


def randomized(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Return the state of `module` after giving every parameter noise around what its initialisation made."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module.state_dict()


def peer_of(config: TransformerConfig) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        eps=config.eps,
        image_dim=config.image_dim,
        added_kv_proj_dim=config.dim,
        pos_embed_seq_len=config.image_tokens,
    ).eval()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"d{config.dim}")
@pytest.mark.parametrize("grid", [(1, 2, 4), (3, 6, 10), (5, 8, 4)], ids=str)
def test_transformer_equals_diffusers(config: TransformerConfig, grid: tuple[int, int, int]) -> None:
    torch.manual_seed(7)
    peer = peer_of(config)
    state = randomized(peer, seed=3)
    embedder, ours = ContextEmbedder(config).eval(), Transformer(config).eval()
    embedder.load_state_dict({name: tensor for name, tensor in state.items() if in_context(name)}, strict=True)
    ours.load_state_dict({name: tensor for name, tensor in state.items() if not in_context(name)}, strict=True)
    latents = torch.randn(2, config.in_channels, *grid)
    text = torch.randn(2, config.text_tokens, config.text_dim)
    text[:, 30:] = 0
    images = torch.randn(2, config.image_tokens, config.image_dim)
    timestep = torch.tensor([999, 37])
    with torch.no_grad():
        [got] = ours(latents, embedder.condition_embedder.time(timestep), [embedder(text, images)], chunk_tokens=10)
        # diffusers takes the two images of one sample as two rows
        two_rows = images.reshape(4, config.image_tokens // 2, config.image_dim)
        expected = peer(latents, timestep, text, two_rows, return_dict=False)[0]
    assert relative_error(got, expected) <= 5e-5


@pytest.mark.parametrize("num_res_blocks", [1, 2])
@pytest.mark.parametrize("frames", [1, 5, 13])
def test_vae_equals_diffusers(num_res_blocks: int, frames: int) -> None:
    torch.manual_seed(5)
    config = VaeConfig(8, 16, (1, 2, 4, 4), num_res_blocks, (False, True, True), (0.1,) * 16, (1.7,) * 16)
    peer = AutoencoderKLWan(
        base_dim=8, z_dim=16, num_res_blocks=num_res_blocks, latents_mean=[0.1] * 16, latents_std=[1.7] * 16
    ).eval()
    ours = Vae(config).eval()
    ours.load_state_dict(randomized(peer, seed=1), strict=True)
    video = torch.rand(1, 3, frames, 32, 48) * 2 - 1
    chunks = [video[:, :, :1], *(video[:, :, 1:].split(4, dim=2) if frames > 1 else ())]
    with torch.no_grad():
        latents = ours.encode(chunks)
        expected = (peer.encode(video).latent_dist.mode() - 0.1) / 1.7
        assert relative_error(latents, expected) <= 2e-5
        decoded = torch.cat(list(ours.decode(latents)), dim=2).clamp(-1, 1)
        assert relative_error(decoded, peer.decode(latents * 1.7 + 0.1).sample) <= 2e-5


def test_every_name_of_the_14b_networks_has_an_official_one_and_back() -> None:
    """Built on meta from the 14B configuration: no weights, the real names."""
    config = load_model_config("flf2v_14b")
    with torch.device("meta"):
        transformer = Transformer(config.transformer).state_dict() | ContextEmbedder(config.transformer).state_dict()
        vae = Vae(config.vae).state_dict()
    for part, names in (("transformer", set(transformer)), ("vae", set(vae))):
        official = to_official(part, names)
        assert len(set(official.values())) == len(names)
        assert to_ours(part, official.values()) == {theirs: ours for ours, theirs in official.items()}


def test_14b_configuration_has_the_published_parameter_count() -> None:
    config = load_model_config("flf2v_14b")
    with torch.device("meta"):
        loop, once = Transformer(config.transformer), ContextEmbedder(config.transformer)
        vae = Vae(config.vae)
    in_loop, in_context_only = (sum(p.numel() for p in half.blocks.parameters()) for half in (loop, once))
    assert in_loop + in_context_only == pytest.approx(16.15e9, rel=2e-3)
    assert in_loop == pytest.approx(11.95e9, rel=2e-3)
    assert len(vae.state_dict()) == 194


def test_14b_names_and_shapes_are_those_of_diffusers() -> None:
    config = load_model_config("flf2v_14b")
    with torch.device("meta"):
        loop, once, peer = (
            Transformer(config.transformer),
            ContextEmbedder(config.transformer),
            peer_of(config.transformer),
        )
        vae, peer_vae = Vae(config.vae), AutoencoderKLWan()
    assert not loop.state_dict().keys() & once.state_dict().keys()
    for mine, theirs in (({**loop.state_dict(), **once.state_dict()}, peer), (vae.state_dict(), peer_vae)):
        assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert tuple(peer_vae.config.latents_mean) == config.vae.latents_mean
    assert tuple(peer_vae.config.latents_std) == config.vae.latents_std
