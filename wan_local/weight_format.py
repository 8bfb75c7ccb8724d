"""The formats that weights can be in, by name; what they are is in `wan_local.quantize`. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WeightFormat = Literal["bf16", "int8", "int4", "fp8"]
Int8Arithmetic = Literal["w8a8", "weight-only"]

FIRST_KEPT, LAST_KEPT = 2, 3  # blocks that suffer most from rounding (arXiv 2606.00957)
QUANTIZED_PARTS = ("transformer", "text_encoder", "image_encoder")


@dataclass(frozen=True, slots=True)
class WeightFormats:
    """The format of each part's block linears. `keep_edges`: the transformer's first two and last three stay bf16."""

    transformer: WeightFormat = "bf16"
    text_encoder: WeightFormat = "bf16"
    image_encoder: WeightFormat = "bf16"
    keep_edges: bool = False

    @classmethod
    def converted(
        cls,
        transformer: WeightFormat,
        *,
        text_encoder: WeightFormat | None = None,
        image_encoder: WeightFormat | None = None,
        keep_edges: bool = False,
    ) -> WeightFormats:
        """Return what a conversion into a format for the transformer gives the others that are not named."""
        of_text: WeightFormat = "int8" if transformer == "int4" else transformer
        return cls(transformer, text_encoder or of_text, image_encoder or "bf16", keep_edges)

    def of_block(self, part: str, index: int, num_blocks: int) -> WeightFormat:
        """Return the format of block `index` of a part."""
        at_an_edge = index < FIRST_KEPT or index >= num_blocks - LAST_KEPT
        if part == "transformer" and self.keep_edges and at_an_edge:
            return "bf16"
        formats: dict[str, WeightFormat] = {name: getattr(self, name) for name in QUANTIZED_PARTS}
        return formats.get(part, "bf16")


PLAIN = WeightFormats()
