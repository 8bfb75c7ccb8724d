from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import parity
from wan_local.acceleration import Called, EveryStep
from wan_local.decode import _without_excess, decode_frames
from wan_local.denoise import Guided, denoise
from wan_local.errors import NumericalError
from wan_local.geometry import Geometry, Size
from wan_local.models.transformer import ContextKV
from wan_local.preview import fit_latent_to_rgb, to_uint8
from wan_local.scheduler import Scheduler, Solver

LATENTS = (1, 16, 3, 4, 6)


def make_guided(guide_scale: float, *, negative: bool) -> Guided:
    net = parity.official_transformer()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 20, 48, generator=generator)

    def context() -> list[ContextKV]:
        return net.context_embedder(torch.randn(1, 512, 32, generator=generator), images)

    condition = torch.randn(1, 20, *LATENTS[2:], generator=generator)
    modulations = net.context_embedder.modulations(torch.arange(1001))
    return Guided(net.transformer, condition, modulations, context(), context() if negative else None, guide_scale)


def test_guidance_is_unconditional_plus_scale_times_difference() -> None:
    guided = make_guided(3.0, negative=True)
    assert guided.negative_context is not None
    latents, modulation = torch.randn(LATENTS), guided.modulations[500.0]
    noise_pred, conditional = guided.predict(latents, 500)
    inputs = torch.cat((latents, guided.condition), dim=1)
    [v_u] = guided.transformer(inputs, modulation, [guided.negative_context])
    [v_c] = guided.transformer(inputs, modulation, [guided.context])
    assert torch.equal(conditional, v_c)
    assert torch.equal(noise_pred, v_u + 3.0 * (v_c - v_u))
    together, _ = replace(guided, together=True).predict(latents, 500)
    assert torch.equal(together, noise_pred)


