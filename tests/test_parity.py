"""Every case of `golden/`: our code on the official weights gives the official numbers, within the stated tolerance."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import parity
from tests.parity import golden, relative_error, tensors
from wan_local.acceleration import EveryStep
from wan_local.conditioning import (
    Tokens,
    clean_prompt,
    embed_images,
    embed_prompt,
    encode_condition,
    frame_mask,
    initial_noise,
)
from wan_local.denoise import Denoised, Guided, denoise
from wan_local.geometry import Geometry, Size
from wan_local.models.image_encoder import clip_pixels, encode_pixels
from wan_local.models.text_encoder import encode_tokens
from wan_local.models.transformer import ContextEmbedder, Modulation, stays_float32
from wan_local.preview import to_uint8
from wan_local.scheduler import Scheduler

TOLERANCE = golden()["tolerances"]
TEXT_TOKENS = 512


def padded(context: Tensor) -> Tensor:
    """Put unpadded text states [L, D] into [1, 512, D]."""
    out = context.new_zeros((1, TEXT_TOKENS, context.shape[1]))
    out[0, : len(context)] = context
    return out


def clip_chunks(video_CTHW: Tensor) -> list[Tensor]:
    video = video_CTHW.unsqueeze(0)
    return [video[:, :, :1], *(video[:, :, 1:].split(4, dim=2) if video.shape[2] > 1 else ())]


def modulation_of(net: ContextEmbedder, timesteps: list[int]) -> Modulation:
    rows = [net.modulations(torch.tensor(timesteps))[timestep] for timestep in timesteps]
    return Modulation(torch.cat([row.embedding for row in rows]), torch.cat([row.projection for row in rows]))


@pytest.mark.parametrize("chunk_tokens", [None, 7], ids=["whole", "chunks"])
@pytest.mark.parametrize("case", golden()["dit"]["cases"], ids=lambda case: case["output"])
def test_transformer_gives_the_official_output(case: dict[str, Any], chunk_tokens: int | None) -> None:
    data, net = tensors("dit_cases"), parity.official_transformer()
    samples = [case["inputs"]] if isinstance(case["inputs"], str) else case["inputs"]
    latents = torch.stack([torch.cat((data[f"{name}.x"], data[f"{name}.y"])) for name in samples])
    text = torch.cat([padded(data[case.get("context", f"{name}.context")]) for name in samples])
    images = torch.stack([data[f"{name}.clip_fea"].flatten(0, 1) for name in samples])
    modulation = modulation_of(net.context_embedder, case["t"])
    [got] = net.transformer(latents, modulation, [net.context_embedder(text, images)], chunk_tokens=chunk_tokens)
    expected = data[case["output"]]
    assert relative_error(got, expected if expected.dim() == 5 else expected.unsqueeze(0)) <= TOLERANCE["dit"]


def test_transformer_of_the_official_image_width_and_token_count_gives_the_official_output() -> None:
    section, data = golden()["dit1280"], tensors("dit1280_cases")
    for name, row in section["formula_tensors"].items():
        check, made = section["check"][name], parity.formula_tensor(row)
        assert made.flatten()[:4].tolist() == check["first4"]
        assert math.isclose(float(made.double().sum()), check["sum_float64"], rel_tol=1e-9)
    images = parity.formula_tensor(section["formula_tensors"]["clip_fea"]).flatten(0, 1).unsqueeze(0)
    latents = torch.cat((data["x"], data["y"])).unsqueeze(0)
    [timestep] = section["case"]["t"]
    got = parity.official_transformer_1280()(latents, timestep, padded(data["context"]), images)
    assert relative_error(got[0], data[section["case"]["output"]]) <= TOLERANCE["dit1280"]


def test_intermediates_of_the_first_case_are_the_official_ones() -> None:
    data, net = tensors("dit_cases"), parity.official_transformer()
    embedder = net.context_embedder.condition_embedder
    modulation = embedder.time(torch.tensor([999]))
    assert relative_error(modulation.embedding, data["dbg.time_embedding"]) <= TOLERANCE["dit"]
    assert relative_error(modulation.projection.flatten(1), data["dbg.time_projection"]) <= TOLERANCE["dit"]
    text = embedder.text(padded(data["A.context"]))
    assert relative_error(text[:, :8], data["dbg.text_embedding"]) <= TOLERANCE["dit"]
    images = embedder.image_embedder(data["A.clip_fea"].flatten(0, 1).unsqueeze(0))
    assert relative_error(images, data["dbg.img_emb"]) <= TOLERANCE["dit"]
    patches = net.transformer.patch_embedding(torch.cat((data["A.x"], data["A.y"])).unsqueeze(0))
    assert relative_error(patches, data["dbg.patch_embedding"]) <= TOLERANCE["dit"]


def test_the_last_frames_image_tokens_do_not_go_through_the_text_projections() -> None:
    """Peers split the 514 tokens at 257, so that the second image is read as text; that must miss the data by far."""
    data, net = tensors("dit_cases"), parity.official_transformer()
    latents = torch.cat((data["A.x"], data["A.y"])).unsqueeze(0)
    text, images = padded(data["A.context"]), data["A.clip_fea"].flatten(0, 1).unsqueeze(0)
    expected = data["A.out.t999"].unsqueeze(0)
    assert relative_error(net(latents, 999, text, images), expected) <= TOLERANCE["dit"]
    embedder = net.context_embedder.condition_embedder
    text_BMD, image_BMD = embedder.text(text), embedder.image_embedder(images)
    half = image_BMD.shape[1] // 2
    as_text = torch.cat((image_BMD[:, half:], text_BMD), dim=1)
    blocks = net.context_embedder.blocks
    wrong = [kept for block in blocks for kept in block.attn2([(as_text, None)], image_BMD[:, :half], None)]
    [got] = net.transformer(latents, modulation_of(net.context_embedder, [999]), [wrong])
    assert relative_error(got, expected) > 1000 * TOLERANCE["dit"]


def test_folding_the_padded_text_changes_nothing() -> None:
    """Against the plain sum over all 512 keys, whose padding rows are equal."""
    data, net = tensors("dit_cases"), parity.official_transformer()
    text, images = padded(data["A.context"]), data["A.clip_fea"].flatten(0, 1).unsqueeze(0)
    latents = torch.cat((data["A.x"], data["A.y"])).unsqueeze(0)
    folded = net.context_embedder(text, images)
    assert folded[0].k.shape[1] == len(data["A.context"]) + 1
    embedder = net.context_embedder.condition_embedder
    text_BMD, image_BMD = embedder.text(text), embedder.image_embedder(images)
    blocks = net.context_embedder.blocks
    plain = [kept for block in blocks for kept in block.attn2([(text_BMD, None)], image_BMD, None)]
    assert plain[0].k.shape[1] == TEXT_TOKENS
    got, expected = net.transformer(latents, modulation_of(net.context_embedder, [421]), [folded, plain])
    assert relative_error(got, expected) < 4e-6  # float32 rounding, which differs between processors


def test_padding_is_not_folded_in_bfloat16_where_the_bias_would_be_rounded() -> None:
    net = copy.deepcopy(parity.official_transformer().context_embedder)
    for name, parameter in net.named_parameters():
        if not stays_float32(name):
            parameter.data = parameter.data.bfloat16()
    images = torch.zeros_like(tensors("dit_cases")["A.clip_fea"].flatten(0, 1).unsqueeze(0))
    context, *_ = net(padded(tensors("dit_cases")["A.context"]), images)
    assert context.text_bias is None and context.k.shape[1] == TEXT_TOKENS


@pytest.mark.parametrize("chunk_tokens", [1, 5, 17, 18, 1000])
def test_working_in_chunks_changes_nothing_beyond_float32_rounding(chunk_tokens: int) -> None:
    data, net = tensors("dit_cases"), parity.official_transformer()
    text, images = padded(data["A.context"]), data["A.clip_fea"].flatten(0, 1).unsqueeze(0)
    latents = torch.cat((data["A.x"], data["A.y"])).unsqueeze(0)
    whole = net(latents, 999, text, images)
    assert relative_error(net(latents, 999, text, images, chunk_tokens=chunk_tokens), whole) < 2e-6


@pytest.mark.parametrize("case", golden()["vae"]["encode"], ids=lambda case: case["video"])
def test_vae_encodes_as_official(case: dict[str, str]) -> None:
    data = tensors("vae_cases")
    latents = parity.official_vae().encode(clip_chunks(data[case["video"]].float() / 127.5 - 1.0))
    assert relative_error(latents[0], data[case["latent"]]) <= TOLERANCE["vae"]
    raw = parity.official_vae().denormalize(latents)[0]
    assert relative_error(raw, data[case["mean_raw"]]) <= TOLERANCE["vae"]


@pytest.mark.parametrize("case", golden()["vae"]["decode"], ids=lambda case: case["latent"])
def test_vae_decodes_as_official(case: dict[str, str]) -> None:
    data = tensors("vae_cases")
    video = torch.cat(list(parity.official_vae().decode(data[case["latent"]].unsqueeze(0))), dim=2)
    assert relative_error(video[0], data[case["raw"]]) <= TOLERANCE["vae"]


def test_vae_round_trip_is_the_official_one() -> None:
    data, case, vae = tensors("vae_cases"), golden()["vae"]["roundtrip"], parity.official_vae()
    latents = vae.encode(clip_chunks(data[case["video"]].float() / 127.5 - 1.0))
    video = torch.cat(list(vae.decode(latents)), dim=2).clamp(-1, 1)
    assert relative_error(video[0], data[case["out"]]) <= TOLERANCE["vae"]


def test_text_encoder_gives_the_official_hidden_states() -> None:
    data, encoder = tensors("t5_cases"), parity.official_text_encoder()
    mask = data["two.mask"]
    got = encode_tokens(encoder, data["two.ids"], mask)
    assert relative_error(got, data["two.out"] * mask.unsqueeze(-1)) <= TOLERANCE["t5"]
    nomask = data["nomask.ids"]
    got = encode_tokens(encoder, nomask, torch.ones_like(nomask))
    assert relative_error(got[:, :: golden()["t5"]["nomask_stride"]], data["nomask.out"]) <= TOLERANCE["t5"]


def test_encoding_only_the_true_tokens_equals_the_official_padding_to_512() -> None:
    data, expected = tensors("t5_cases"), tensors("t5_cases")["pad512.out"]
    ids = data["pad512.ids"][:, : len(expected)]
    got = embed_prompt(parity.official_text_encoder(), Tokens(ids, cut=0), length=TEXT_TOKENS)
    assert relative_error(got[0, : len(expected)], expected) <= TOLERANCE["t5"]
    assert not got[0, len(expected) :].any()


def test_relative_position_buckets_are_the_official_ones() -> None:
    data = tensors("t5_cases")
    attention = parity.official_text_encoder().encoder.block[0].layer[0].SelfAttention
    got = attention._relative_position_bucket(data["bucket.distance"])
    assert torch.equal(got, data["bucket.index"])


def test_image_encoder_gives_the_official_features() -> None:
    data = tensors("clip_cases")
    got = encode_pixels(parity.official_image_encoder(), data["direct.pixel_values"])
    assert relative_error(got, data["direct.features"]) <= TOLERANCE["clip"]


@pytest.mark.parametrize("pair", golden()["clip"]["pairs"], ids=lambda pair: pair["first"])
def test_image_embeds_of_a_pair_are_the_official_ones(pair: dict[str, str]) -> None:
    data, config = tensors("clip_cases"), parity.image_encoder_config()
    images = (parity.frames_tensor(data[pair["first"]]), parity.frames_tensor(data[pair["last"]]))
    pixels = torch.cat([clip_pixels(image, config) for image in images])
    assert relative_error(pixels, data[pair["pixel_values"]]) <= TOLERANCE["clip_pixel_values"]
    got = embed_images(parity.official_image_encoder(), images, config)
    assert relative_error(got[0], data[pair["features"]].flatten(0, 1)) <= TOLERANCE["clip"]


@pytest.mark.parametrize(
    "row", golden()["scheduler"]["table"], ids=lambda r: f"{r['solver']}-{r['steps']}-{r['shift']}"
)
def test_schedule_is_the_official_one(row: dict[str, Any]) -> None:
    scheduler = Scheduler(row["steps"], row["shift"], solver=row["solver"])
    assert scheduler.timesteps.tolist() == row["timesteps"]
    assert scheduler.sigmas.tolist() == row["sigmas"]


@pytest.mark.parametrize("case", golden()["scheduler"]["trajectories"], ids=lambda case: case["samples"])
def test_solver_follows_the_official_trajectory(case: dict[str, Any]) -> None:
    functions = {
        "linear": lambda x, t: 0.7 * x - 0.4 * (t / 1000),
        "tanh": lambda x, t: 0.9 * torch.tanh(x) + 0.3 * math.cos(math.pi * t / 1000) - 0.2 * x,
    }
    data = tensors("scheduler_cases")
    scheduler = Scheduler(case["steps"], case["shift"], solver=case["solver"])
    sample, expected = data["start"], data[case["samples"]]
    for index in range(case["steps"]):
        velocity = functions[case["function"]](sample, int(scheduler.timesteps[index]))
        sample = scheduler.step(velocity, index, sample)
        assert relative_error(sample, expected[index + 1]) <= TOLERANCE["scheduler_trajectories"]


@pytest.mark.parametrize("case", golden()["conditioning"]["cases"], ids=lambda case: case["name"])
def test_condition_is_the_official_mask_and_latents(case: dict[str, Any]) -> None:
    """From the official fitted frames on: how a picture of another size is fitted is where we differ on purpose."""
    data, name = tensors("conditioning_cases"), case["name"]
    images = (data[f"{name}.video_first"], data[f"{name}.video_last"])
    condition = encode_condition(parity.official_vae(), images, case["frame_num"])
    assert torch.equal(condition[0, :4], data[f"{name}.mask"])
    assert relative_error(condition[0], data[f"{name}.y"]) <= TOLERANCE["conditioning_y"]


def test_mask_of_81_frames_is_the_official_one() -> None:
    expected = tensors("conditioning_cases")["mask81"]
    assert torch.equal(frame_mask(81, torch.zeros(1, 16, *expected.shape[1:]))[0], expected)


@pytest.mark.parametrize(("given", "cleaned"), golden()["prompt_clean"]["pairs"])
def test_prompt_is_cleaned_as_official(given: str, cleaned: str) -> None:
    assert clean_prompt(given) == cleaned


def run_end_to_end(case: dict[str, Any]) -> tuple[list[Denoised], Tensor]:
    """Sample `case` from its stored pictures and token ids; return the state after each step, and the condition."""
    source = tensors(case["conditioning_from"])
    text_encoder, net = parity.official_text_encoder(), parity.official_transformer()
    pictures = tuple(parity.frames_tensor(source[name]) for name in ("first", "last"))
    image_embeds = embed_images(parity.official_image_encoder(), pictures, parity.image_encoder_config())
    condition = encode_condition(
        parity.official_vae(), (source["video_first"], source["video_last"]), case["frame_num"]
    )
    contexts = [
        net.context_embedder(
            embed_prompt(text_encoder, Tokens(source[name].unsqueeze(0), cut=0), length=TEXT_TOKENS), image_embeds
        )
        for name in ("prompt_ids", "negative_ids")
    ]
    scheduler = Scheduler(case["steps"], case["shift"], solver=case["solver"])
    modulations = net.context_embedder.modulations(scheduler.timesteps)
    guided = Guided(net.transformer, condition, modulations, contexts[0], contexts[1], case["guide"])
    noise = initial_noise(case["seed"], tuple(case["lat_shape"]))
    return list(denoise(guided, scheduler, noise, EveryStep())), condition


@pytest.mark.parametrize("case", golden()["e2e"], ids=lambda case: case["file"])
def test_a_whole_run_gives_the_official_latents_and_frames(case: dict[str, Any]) -> None:
    data, source = tensors(case["file"]), tensors(case["conditioning_from"])
    assert torch.equal(initial_noise(case["seed"], tuple(case["lat_shape"]))[0], data["noise"])
    states, condition = run_end_to_end(case)
    assert relative_error(condition[0], source["y"]) <= TOLERANCE["conditioning_y"]
    assert [state.done for state in states] == list(range(1, case["steps"] + 1))
    for state, expected in zip(states, data["latents"], strict=True):
        assert relative_error(state.latents[0], expected) <= TOLERANCE["e2e_latents"]
    video = torch.cat(list(parity.official_vae().decode(states[-1].latents)), dim=2)[0].clamp(-1, 1)
    bound = TOLERANCE["e2e_video_float16" if data["video"].dtype == torch.float16 else "e2e_video"]
    assert float((video - data["video"].float()).abs().max()) <= float(str(bound).split()[-1])
    if "frames_uint8" in data:
        difference = torch.from_numpy(to_uint8(video)).int() - data["frames_uint8"].int()
        assert int(difference.abs().max()) <= 1


def test_official_sizes_and_counts_follow_from_our_geometry() -> None:
    for row in golden()["geometry"]["table"]:
        geometry = Geometry(Size(height=row["height"], width=row["width"]), row["frame_num"])
        latent = geometry.latent_size
        assert (latent.height, latent.width) == (row["lat_h"], row["lat_w"])
        if row["frame_num"] % 4 == 1:
            assert row["noise_shape"] == [16, geometry.latent_frames, latent.height, latent.width]
            assert geometry.tokens == row["seq_len"]
