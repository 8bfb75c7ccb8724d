"""diffusers' own transformer, the peer that ours is timed beside and held to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wan_local.settings import TransformerConfig


def peer_on_meta(config: TransformerConfig) -> Any:
    """Return diffusers' `WanTransformer3DModel` of a configuration, without weights."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        return WanTransformer3DModel(
            num_attention_heads=config.num_attention_heads, attention_head_dim=config.attention_head_dim,
            in_channels=config.in_channels, out_channels=config.out_channels, text_dim=config.text_dim,
            freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.num_layers, image_dim=config.image_dim,
            added_kv_proj_dim=config.dim, pos_embed_seq_len=config.image_tokens,
        )  # fmt: skip


def with_weights(
    peer: Any, state: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device, config: TransformerConfig
) -> Any:
    """Give a peer on meta its weights in `dtype`, but for those that diffusers keeps in float32."""
    kept = peer._keep_in_fp32_modules
    cast = {
        name: tensor.to(device, torch.float32 if any(part in name for part in kept) else dtype)
        for name, tensor in state.items()
    }
    peer.load_state_dict(cast, assign=True)
    peer.rope.to_empty(device=device)
    peer.rope.__init__(config.attention_head_dim, config.patch_size, 1024)  # its tables are no parameters
    peer.rope.to(device)
    return peer.eval().requires_grad_(False)
