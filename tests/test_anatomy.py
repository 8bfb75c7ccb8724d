from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from wan_local.anatomy import in_context, part_shapes
from wan_local.key_map import Part, canonical
from wan_local.models.image_encoder import build_image_encoder
from wan_local.models.text_encoder import build_text_encoder
from wan_local.models.transformer import ContextEmbedder, Transformer
from wan_local.models.vae import Vae
from wan_local.settings import ModelConfig, known_models

BUILDERS: dict[Part, Callable[[ModelConfig], list[nn.Module]]] = {
    "transformer": lambda config: [ContextEmbedder(config.transformer), Transformer(config.transformer)],
    "vae": lambda config: [Vae(config.vae)],
    "text_encoder": lambda config: [build_text_encoder(config.text_encoder)],
    "image_encoder": lambda config: [build_image_encoder(config.image_encoder)],
}


@pytest.mark.parametrize("config", known_models(), ids=lambda config: config.name)
@pytest.mark.parametrize("part", list(BUILDERS))
def test_shapes_are_those_of_the_networks(part: Part, config: ModelConfig) -> None:
    with torch.device("meta"):
        modules = BUILDERS[part](config)
    built: dict[str, Any] = {}
    for module in modules:
        built |= {canonical(part, name): tuple(value.shape) for name, value in module.state_dict().items()}
    assert part_shapes(part, config) == built


def test_what_the_loop_does_not_keep_is_a_quarter_of_the_transformer() -> None:
    shapes = part_shapes("transformer", known_models()[0])
    numbers = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    once = sum(count for name, count in numbers.items() if in_context(name))
    assert sum(numbers.values()) == pytest.approx(16.4e9, rel=0.01)
    assert sum(numbers.values()) - once == pytest.approx(11.95e9, rel=0.005)
