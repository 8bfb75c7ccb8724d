"""The denoiser: Wan2.1's FLF2V diffusion transformer.

Takes latents with their condition, a timestep, text and images; gives velocity. Module and tensor names are those of
diffusers' `WanTransformer3DModel`, so its checkpoints load without a table. Source of the architecture:
https://github.com/Wan-Video/Wan2.1 (wan/modules/model.py, Apache-2.0).

Shape legend: B batch, C channels, T H W latent frames and cells, L latent tokens, M context tokens, D channels of a
token, N heads, K channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wan_local.anatomy import in_context as in_context  # noqa: PLC0414 (whoever loads this network asks it)
from wan_local.attention import PLAIN_KERNELS, KernelChoice, sdpa
from wan_local.layers import (
    LayerNorm,
    Linear,
    RMSNorm,
    Rotary,
    RotaryTable,
    apply_rotary,
    dequantizing,
    half_sums,
    split_heads,
)
from wan_local.models.fused_block import advance
from wan_local.settings import TransformerConfig

_IMAGE_NORM_EPS = 1e-5
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
_FLOAT32_PARTS = ("time_embedder", "time_proj", "scale_shift_table", "norm", "proj_out")


def stays_float32(name: str) -> bool:
    """Tell whether parameter `name` is float32 whatever the compute dtype: bf16 here loses the last steps' sigmas."""
    return any(part in name for part in _FLOAT32_PARTS)


@dataclass(frozen=True, slots=True)
class ContextKV:
    """Keys and values of one block's cross-attention, [B, M, N, K] each. They do not change during a run.

    `text_bias` [M] is added to the logits of the text: ln(count) where one key stands for `count` equal ones.
    """

    k: Tensor
    v: Tensor
    k_image: Tensor
    v_image: Tensor
    text_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Modulation:
    """One timestep's embedding [B, D] and its projection [B, 6, D], both float32."""

    embedding: Tensor
    projection: Tensor


class _Gelu(nn.Module):
    """Linear and GELU in one, as diffusers nests them (`net.0.proj`)."""

    def __init__(self, dim_in: int, dim_out: int, *, approximate: str) -> None:
        super().__init__()
        self.proj = Linear(dim_in, dim_out)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate=self.approximate)


