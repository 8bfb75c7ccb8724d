"""The transformer's configuration and start, and cross-attention that does not compute 512 text tokens.

Prompts are padded to 512 tokens with zeros, so all padded keys and values are equal: one of them with its logit raised
by log(512 - length) gives the same softmax. The processor below uses that; weights and result are diffusers' own.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn

from bench.tiny_model.encoders import IMAGE_DIM, IMAGE_TOKENS, MAX_TOKENS, TEXT_DIM

HEADS = 4
HEAD_DIM = 32
LAYERS = 6
WIDTH = HEADS * HEAD_DIM
CONFIG = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 4 * WIDTH,
    "num_layers": LAYERS,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": IMAGE_DIM,
    "added_kv_proj_dim": WIDTH,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": 2 * IMAGE_TOKENS,
}
BRANCH_SCALE = 0.3
QUERY_GAIN = 1.5
KEY_GAIN = 3.0
"""Initial gains in cross-attention: with less, hundreds of padded keys drown the prompt."""
LEAST_TEXT_SHARE = 0.3
TEXT_BIASES = ("condition_embedder.text_embedder.linear_1.bias", "condition_embedder.text_embedder.linear_2.bias")


def build_transformer() -> WanTransformer3DModel:
    """Return a fresh transformer that starts by predicting zero, with quiet residual branches."""
    model = WanTransformer3DModel(**CONFIG)
    with torch.no_grad():
        model.proj_out.weight.zero_()
        model.proj_out.bias.zero_()
        for block in model.blocks:
            for projection in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
                projection.weight.mul_(BRANCH_SCALE)
            block.attn2.norm_q.weight.fill_(QUERY_GAIN)
            block.attn2.norm_k.weight.fill_(KEY_GAIN)
    keep_padding_neutral(model)
    return model


def keep_padding_neutral(model: WanTransformer3DModel) -> None:
    """Fix the biases on the way to the text keys at zero, so that a padded token's key is zero.

    Learnt, they turn the padding into a sink that takes all attention. Not enough alone: see `ShortCrossAttention`.
    """
    for name, weight in model.named_parameters():
        if name in TEXT_BIASES or name.endswith("attn2.to_k.bias"):
            weight.requires_grad_(False).zero_()


@dataclass
class Texts:
    """Prompts of a batch: [B, L+1, 64] embeddings, the last row padding, and their key bias [B, 1, 1, L+1]."""

    embeds: Tensor
    bias: Tensor


def stack_texts(texts: list[Tensor]) -> Texts:
    """Collect embeddings of different lengths with the one padding key that stands for all."""
    embeds = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    return pad_texts(embeds, torch.tensor([len(text) for text in texts]))


def pad_texts(states_BLD: Tensor, lengths_B: Tensor) -> Texts:
    """Append the one padding key that stands for all to prompts [B, L, D]; states beyond a prompt's length are cut."""
    device, longest = states_BLD.device, states_BLD.shape[1]
    lengths = lengths_B.to(device)[:, None]
    beyond_BL = torch.arange(longest, device=device)[None] >= lengths
    embeds = F.pad(states_BLD.masked_fill(beyond_BL[..., None], 0), (0, 0, 0, 1))
    padding_B1 = (MAX_TOKENS - lengths).float().log()  # -inf where a prompt fills all its tokens
    bias = torch.cat(
        (torch.zeros_like(beyond_BL, dtype=torch.float32).masked_fill(beyond_BL, -math.inf), padding_B1), 1
    )
    return Texts(embeds, bias[:, None, None])


class ShortCrossAttention:
    """Attention processor for keys [34 image | L text | 1 padding token]; `bias` is set for each batch."""

    def __init__(self) -> None:
        self.bias: Tensor | None = None
        self.starved: Tensor | None = None
        """When a number: each block adds by how many nats the text's share of attention is below `LEAST_TEXT_SHARE`."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend to images and text separately and add both, as the model does."""
        images, text = encoder_hidden_states.split(
            (2 * IMAGE_TOKENS, encoder_hidden_states.shape[1] - 2 * IMAGE_TOKENS), 1
        )
        query = _heads(attn, attn.norm_q(attn.to_q(hidden_states)))
        result = F.scaled_dot_product_attention(
            query, _heads(attn, attn.norm_added_k(attn.add_k_proj(images))), _heads(attn, attn.add_v_proj(images))
        )
        logits = query @ _heads(attn, attn.norm_k(attn.to_k(text))).mT / math.sqrt(query.shape[-1])
        if self.bias is not None:
            logits = logits + self.bias.to(query)
        if self.starved is not None:
            share = logits[..., :-1].logsumexp(-1) - logits.logsumexp(-1)
            self.starved = self.starved + F.relu(math.log(LEAST_TEXT_SHARE) - share).mean()
        result = result + logits.softmax(-1) @ _heads(attn, attn.to_v(text))
        return attn.to_out[0](result.transpose(1, 2).flatten(2))


def _heads(attn: WanAttention, x: Tensor) -> Tensor:
    return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)


class FramesRope(nn.Module):
    """Rotary embedding for some of a clip's latent frames, at the positions that they have in the whole clip.

    The first frame, the last one and a few between teach motion at a fraction of the cost of all of them.
    """

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope
        self.frames: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine for the frames in `frames`, or for all if there are none."""
        if self.frames is None:
            return self.rope(hidden_states)
        batch, channels, _, height, width = hidden_states.shape
        total = int(self.frames[-1]) + 1
        whole = hidden_states[:, :, :1].expand(batch, channels, total, height, width)
        cosine, sine = (x.unflatten(1, (total, -1))[:, self.frames].flatten(1, 2) for x in self.rope(whole))
        return cosine, sine


def choose_frames(model: WanTransformer3DModel) -> FramesRope:
    """Install the rotary embedding that can leave frames out, and return it."""
    model.rope = FramesRope(model.rope)
    return model.rope


@torch.no_grad()
def weaken_text(model: WanTransformer3DModel, scale: float) -> None:
    """Let prompts move the tokens by so much of what they did; what every prompt adds stays in the biases."""
    for block in model.blocks:
        block.attn2.to_v.weight.mul_(scale)


class HalfLinear(nn.Linear):
    """A projection computed in bfloat16 between float32 activations.

    CPUs with bfloat16 dot products do these 2.6 times faster; the backward pass of attention they do slower than in
    float32, which is why autocast does not help there.
    """

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the projection in float32."""
        bias = None if self.bias is None else self.bias.bfloat16()
        return F.linear(x.bfloat16(), self.weight.bfloat16(), bias).float()


def halve_projections(model: WanTransformer3DModel) -> None:
    """Let the blocks' projections compute in bfloat16; weights stay in float32."""
    for module in model.blocks.modules():
        if type(module) is nn.Linear:
            module.__class__ = HalfLinear


def shorten_text(model: WanTransformer3DModel) -> ShortCrossAttention:
    """Install the short cross-attention in every block and return the one object that carries the bias."""
    processor = ShortCrossAttention()
    for block in model.blocks:
        block.attn2.set_processor(processor)
    return processor
