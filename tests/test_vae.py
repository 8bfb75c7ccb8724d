from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import parity
from wan_local.conditioning import encode_condition


def condition_chunks(start: Tensor, end: Tensor, chunks: int, *, blank: Callable[[Tensor], Tensor]) -> list[Tensor]:
    middle = torch.zeros_like(start).expand(-1, -1, 4, -1, -1)
    return [start, *[blank(middle) for _ in range(chunks - 1)], torch.cat((middle[:, :, 1:], end), dim=2)]


@pytest.mark.parametrize("chunks", [1, 2, 3, 20, 25])
def test_encoding_a_clip_that_repeats_is_bit_equal_to_encoding_all_of_it(chunks: int) -> None:
    generator = torch.Generator().manual_seed(chunks)
    start, end = (torch.rand(1, 3, 1, 32, 48, generator=generator) * 2 - 1 for _ in range(2))
    vae = parity.official_vae()
    repeated = vae.encode(condition_chunks(start, end, chunks, blank=lambda middle: middle))
    computed = vae.encode(condition_chunks(start, end, chunks, blank=lambda middle: middle.clone()))
    assert torch.equal(repeated, computed)


def test_most_of_the_encoding_of_81_frames_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first convolution sees the start image, three blank frames and the last chunk's four: 8 frames of 81."""
    vae, calls = parity.official_vae(), []
    forward = type(vae.encoder.conv_in).forward

    def counted(self: Any, *args: Any) -> Tensor:
        calls.append(self)
        return forward(self, *args)

    monkeypatch.setattr(type(vae.encoder.conv_in), "forward", counted)
    images = (torch.rand(3, 32, 48), torch.rand(3, 32, 48))
    encode_condition(vae, images, 81)
    assert calls.count(vae.encoder.conv_in) <= 8
    first_coarse = vae.encoder.down_blocks[vae.encoder.fine_blocks + 1].conv1
    assert calls.count(first_coarse) <= 12  # of 21 chunks


def test_memory_of_a_stream_does_not_grow_with_its_length() -> None:
    vae = parity.official_vae()
    sizes = []
    for frames in (3, 9):
        memory: dict[Any, Tensor] = {}
        for latent in torch.randn(1, 16, frames, 4, 6).split(1, dim=2):
            vae.decoder(vae.post_quant_conv(latent, memory), memory)
        sizes.append(sum(tensor.numel() for tensor in memory.values()))
    assert sizes[0] == sizes[1]
