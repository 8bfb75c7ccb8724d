from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from wan_local.checkpoint import ModelFiles, PartTensors, find_model, open_model
from wan_local.errors import CorruptModel, WrongModel
from wan_local.key_map import canonical
from wan_local.models.text_encoder import encode_tokens
from wan_local.models.transformer import in_context, stays_float32
from wan_local.planner import StagePlan
from wan_local.settings import load_settings
from wan_local.stage import Network, load_network, load_strictly, network_sizes, stage

CPU = torch.device("cpu")
NETWORKS: list[Network] = ["text_encoder", "image_encoder", "vae", "vae_encoder", "vae_decoder"]
NETWORKS += ["context_embedder", "transformer"]


@pytest.fixture(scope="module")
def files() -> ModelFiles:
    return find_model(load_settings(model="tiny"))


@pytest.mark.parametrize("network", NETWORKS)
def test_every_parameter_is_loaded_and_none_stays_on_meta(files: ModelFiles, network: Network) -> None:
    module = load_network(network, files, CPU, torch.float32)
    part = (
        "vae"
        if network.startswith("vae")
        else "transformer"
        if network in ("context_embedder", "transformer")
        else network
    )
    theirs = {
        "context_embedder": in_context,
        "transformer": lambda name: not in_context(name),
        "vae_encoder": lambda name: name.startswith(("encoder.", "quant_conv.")),
        "vae_decoder": lambda name: name.startswith(("decoder.", "post_quant_conv.")),
    }
    stored = PartTensors(files, part, theirs.get(network, lambda _: True))
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    assert not any(parameter.requires_grad for parameter in module.parameters())
    state = {canonical(part, name): tensor for name, tensor in module.state_dict().items()}
    assert set(state) == set(stored)
    assert all(torch.equal(state[name], stored[name].float()) for name in stored)


def test_parts_that_need_float32_keep_it_when_computing_in_bfloat16(files: ModelFiles) -> None:
    loop = load_network("transformer", files, CPU, torch.bfloat16)
    once = load_network("context_embedder", files, CPU, torch.bfloat16)
    for name, parameter in (*loop.named_parameters(), *once.named_parameters()):
        assert parameter.dtype == (torch.float32 if stays_float32(name) else torch.bfloat16), name
    assert once.get_parameter("condition_embedder.time_embedder.linear_1.weight").dtype == torch.float32
    assert loop.get_parameter("blocks.0.attn1.to_q.weight").dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in load_network("vae", files, CPU, torch.bfloat16).parameters())


def test_loop_and_context_share_the_transformers_tensors_without_one_left_over(files: ModelFiles) -> None:
    counted = network_sizes(files.config)
    assert set(counted) == set(NETWORKS)
    stored = sum(tensor.numel() for tensor in PartTensors(files, "transformer").values())
    assert counted["transformer"].total + counted["context_embedder"].total == stored
    for network, size in counted.items():
        module = load_network(network, files, CPU, torch.bfloat16)
        item = 4 if network.startswith("vae") else 2
        stored_once = {
            p.data_ptr(): p.numel() * p.element_size() for p in module.parameters()
        }  # one table has two names
        assert size.weight_bytes(item) == sum(stored_once.values())
    halves = counted["vae_encoder"].total + counted["vae_decoder"].total
    assert counted["vae"].total == halves == sum(tensor.numel() for tensor in PartTensors(files, "vae").values())
    assert counted["transformer"].num_blocks == files.config.transformer.num_layers
    assert counted["text_encoder"].table == files.config.text_encoder.vocab_size * files.config.text_encoder.d_model


def held_elements(kept: list[nn.Module]) -> int:
    gc.collect()
    return sum(p.numel() for module in kept for p in module.parameters() if not p.is_meta)


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_are_gone_after_the_block_even_if_the_module_is_held(files: ModelFiles, network: Network) -> None:
    with stage(network, files, CPU, torch.float32) as module:
        assert held_elements([module]) > 1000
    assert held_elements([module]) == 0


def test_weights_are_gone_after_an_error_and_after_a_closed_generator(files: ModelFiles) -> None:
    kept: list[nn.Module] = []

    def story() -> Iterator[int]:
        with stage("vae", files, CPU, torch.float32) as vae:
            kept.append(vae)
            yield 1
            yield 2

    running = story()
    assert next(running) == 1 and held_elements(kept) > 1000
    running.close()
    assert held_elements(kept) == 0

    def failing() -> None:
        with stage("vae", files, CPU, torch.float32) as vae:
            kept.append(vae)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert held_elements(kept) == 0


def test_missing_unexpected_and_misshapen_tensors_are_listed() -> None:
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    whole = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    with pytest.raises(WrongModel, match=r"1 tensors missing \['bias'\], 1 unexpected \['extra'\]"):
        load_strictly(module, "vae", {"weight": whole["weight"], "extra": torch.zeros(1)}, lambda _, t: t)
    with pytest.raises(WrongModel, match=r"'weight' of the vae is \[3, 2\]; \[2, 3\] is needed"):
        load_strictly(module, "vae", {**whole, "weight": torch.zeros(3, 2)}, lambda _, t: t)


@pytest.mark.parametrize("resident", [None, 0], ids=["resident", "streamed"])
def test_an_embedding_table_of_zeros_is_damage(files: ModelFiles, resident: int | None, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(files.folder, tmp_path / "model"))
    file = folder / "text_encoder" / "model.safetensors"
    state = load_file(file)
    state["shared.weight"].zero_()
    save_file(state, file)
    plan = StagePlan("text_encoder", 0, 0, resident_blocks=resident, source=None if resident is None else "file")
    ids = torch.tensor([[5, 9, 1]])
    with (
        stage("text_encoder", open_model(folder), CPU, torch.float32, plan=plan) as encoder,
        pytest.raises(CorruptModel, match="embedding table is zero for every token"),
    ):
        encode_tokens(cast(Any, encoder), ids, torch.ones_like(ids))
