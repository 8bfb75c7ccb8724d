from __future__ import annotations

import pytest
import torch

from tests import parity
from wan_local.models.transformer import ContextKV
from wan_local.parking import ParkedContext, placed

CPU = torch.device("cpu")


def official_contexts() -> tuple[parity.OfficialTransformer, list[list[ContextKV]]]:
    net = parity.official_transformer()
    config = net.context_embedder.config
    generator = torch.Generator().manual_seed(1)
    prompts = list(torch.randn(2, 1, config.text_tokens, config.text_dim, generator=generator))
    images = torch.randn(1, config.image_tokens, config.image_dim, generator=generator)
    return net, net.context_embedder.contexts(prompts, images)


def test_contexts_made_together_are_those_made_one_by_one_and_share_the_images() -> None:
    net, contexts = official_contexts()
    config, generator = net.context_embedder.config, torch.Generator().manual_seed(1)
    prompts = list(torch.randn(2, 1, config.text_tokens, config.text_dim, generator=generator))
    images = torch.randn(1, config.image_tokens, config.image_dim, generator=generator)
    for prompt, context in zip(prompts, contexts, strict=True):
        for alone, one in zip(net.context_embedder(prompt, images), context, strict=True):
            assert all(
                torch.equal(getattr(alone, name), getattr(one, name)) for name in ("k", "v", "k_image", "v_image")
            )
    assert all(a.k_image is b.k_image and a.v_image is b.v_image for a, b in zip(*contexts, strict=True))


@pytest.mark.parametrize("together", [True, False])
def test_parked_keys_and_values_give_the_same_bits_call_after_call(together: bool) -> None:
    net, contexts = official_contexts()
    config = net.transformer.config
    latents = torch.randn(1, config.in_channels, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    modulation = next(iter(net.context_embedder.modulations(torch.tensor([500])).values()))
    expected = net.transformer(latents, modulation, contexts)
    with placed(contexts, True, CPU) as stands:
        assert all(isinstance(stand, ParkedContext) for stand in stands)
        for _ in range(3):
            if together:
                got = net.transformer(latents, modulation, stands)
            else:
                got = [net.transformer(latents, modulation, [stand])[0] for stand in stands]
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_what_is_not_parked_is_handed_out_as_it_is() -> None:
    _, contexts = official_contexts()
    with placed(contexts, False, CPU) as given:
        assert all(a is b for a, b in zip(given, contexts, strict=True))


def test_what_was_parked_and_need_not_be_goes_to_the_device() -> None:
    _, contexts = official_contexts()
    with placed(contexts, False, torch.device("meta")) as given:
        assert all(context.k.is_meta and context.v_image.is_meta for branch in given for context in branch)


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_both_branches_share_the_images_wherever_they_go(place: str) -> None:
    """Apart they are 0.42 GB more of RAM."""
    _, contexts = official_contexts()
    with placed(contexts, False, torch.device(place)):
        assert all(a.k_image is b.k_image and a.v_image is b.v_image for a, b in zip(*contexts, strict=True))
        assert all(a.k is not b.k for a, b in zip(*contexts, strict=True))
