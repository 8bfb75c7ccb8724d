from __future__ import annotations

import pytest
import torch

from tests import parity
from wan_local.errors import WrongModel
from wan_local.key_map import TABLES, Part, convert_official, to_official, to_ours

OFFICIAL_FILES: dict[Part, str] = {
    "transformer": "dit_official",
    "vae": "vae_official",
    "text_encoder": "t5_official",
    "image_encoder": "clip_official",
}


@pytest.mark.parametrize("part", list(TABLES))
def test_table_maps_every_official_name_and_back(part: Part) -> None:
    mapped = to_ours(part, parity.tensors(OFFICIAL_FILES[part]))
    assert len(set(mapped.values())) == len(mapped)
    assert to_official(part, mapped.values()) == {ours: official for official, ours in mapped.items()}


@pytest.mark.parametrize("part", list(TABLES))
def test_a_name_that_no_row_knows_is_an_error(part: Part) -> None:
    with pytest.raises(WrongModel, match=r"blocks\.0\.surprise"):
        to_ours(part, [*parity.tensors(OFFICIAL_FILES[part]), "blocks.0.surprise.weight"])


def test_the_text_half_of_the_clip_file_is_left_out_and_nothing_else() -> None:
    names = set(parity.tensors("clip_official"))
    ignored = names - set(to_ours("image_encoder", names))
    assert {name.split(".")[0] for name in ignored} == {"textual", "log_scale", "visual"}
    assert {name for name in ignored if name.startswith("visual")} == {"visual.head"}


def test_joint_projection_falls_into_q_k_v_in_that_order() -> None:
    official = {"visual.transformer.3.attn.to_qkv.weight": torch.arange(12.0).view(6, 2)}
    converted = convert_official("image_encoder", official)
    layer = "encoder.layers.3.self_attn"
    assert converted[f"{layer}.q_proj.weight"].tolist() == [[0, 1], [2, 3]]
    assert converted[f"{layer}.k_proj.weight"].tolist() == [[4, 5], [6, 7]]
    assert converted[f"{layer}.v_proj.weight"].tolist() == [[8, 9], [10, 11]]


def test_flf2v_position_table_is_mapped_where_diffusers_loses_it() -> None:
    assert to_ours("transformer", ["img_emb.emb_pos"]) == {
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed"
    }
