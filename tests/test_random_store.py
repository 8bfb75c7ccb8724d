"""The store of noise that a whole run on a card is measured with: opened and read as a converted one is."""

from __future__ import annotations

import pytest
import torch

from bench.random_store import write_random_store
from wan_local.checkpoint import ModelFiles, PartTensors, open_model
from wan_local.key_map import PARTS
from wan_local.planner import StagePlan
from wan_local.settings import load_model_config
from wan_local.stage import network_sizes, stage
from wan_local.weight_format import WeightFormats

CPU = torch.device("cpu")
TINY = load_model_config("flf2v_tiny")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder = tmp_path_factory.mktemp("noise") / "store"
    nbytes = write_random_store(folder, TINY)
    assert nbytes == sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return open_model(folder)


def test_it_is_identified_and_planned_as_what_conversion_to_int8_writes(files: ModelFiles) -> None:
    assert files.config == TINY and files.manifest is not None
    assert network_sizes(TINY, files) == network_sizes(TINY, WeightFormats.converted("int8"))


def test_every_number_is_finite_and_of_the_size_that_keeps_a_network_finite(files: ModelFiles) -> None:
    for part in PARTS:
        tensors = PartTensors(files, part)
        for name in tensors:
            tensor = tensors[name].float()
            assert tensor.isfinite().all(), name
            assert tensor.any() or tensor.numel() == 1, f"{part}: {name} is nothing but zeros"


def test_its_text_encoder_runs_streamed_from_the_file(files: ModelFiles) -> None:
    plan = StagePlan("text", 0, 0, resident_blocks=0, source="file")
    with stage("text_encoder", files, CPU, torch.float32, plan=plan) as encoder:
        embeds = encoder.get_input_embeddings()(torch.tensor([[1, 2, 3]]))
        hidden = encoder(inputs_embeds=embeds).last_hidden_state
    assert hidden.isfinite().all() and hidden.std() > 0.01
