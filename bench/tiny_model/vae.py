"""diffusers' `AutoencoderKLWan` run on whole clips, which is what training needs.

diffusers feeds the causal network four frames at a time and carries caches; here one call sees the whole clip and gives
the same result up to rounding. Legend: B batch, C channels, T frames, H height, W width.
"""

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanMidBlock,
    WanResample,
    WanResidualBlock,
)
from torch import Tensor, nn

Z_DIM = 16
CONFIG = {
    "base_dim": 16,
    "z_dim": Z_DIM,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}
FIXED_SIGMA = 0.1
"""Standard deviation of the noise added to latents in training; written into the posterior's log-variance."""
FULL_RATE_FIELD = 12
"""Frames that the encoder's full-rate layers see back (five causal convolutions: 1 + 5 * 2), rounded up."""


def build_vae() -> AutoencoderKLWan:
    """Return a fresh VAE that starts as a per-frame autoencoder with quiet residual branches."""
    vae = AutoencoderKLWan(**CONFIG)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, WanResidualBlock):
                module.conv2.weight.mul_(0.1)
            elif isinstance(module, WanAttentionBlock):
                module.proj.weight.mul_(0.1)
        vae.quant_conv.weight[Z_DIM:] = 0
        vae.quant_conv.bias[Z_DIM:] = 2 * math.log(FIXED_SIGMA)
        _forget_the_past(vae)
    return channels_last(vae)


def _forget_the_past(vae: nn.Module) -> None:
    """Zero the taps on older frames and make the time convolutions copies: a 2-D autoencoder in 3-D clothes.

    Going down, the newest frame is copied, so that a latent starts as the last of its four frames and the clip's last
    frame, all that the condition's last latent knows, is kept.
    """
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size == (3, 3, 3):
            module.weight[:, :, :-1] = 0
        if isinstance(module, WanResample) and hasattr(module, "time_conv"):
            weight = module.time_conv.weight
            weight.zero_()
            module.time_conv.bias.zero_()
            channels = torch.arange(weight.shape[1])
            for copy in range(weight.shape[0] // weight.shape[1]):
                weight[copy * weight.shape[1] + channels, channels, -1, 0, 0] = 1.0


def channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Put convolution weights into channels-last layout, which is about twice as fast on a CPU."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return vae


def encode(vae: AutoencoderKLWan, x_BCTHW: Tensor) -> Tensor:
    """Return the posterior's mode [B, 16, (T-1)/4+1, H/8, W/8] for pixels in [-1, 1]."""
    x = causal_conv(vae.encoder.conv_in, x_BCTHW.contiguous(memory_format=torch.channels_last_3d))
    for layer in vae.encoder.down_blocks:
        x = _layer(layer, x)
    return _encoder_end(vae, x)


def encode_ends(vae: AutoencoderKLWan, first_BCHW: Tensor, last_BCHW: Tensor, num_frames: int) -> Tensor:
    """Return `encode` of the clip [first, mid-grey..., last] without computing its constant middle at full resolution.

    The layers before the first temporal stride see `FULL_RATE_FIELD` frames back: a shorter clip has them all.
    """
    short = min(num_frames, 2 * FULL_RATE_FIELD)
    clip = first_BCHW.new_zeros(*first_BCHW.shape[:2], short, *first_BCHW.shape[2:])
    clip[:, :, 0], clip[:, :, -1] = first_BCHW, last_BCHW
    x = causal_conv(vae.encoder.conv_in, clip.contiguous(memory_format=torch.channels_last_3d))
    expanded = short == num_frames
    for layer in vae.encoder.down_blocks:
        if not expanded and isinstance(layer, WanResample) and layer.mode == "downsample3d":
            x = _spatial_resample(layer, x)
            constant = x[:, :, short - 2 : short - 1].expand(-1, -1, num_frames - short, -1, -1)
            x = _downsample_time(layer, torch.cat((x[:, :, :-1], constant, x[:, :, -1:]), 2))
            expanded = True
        else:
            x = _layer(layer, x)
    return _encoder_end(vae, x)


def decode(vae: AutoencoderKLWan, z_BCTHW: Tensor) -> Tensor:
    """Return pixels [B, 3, 4*(T-1)+1, 8H, 8W] for latents in the VAE's own scale; not clamped."""
    decoder = vae.decoder
    z = z_BCTHW.contiguous(memory_format=torch.channels_last_3d)
    x = causal_conv(decoder.conv_in, causal_conv(vae.post_quant_conv, z))
    x = _layer(decoder.mid_block, x)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _layer(resnet, x)
        if block.upsamplers is not None:
            x = _layer(block.upsamplers[0], x)
    return causal_conv(decoder.conv_out, _norm_silu(decoder.norm_out, x))


def _encoder_end(vae: AutoencoderKLWan, x: Tensor) -> Tensor:
    x = _layer(vae.encoder.mid_block, x)
    x = causal_conv(vae.encoder.conv_out, _norm_silu(vae.encoder.norm_out, x))
    return causal_conv(vae.quant_conv, x)[:, :Z_DIM]


def causal_conv(conv: WanCausalConv3d, x: Tensor) -> Tensor:
    """Convolve causally; one frame is convolved in 2-D by the newest tap, since the older ones see zeros only."""
    _, _, height, width = conv.weight.shape[1:]
    if x.shape[2] == 1:
        frame = F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, padding=(height // 2, width // 2))
        return frame.unsqueeze(2)
    if conv.kernel_size[0] > 1:
        x = F.pad(x, (0, 0, 0, 0, conv.kernel_size[0] - 1, 0))
    return F.conv3d(x, conv.weight, conv.bias, padding=(0, height // 2, width // 2))


def _norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    # F.normalize with diffusers' eps 1e-12 on the norm; here on the mean square, which no real activation notices
    scale = torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-12)
    return F.silu(x * scale * norm.gamma)


def _layer(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, WanResidualBlock):
        shortcut = x if isinstance(layer.conv_shortcut, nn.Identity) else causal_conv(layer.conv_shortcut, x)
        x = causal_conv(layer.conv1, _norm_silu(layer.norm1, x))
        return shortcut + causal_conv(layer.conv2, _norm_silu(layer.norm2, x))
    if isinstance(layer, WanMidBlock):
        x = _layer(layer.resnets[0], x)
        return _layer(layer.resnets[1], layer.attentions[0](x))
    if isinstance(layer, WanResample):
        return _resample(layer, x)
    raise TypeError(f"unexpected layer {type(layer).__name__}")


def _resample(layer: WanResample, x: Tensor) -> Tensor:
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        # the first frame is neither doubled nor seen by the time convolution
        batch, channels, _, height, width = x.shape
        pairs = causal_conv(layer.time_conv, x[:, :, 1:]).unflatten(1, (2, channels)).permute(0, 2, 3, 1, 4, 5)
        x = torch.cat((x[:, :, :1], pairs.reshape(batch, channels, -1, height, width)), 2)
    x = _spatial_resample(layer, x)
    return _downsample_time(layer, x) if layer.mode == "downsample3d" else x


def _spatial_resample(layer: WanResample, x: Tensor) -> Tensor:
    frames = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return layer.resample(frames).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def _downsample_time(layer: WanResample, x: Tensor) -> Tensor:
    if x.shape[2] == 1:
        return x
    conv = layer.time_conv
    return torch.cat((x[:, :, :1], F.conv3d(x, conv.weight, conv.bias, stride=(2, 1, 1))), 2)
