"""UMT5, encoder half, from the transformers library: token ids to prompt embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wan_local.errors import CorruptModel
from wan_local.layers import Linear, adopt_linears
from wan_local.settings import TextEncoderConfig

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel


def build_text_encoder(config: TextEncoderConfig) -> UMT5EncoderModel:
    """Return the module on the current default device (`meta` while loading)."""
    from transformers import UMT5Config, UMT5EncoderModel

    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            d_kv=config.d_kv,
            d_ff=config.d_ff,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            dropout_rate=0.0,
        )
    )
    for block in encoder.encoder.block:
        theirs = block.layer[1].DenseReluDense
        block.layer[1].DenseReluDense = GatedFeedForward(config.d_model, config.d_ff, theirs.act)
    adopt_linears(encoder)
    return encoder


class GatedFeedForward(nn.Module):
    """The feed-forward of a block, `wo(gelu(wi_0 x) * wi_1 x)`: transformers' own casts to the dtype of a weight."""

    def __init__(self, dim: int, inner_dim: int, act: nn.Module) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = Linear(dim, inner_dim, bias=False), Linear(dim, inner_dim, bias=False)
        self.wo = Linear(inner_dim, dim, bias=False)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.wo(self.act(self.wi_0(x)) * self.wi_1(x))
        return out


class EmbeddingRows(nn.Module):
    """Stands for an embedding table of gigabytes of which a prompt needs a few rows: `rows` reads just those."""

    def __init__(self, rows: Callable[[list[int]], Tensor]) -> None:
        super().__init__()
        self._rows = rows

    def forward(self, input_ids: Tensor) -> Tensor:
        needed, inverse = input_ids.unique(return_inverse=True)
        return self._rows(needed.tolist())[inverse]


def encode_tokens(text_encoder: UMT5EncoderModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return hidden states [B, L, d_model] in float32, zero where `attention_mask` [B, L] is zero."""
    embeds = text_encoder.get_input_embeddings()(input_ids)
    if not torch.count_nonzero(embeds):  # transformers 5 can leave the tied table untouched, and saves it so
        raise CorruptModel(
            "the text encoder's embedding table is zero for every token of the prompt: it was not saved with the "
            "weights. Download the text encoder again, or convert the original."
        )
    hidden: Tensor = text_encoder(inputs_embeds=embeds, attention_mask=attention_mask).last_hidden_state
    return hidden.float() * attention_mask.unsqueeze(-1)