class FeedForward(nn.Module):
    def __init__(self, dim: int, inner_dim: int, dim_out: int, *, approximate: str) -> None:
        super().__init__()
        # the middle entry keeps the place of diffusers' dropout, so that the second linear is called net.2
        self.net = nn.ModuleList(
            [_Gelu(dim, inner_dim, approximate=approximate), nn.Identity(), Linear(inner_dim, dim_out)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class _TwoLinears(nn.Module):
    """linear_1, an activation, linear_2: the text projection (tanh GELU) and the time embedder (SiLU)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Linear(dim_in, dim_out), Linear(dim_out, dim_out)


class ImageProjection(nn.Module):
    """Bring CLIP's tokens of both images to the transformer's width, after adding their position table."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(1, config.image_tokens, config.image_dim))
        self.norm1 = LayerNorm(config.image_dim, eps=_IMAGE_NORM_EPS, affine=True)
        self.ff = FeedForward(config.image_dim, config.image_dim, config.dim, approximate="none")
        self.norm2 = LayerNorm(config.dim, eps=_IMAGE_NORM_EPS, affine=True)

    def forward(self, image_embeds_BMD: Tensor) -> Tensor:
        compute = self.ff.net[2].weight.dtype
        x = self.norm1(image_embeds_BMD + self.pos_embed).to(compute)
        out_BMD: Tensor = self.norm2(self.ff(x)).to(compute)
        return out_BMD


class ConditionEmbedder(nn.Module):
    """What becomes of timestep, text and images before the first block."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = _TwoLinears(config.freq_dim, config.dim)
        self.time_proj = Linear(config.dim, 6 * config.dim)
        self.text_embedder = _TwoLinears(config.text_dim, config.dim)
        self.image_embedder = ImageProjection(config)

    def time(self, timestep_B: Tensor) -> Modulation:
        mlp = self.time_embedder
        embedding_BD: Tensor = mlp.linear_2(F.silu(mlp.linear_1(sinusoid(timestep_B, self.freq_dim))))
        return Modulation(embedding_BD, self.time_proj(F.silu(embedding_BD)).unflatten(1, (6, -1)))

    def text(self, prompt_embeds_BMD: Tensor) -> Tensor:
        mlp = self.text_embedder
        x = mlp.linear_1(prompt_embeds_BMD.to(mlp.linear_1.weight.dtype))
        text_BMD: Tensor = mlp.linear_2(F.gelu(x, approximate="tanh"))
        return text_BMD


class _ContextAttention(nn.Module):
    """The half of a block's cross-attention that sees the context only."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_attention_heads
        self.to_k, self.to_v = Linear(dim, dim), Linear(dim, dim)
        self.add_k_proj, self.add_v_proj = Linear(dim, dim), Linear(dim, dim)
        self.norm_k, self.norm_added_k = RMSNorm(dim, eps=config.eps), RMSNorm(dim, eps=config.eps)

    def forward(
        self, texts: Sequence[tuple[Tensor, Tensor | None]], image_BMD: Tensor, keep_on: torch.device | None
    ) -> list[ContextKV]:
        """Return keys and values for each of the texts [B, M, D] with its bias; the images' are made once for all."""
        dtype = self.to_v.compute_dtype
        k_image = split_heads(self.norm_added_k(self.add_k_proj(image_BMD)), self.num_heads).to(
            device=keep_on, dtype=dtype
        )
        v_image = split_heads(self.add_v_proj(image_BMD), self.num_heads).to(device=keep_on)
        made = []
        for text_BMD, text_bias in texts:
            k = split_heads(self.norm_k(self.to_k(text_BMD)), self.num_heads).to(device=keep_on, dtype=dtype)
            v = split_heads(self.to_v(text_BMD), self.num_heads).to(device=keep_on)
            made.append(ContextKV(k, v, k_image, v_image, text_bias))
        return made


class _ContextBlock(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attn2 = _ContextAttention(config)


class ContextEmbedder(nn.Module):
    """The quarter of the transformer's weights that depends on prompt, images and schedule alone.

    It runs once before the first step; during the loop its weights are not needed. Its parameters' names are those they
    have in the whole transformer: see `in_context`.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks: nn.Module = nn.ModuleList([_ContextBlock(config) for _ in range(config.num_layers)])

    def forward(self, prompt_embeds: Tensor, image_embeds: Tensor) -> list[ContextKV]:
        """Return every block's cross-attention keys and values; see `contexts`."""
        [context] = self.contexts([prompt_embeds], image_embeds)
        return context

    def contexts(
        self, prompts: Sequence[Tensor], image_embeds: Tensor, *, keep_on: torch.device | None = None
    ) -> list[list[ContextKV]]:
        """Return every block's cross-attention keys and values for each of the prompts, with each block's weights once.

        prompts: prompt_embeds [B, text_tokens, text_dim], zero beyond the prompt's true length. Those padding rows are
        attended to, as in training; being equal, they are folded into one key that counts for all where that is exact.
        image_embeds: [B, image_tokens, image_dim], the start image's tokens and then the end image's.
        keep_on: where each block's result goes at once; unless given it stays where it was made.
        """
        config = self.config
        _check_shape("image_embeds", image_embeds, config.image_tokens, config.image_dim)
        texts = [self._text(prompt_embeds) for prompt_embeds in prompts]
        image_BMD = self.condition_embedder.image_embedder(image_embeds)
        blocks = cast(Iterable[_ContextBlock], self.blocks)  # a list, or blocks that are streamed
        by_block = [block.attn2(texts, image_BMD, keep_on) for block in blocks]
        return [list(context) for context in zip(*by_block, strict=True)]

    def _text(self, prompt_embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return a prompt's tokens at the transformer's width, and the bias of their logits."""
        _check_shape("prompt_embeds", prompt_embeds, self.config.text_tokens, self.config.text_dim)
        text_bias: Tensor | None = None
        if self.condition_embedder.text_embedder.linear_1.weight.dtype == torch.float32:
            # not in bfloat16: it would round the bias by 1.5 %, and a bias keeps the fastest fused kernels away
            prompt_embeds, text_bias = fold_padding(prompt_embeds)
        return self.condition_embedder.text(prompt_embeds), text_bias

    def modulations(self, timesteps: Tensor) -> dict[float, Modulation]:
        """Return every timestep's modulation, each computed alone so that its bits depend on nothing else."""
        device = self.condition_embedder.time_proj.weight.device
        return {float(t): self.condition_embedder.time(t.reshape(1).to(device)) for t in timesteps}


def fold_padding(prompt_embeds: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the embeddings up to the longest true length and one zero row for the rest, and each row's logit bias.

    softmax over `count` equal keys is softmax over one with ln(count) added to its logit.
    """
    used = prompt_embeds.abs().sum(dim=(0, 2)).nonzero()
    length = int(used.max()) + 1 if len(used) else 0
    padding = prompt_embeds.shape[1] - length
    if padding < 2:
        return prompt_embeds, None
    bias = prompt_embeds.new_zeros(length + 1, dtype=torch.float32)
    bias[length] = math.log(padding)
    return prompt_embeds[:, : length + 1], bias


def _check_shape(name: str, embeds: Tensor, tokens: int, width: int) -> None:
    if embeds.shape[1:] != (tokens, width):
        raise ValueError(f"{name} is {tuple(embeds.shape)}, not [B, {tokens}, {width}]")


class SelfAttention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(dim, dim)])
        self.norm_q, self.norm_k = RMSNorm(dim, eps=config.eps), RMSNorm(dim, eps=config.eps)

    def keys_and_values(self, x_BLD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        k_BLNK = apply_rotary(split_heads(self.norm_k(self.to_k(x_BLD)), self.num_heads), rotary)
        return k_BLNK, split_heads(self.to_v(x_BLD), self.num_heads)

    def forward(self, x_BLD: Tensor, rotary: Rotary, k_BMNK: Tensor, v_BMNK: Tensor, attend: Attend) -> Tensor:
        q_BLNK = apply_rotary(split_heads(self.norm_q(self.to_q(x_BLD)), self.num_heads), rotary)
        out_BLD: Tensor = self.to_out[0](attend(q_BLNK, k_BMNK, v_BMNK))
        return out_BLD


class CrossAttention(nn.Module):
    """Two attentions from the same queries, over text and over both images, summed before the output projection."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_attention_heads
        self.to_q = Linear(dim, dim)
        self.to_out = nn.ModuleList([Linear(dim, dim)])
        self.norm_q = RMSNorm(dim, eps=config.eps)

    def forward(self, x_BLD: Tensor, context: ContextKV) -> Tensor:
        q_BLNK = split_heads(self.norm_q(self.to_q(x_BLD)), self.num_heads)
        from_text = sdpa(q_BLNK, context.k, context.v, bias_M=context.text_bias)
        from_image = sdpa(q_BLNK, context.k_image, context.v_image)
        out_BLD: Tensor = self.to_out[0](from_text + from_image)
        return out_BLD


class TransformerBlock(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.dim, eps=config.eps, affine=False)
        self.attn1 = SelfAttention(config)
        self.norm2 = LayerNorm(config.dim, eps=config.eps, affine=True)
        self.attn2 = CrossAttention(config)
        self.norm3 = LayerNorm(config.dim, eps=config.eps, affine=False)
        self.ffn = FeedForward(config.dim, config.ffn_dim, config.dim, approximate="tanh")
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, config.dim))

    def forward(
        self,
        hidden_BLD: Tensor,
        projection_B6D: Tensor,
        context: ContextKV,
        rotary: Rotary,
        chunk_tokens: int,
        attend: Attend = sdpa,
    ) -> None:
        """Advance `hidden_BLD` in place, `chunk_tokens` tokens at a time; only keys and values are whole.

        Sums and norms are done in float32 and stored in the dtype of `hidden_BLD`. attend: the attention among tokens;
        that over the context is 1 % of the work and always exact.
        """
        modulation = (self.scale_shift_table + projection_B6D).unsqueeze(2).unbind(1)
        shift, scale = modulation[0], modulation[1]
        spans = [slice(i, i + chunk_tokens) for i in range(0, hidden_BLD.shape[1], chunk_tokens)]
        compute, shape = self.attn1.to_q.compute_dtype, (*hidden_BLD.shape[:2], self.attn1.num_heads, -1)
        k_BLNK = torch.empty_like(hidden_BLD, dtype=compute).view(shape)
        v_BLNK = torch.empty_like(k_BLNK)
        for span in spans:
            x = (self.norm1(hidden_BLD[:, span]) * (1 + scale) + shift).to(compute)
            k_BLNK[:, span], v_BLNK[:, span] = self.attn1.keys_and_values(x, rotary.tokens(span))
        for span in spans:
            hidden_BLD[:, span] = self._advance(
                hidden_BLD[:, span], modulation, context, (rotary.tokens(span), k_BLNK, v_BLNK, attend)
            )

    def _advance(
        self,
        hidden_BLD: Tensor,
        modulation: tuple[Tensor, ...],
        context: ContextKV,
        attended: tuple[Rotary, Tensor, Tensor, Attend],
    ) -> Tensor:
        """Return the block's output for some of the tokens, given all tokens' keys and values."""
        residual, compute = hidden_BLD.dtype, self.attn1.to_q.compute_dtype
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation
        x = (self.norm1(hidden_BLD) * (1 + scale_a) + shift_a).to(compute)
        hidden_BLD = (hidden_BLD.float() + self.attn1(x, *attended).float() * gate_a).to(residual)
        x = self.norm2(hidden_BLD).to(compute)
        hidden_BLD = (hidden_BLD.float() + self.attn2(x, context).float()).to(residual)
        x = (self.norm3(hidden_BLD) * (1 + scale_f) + shift_f).to(compute)
        out_BLD: Tensor = (hidden_BLD.float() + self.ffn(x).float() * gate_f).to(residual)
        return out_BLD


class Transformer(nn.Module):
    """The part of the FLF2V transformer that runs at every step; `ContextEmbedder` has the rest."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_channels, config.dim, kernel_size=patch, stride=patch)
        self.blocks: nn.Module = nn.ModuleList([TransformerBlock(config) for _ in range(config.num_layers)])
        self.rotary = RotaryTable(config.attention_head_dim)
        self.norm_out = LayerNorm(config.dim, eps=config.eps, affine=False)
        self.proj_out = Linear(config.dim, config.out_channels * patch[0] * patch[1] * patch[2])
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(
        self,
        latents: Tensor,
        modulation: Modulation,
        contexts: Sequence[Iterable[ContextKV]],
        *,
        chunk_tokens: int | None = None,
        residual_dtype: torch.dtype | None = None,
        choice: KernelChoice = PLAIN_KERNELS,
    ) -> list[Tensor]:
        """Return the predicted velocity [B, out_channels, T, H, W] in float32, one for each of `contexts`.

        latents: [B, in_channels, T, H, W], noisy latents and then the condition; H and W even.
        modulation, contexts: of `ContextEmbedder`. Several contexts go through the blocks together, block by block, so
        that streamed weights move once. chunk_tokens: tokens worked on at a time, all unless given.
        residual_dtype: of the hidden state between blocks; the compute dtype unless given.
        choice: what the blocks compute with, plain PyTorch unless given; the fused kernels take a batch of 1.
        """
        compute = self.patch_embedding.weight.dtype
        grid_BDTHW = self.patch_embedding(latents.to(compute))
        grid = (grid_BDTHW.shape[2], grid_BDTHW.shape[3], grid_BDTHW.shape[4])
        hidden_BLD = grid_BDTHW.flatten(2).transpose(1, 2).to(residual_dtype or compute).contiguous()
        del grid_BDTHW
        chunk_tokens = chunk_tokens or hidden_BLD.shape[1]
        rotary = self.rotary(grid, latents.device)
        branches = [hidden_BLD, *(hidden_BLD.clone() for _ in contexts[1:])]
        blocks = cast(Iterable[nn.Module], self.blocks)  # a list, or blocks that are streamed
        for block, *of_block in zip(blocks, *contexts, strict=True):
            with _arithmetic(block, choice):
                for branch, context in zip(branches, of_block, strict=True):
                    operands = (branch, modulation.projection, context, rotary)
                    if choice.fused and branch.shape[0] == 1:
                        advance(block, *operands, chunk_tokens=chunk_tokens, choice=choice)
                    else:
                        block(*operands, chunk_tokens, choice.function)
        return [unpatchify(self._head(branch, modulation, chunk_tokens), grid, self.config) for branch in branches]

    def _head(self, hidden_BLD: Tensor, modulation: Modulation, chunk_tokens: int) -> Tensor:
        shift_B1D, scale_B1D = (self.scale_shift_table + modulation.embedding.unsqueeze(1)).unsqueeze(2).unbind(1)
        chunks = hidden_BLD.split(chunk_tokens, dim=1)
        return torch.cat([self.proj_out(self.norm_out(x) * (1 + scale_B1D) + shift_B1D) for x in chunks], dim=1)


def _arithmetic(block: nn.Module, choice: KernelChoice) -> AbstractContextManager[None]:
    """Return the context in which a block's linears compute as chosen."""
    if choice.dequantize:
        return dequantizing(block)
    return half_sums(block) if choice.half_sums else nullcontext()


def sinusoid(timestep_B: Tensor, dim: int) -> Tensor:
    """Return [cos(t w), sin(t w)] as [B, dim] float32, w = 10000^(-i / (dim/2)); in float64 inside, as official."""
    half = dim // 2
    frequency = 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(timestep_B.to("cpu", torch.float64), frequency)
    return torch.cat((angle.cos(), angle.sin()), dim=1).float().to(timestep_B.device)


def unpatchify(tokens_BLD: Tensor, grid: tuple[int, int, int], config: TransformerConfig) -> Tensor:
    """Lay tokens [B, L, p_t*p_h*p_w*C] out as a latent video [B, C, T, H, W]."""
    p_t, p_h, p_w = config.patch_size
    x: Tensor = tokens_BLD.unflatten(2, (p_t, p_h, p_w, config.out_channels)).unflatten(1, grid)
    # [B, t, h, w, p_t, p_h, p_w, C] -> [B, C, t, p_t, h, p_h, w, p_w]
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