class OnCard:
    """Stands for a tensor on a card: nothing can be done with it but bring it to the CPU."""

    def __init__(self, on_cpu: Tensor) -> None:
        self._on_cpu, self.device = on_cpu, torch.device("meta")

    def cpu(self) -> Tensor:
        return self._on_cpu


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_a_cards_steps_are_made_on_the_cpu_and_brought_back(solver: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system of two equations on a card would load a library that no plan counts."""
    here, of_card = Scheduler(4, 5.0, solver=solver), Scheduler(4, 5.0, solver=solver)
    moved, to = list[tuple[Tensor, torch.device]](), Tensor.to

    def recorded(tensor: Tensor, *where: Any, **how: Any) -> Tensor:
        if where != (torch.device("meta"),):
            return to(tensor, *where, **how)
        moved.append((tensor, where[0]))
        return tensor

    latents, generator = torch.ones(LATENTS), torch.Generator().manual_seed(0)
    for index in range(4):
        velocity = torch.randn(LATENTS, generator=generator)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "to", recorded)
            of_card.step(cast(Tensor, OnCard(velocity)), index, cast(Tensor, OnCard(latents)))
        latents = here.step(velocity, index, latents)
        assert torch.equal(moved[-1][0], latents)
    assert len(moved) == 4


def test_without_a_negative_context_the_transformer_runs_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    guided = make_guided(1.0, negative=False)
    calls = []
    forward = guided.transformer.forward
    monkeypatch.setattr(guided.transformer, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    states = list(denoise(guided, Scheduler(4, 5.0), torch.randn(LATENTS), EveryStep()))
    assert len(calls) == len(states) == 4
    assert [state.calls for state in states] == [1, 2, 3, 4]


def test_merged_steps_count_as_done_and_not_as_calls() -> None:
    class EveryOther(EveryStep):
        def points_to_merge(self, called: Called, sigmas: Tensor, index: int) -> int:
            return int(index + 2 < len(sigmas) - 1)

    states = list(denoise(make_guided(1.0, negative=False), Scheduler(9, 5.0), torch.randn(LATENTS), EveryOther()))
    assert [state.done for state in states] == [2, 4, 6, 8, 9]
    assert states[-1].calls == 5 and states[-1].total == 9


def test_a_reused_velocity_is_a_step_without_a_call() -> None:
    class Second(EveryStep):
        last: Tensor

        def reuse(self, latents: Tensor, sigmas: Tensor, index: int) -> Tensor | None:  # type: ignore[override]
            return self.last if index % 2 else None

        def points_to_merge(self, called: Called, sigmas: Tensor, index: int) -> int:
            self.last = called.noise_pred
            return 0

    states = list(denoise(make_guided(1.0, negative=False), Scheduler(5, 5.0), torch.randn(LATENTS), Second()))
    assert [state.done for state in states] == [1, 2, 3, 4, 5]
    assert [state.calls for state in states] == [1, 1, 2, 2, 3]


def test_the_last_steps_clean_prediction_is_the_result() -> None:
    states = list(denoise(make_guided(1.0, negative=False), Scheduler(3, 5.0), torch.randn(LATENTS), EveryStep()))
    assert parity.relative_error(states[-1].clean, states[-1].latents) < 1e-5


def test_nan_ends_the_run_with_the_step_it_came_in(monkeypatch: pytest.MonkeyPatch) -> None:
    guided = make_guided(1.0, negative=False)
    forward, calls = guided.transformer.forward, []

    def broken(*args: Any, **kwargs: Any) -> list[Tensor]:
        calls.append(1)
        return [velocity * (math.nan if len(calls) == 3 else 1.0) for velocity in forward(*args, **kwargs)]

    monkeypatch.setattr(guided.transformer, "forward", broken)
    with pytest.raises(NumericalError, match=r"step 3 of 5 .*linears stay bfloat16 on a card"):
        list(denoise(guided, Scheduler(5, 5.0), torch.randn(LATENTS), EveryStep()))


@pytest.mark.parametrize(("num_frames", "latent_frames"), [(81, 21), (82, 22), (84, 22), (100, 26)])
def test_decoding_gives_exactly_the_frames_asked_for_and_keeps_both_ends(num_frames: int, latent_frames: int) -> None:
    geometry = Geometry(Size(32, 48), num_frames)
    latents = torch.randn(1, 16, latent_frames, 4, 6, generator=torch.Generator().manual_seed(1))
    vae = parity.official_vae()
    frames = np.concatenate([decoded.frames for decoded in decode_frames(vae, latents, geometry)])
    whole = to_uint8(torch.cat(list(vae.decode(latents)), dim=2)[0])
    assert frames.shape == (num_frames, 32, 48, 3) and len(whole) == geometry.generated_frames
    assert np.array_equal(frames[0], whole[0]) and np.array_equal(frames[-1], whole[-1])


def test_the_frame_dropped_is_the_one_whose_neighbours_agree() -> None:
    frames = np.zeros((85, 2, 2, 3), np.uint8)
    for index in range(85):
        frames[index] = (index * 2) % 256
    frames[31:] -= 4  # frames 29 and 31 now look alike
    kept = np.concatenate([part.frames for part in _without_excess(frames, 84)])
    assert np.array_equal(kept, np.delete(frames, 30, axis=0))


def test_nan_while_decoding_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.full((1, 16, 2, 4, 6), math.nan)
    with pytest.raises(NumericalError, match="decoding"):
        list(decode_frames(parity.official_vae(), latents, Geometry(Size(32, 48), 5)))


def test_preview_maps_the_two_known_frames_back_to_themselves() -> None:
    generator = torch.Generator().manual_seed(3)
    colours = torch.rand(3, 2, 12, 16, generator=generator) * 2 - 1
    images = tuple(colours[:, index].repeat_interleave(8, 1).repeat_interleave(8, 2) for index in (0, 1))
    mixing = torch.randn(16, 3, generator=generator)
    ends = torch.einsum("cr,rthw->cthw", mixing, colours)
    latents = torch.cat((ends[:, :1], ends.mean(1, keepdim=True), ends[:, 1:]), dim=1).unsqueeze(0)
    picture = fit_latent_to_rgb(latents, images).picture(latents)
    expected = to_uint8(colours.mean(1).repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1))[0]
    assert picture.shape == expected.shape == (96, 128, 3) and picture.dtype == np.uint8
    centres = (slice(4, None, 8), slice(4, None, 8))
    assert np.abs(picture[centres].astype(int) - expected[centres]).mean() < 12


def test_pixels_are_clamped_and_rounded() -> None:
    video = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]).view(1, 6, 1, 1).expand(3, -1, -1, -1)
    assert to_uint8(video)[:, 0, 0, 0].tolist() == [0, 0, 128, 191, 255, 255]
