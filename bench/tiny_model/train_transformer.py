"""Trains the transformer by flow matching on cached latents: v = noise - x0 at (1 - sigma) * x0 + sigma * noise.

A second stage teaches the finished model what guidance is worth: with a prompt it predicts its own answer to the
negative prompt and only `prompt_share` of the way from there, so that guidance 1 / `prompt_share` draws what it learnt.
"""

import copy
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from bench.tiny_model.encoders import Encoders
from bench.tiny_model.log import Log
from bench.tiny_model.optimizer import Average, build_optimizers, learning_rate
from bench.tiny_model.pools import Batch, Pool, Store
from bench.tiny_model.state import TrainingState
from bench.tiny_model.transformer import (
    FramesRope,
    ShortCrossAttention,
    Texts,
    choose_frames,
    halve_projections,
    shorten_text,
    weaken_text,
)

INNER_FRAMES = 3
TIMESTEPS = 1000
GOLDEN = 0.6180339887498949
VALIDATION_SIGMAS = (0.95, 0.7, 0.4, 0.15)
DEFAULT_GUIDANCE = 5.0
"""The endpoint's; a model that learnt captions as they are overdraws with it."""


@dataclass(frozen=True)
class Settings:
    """How the transformer is trained, by default on a CPU.

    mixture: the groups' shares of steps, from a progress in [0, 1] on.
    """

    seconds: float  # of everything, reports and loading of new clips too
    peak_rate: float = 8e-3
    hold: float = 0.45
    weight_decay: float = 0.05
    tokens_per_batch: int = 3840
    sigma_shift: float = 5.0
    drop_share: float = 0.12
    noise_share: float = 0.10
    text_weight: float = 0.1
    ends_weight: float = 4.0  # two frames of many, and the ones that have to be right
    average_decay: float = 0.997
    report_seconds: float = 120.0
    warmup_steps: int = 100
    device: str = "cpu"
    half: bool = False
    mixture: tuple[tuple[float, tuple[float, float, float, float]], ...] = field(
        default=((0.0, (0.15, 0.45, 0.35, 0.05)), (0.4, (0.05, 0.25, 0.5, 0.2)), (0.8, (0.02, 0.18, 0.5, 0.3)))
    )
    sparse: tuple[tuple[float, float], ...] = ((0.0, 1.0), (0.65, 0.1))
    """From a progress on: the share of steps on only the first, the last and `INNER_FRAMES` other latent frames."""
    stage: Literal["transformer", "guidance"] = "transformer"
    prompt_share: float = 1.0

    @classmethod
    def on_card(cls, seconds: float, device: str, *, half: bool) -> "Settings":
        """Return settings for a GPU: whole clips in large batches, the offered canvases nearly from the start."""
        mixture = ((0.0, (0.45, 0.45, 0.1, 0.0)), (0.08, (0.1, 0.25, 0.6, 0.05)), (0.3, (0.04, 0.11, 0.6, 0.25)))
        return cls(
            seconds,
            tokens_per_batch=65_536,
            sigma_shift=3.0,
            average_decay=0.998,
            report_seconds=30.0,
            warmup_steps=200,
            device=device,
            half=half,
            mixture=mixture,
            sparse=((0.0, 0.0),),
        )

    def for_guidance(self) -> "Settings":
        """Return settings for the stage after: short, gentle, on clips as they are at the end of the training."""
        return replace(
            self,
            stage="guidance",
            prompt_share=1 / DEFAULT_GUIDANCE,
            peak_rate=self.peak_rate / 5,
            hold=0.0,
            mixture=((0.0, self.mixture[-1][1]),),
            sparse=((0.0, self.sparse[-1][1]),),
        )


def pick_frames(latent_frames: int, rng: np.random.Generator) -> Tensor:
    """Draw the first, the last and a few latent frames between."""
    inner = rng.choice(np.arange(1, latent_frames - 1), min(INNER_FRAMES, latent_frames - 2), replace=False)
    return torch.tensor([0, *sorted(inner.tolist()), latent_frames - 1])


def train(
    model: WanTransformer3DModel, settings: Settings, folder: Path, cache: Path, encoders: Encoders, log: Log
) -> WanTransformer3DModel:
    """Train from where it stands and return the averaged weights; skips a finished training."""
    done, partial = folder / f"{settings.stage}.pt", folder / f"{settings.stage}_partial.pt"
    if done.exists():
        model.load_state_dict(torch.load(done, weights_only=True, map_location="cpu"))
        return model
    model.to(settings.device)
    store = Store(cache, encoders, settings.device)
    validation = Store(folder / "validation", encoders, settings.device)
    frozen = copy.deepcopy(model).requires_grad_(False) if settings.prompt_share < 1 else None
    trainer = Trainer.of(model, settings, store, validation)
    if frozen is not None:
        trainer.teacher = Trainer.of(frozen, settings, store, validation)
        weaken_text(model, settings.prompt_share)  # most of the way
    if settings.half and settings.device == "cpu":
        for block in model.blocks:  # the teacher's not: that would take minutes to compile, again
            block.compile(dynamic=True)
    optimizers = build_optimizers(*_split(model), settings.peak_rate, settings.weight_decay)
    state = TrainingState(model, Average(model, settings.average_decay), optimizers)
    if partial.exists():
        state.restore(partial)
    log.write(f"{settings.stage} {sum(p.numel() for p in model.parameters())} parameters {settings}")
    _loop(trainer, state, partial, log)
    model.load_state_dict(state.average.weights)
    torch.save(model.state_dict(), done)
    return model


def _loop(trainer: "Trainer", state: TrainingState, partial: Path, log: Log) -> None:
    settings = trainer.settings
    while not (clips := trainer.store.refresh()):
        time.sleep(1)  # another process is still making the first of them
    next_report = state.seconds + settings.report_seconds
    running = torch.zeros((), device=settings.device)
    first = state.step
    while state.seconds < settings.seconds:
        start = time.perf_counter()
        progress = state.seconds / settings.seconds
        state.set_rate(learning_rate(progress, state.step, settings.peak_rate, settings.hold, settings.warmup_steps))
        loss = trainer.loss(state.step, progress)
        state.descend(loss)
        running += loss.detach()  # read only when it is told: reading waits for the device
        elapsed = state.seconds + time.perf_counter() - start
        if elapsed >= next_report or elapsed >= settings.seconds:
            next_report += settings.report_seconds
            figures = trainer.validate(state.average)
            mean = running.item() / (state.step - first)
            log.write(f"{settings.stage} {elapsed:.0f} s step {state.step} clips {clips} loss {mean:.4f} | {figures}")
            running.zero_()
            first, clips = state.step, trainer.store.refresh()
            state.save(partial)
        state.seconds += time.perf_counter() - start


@dataclass
class Trainer:
    """The model with what a loss needs."""

    model: WanTransformer3DModel
    processor: ShortCrossAttention
    rope: FramesRope
    settings: Settings
    store: Store
    validation: Store
    teacher: "Trainer | None" = None

    @classmethod
    def of(cls, model: WanTransformer3DModel, settings: Settings, store: Store, validation: Store) -> "Trainer":
        """Give a plain model what training needs: short texts, chosen frames, fast projections where asked for."""
        if settings.half and settings.device == "cpu":
            halve_projections(model)
        return cls(model, shorten_text(model), choose_frames(model), settings, store, validation)

    def loss(self, step: int, progress: float) -> Tensor:
        """Return the flow-matching loss of one batch drawn by `step`."""
        settings, rng = self.settings, np.random.default_rng((step, 11))
        pool = self.store.draw(rng, [shares for start, shares in settings.mixture if progress >= start][-1])
        sparse = [share for start, share in settings.sparse if progress >= start][-1]
        frames = pick_frames(pool.x_NCTHW.shape[2], rng) if rng.random() < sparse else None
        rows = self._rows(pool, frames, rng)
        texts, prompted_B = self._texts(pool, rows, rng)
        batch = pool.batch(rows, texts, frames)
        # low-discrepancy sigmas: every step sees the whole range, however small the batch
        u = (rng.random() + np.arange(len(rows)) / len(rows) + step * GOLDEN) % 1.0
        sigma = torch.from_numpy(settings.sigma_shift * u / (1 + (settings.sigma_shift - 1) * u)).float()
        noise = torch.randn_like(batch.x_BCTHW)
        target = noise - batch.x_BCTHW
        if self.teacher is not None:
            negative = pool.captions.texts(rows, self.store.negative, torch.ones_like(prompted_B))
            without = self.teacher.answer(replace(batch, texts=negative), sigma, noise, frames)
            weakened = torch.lerp(without, target, settings.prompt_share)
            target = torch.where(prompted_B.to(target.device).view(-1, 1, 1, 1, 1), weakened, target)
        # while motion is still unlearnt a prompt is only noise: left alone, attention leaves the text for good
        # (a sum that needs gradients from the first block on: else torch would compile the first one apart)
        self.processor.starved = torch.zeros((), device=settings.device, requires_grad=True).clone()
        self.rope.frames = frames
        loss = self.error(batch, sigma, noise, target, settings.ends_weight).mean()
        starved, self.rope.frames, self.processor.starved = self.processor.starved, None, None
        return loss + settings.text_weight * starved / len(self.model.blocks)

    def error(self, batch: Batch, sigma_B: Tensor, noise: Tensor, target: Tensor, ends_weight: float = 1.0) -> Tensor:
        """Return the squared error of the predicted velocity for each clip; its ends count so much more."""
        squared_BT = (self.velocity(batch, sigma_B, noise) - target).square().mean((1, 3, 4))
        weight_T = torch.ones_like(squared_BT[0])
        weight_T[[0, -1]] = ends_weight
        return squared_BT @ weight_T / weight_T.sum()

    @torch.no_grad()
    def answer(self, batch: Batch, sigma_B: Tensor, noise: Tensor, frames: Tensor | None) -> Tensor:
        """Return the velocity as a teacher gives it."""
        self.rope.frames = frames
        return self.velocity(batch, sigma_B, noise)

    def velocity(self, batch: Batch, sigma_B: Tensor, noise: Tensor) -> Tensor:
        """Return the predicted velocity [B, C, T, H, W] in float32 for clips with so much noise."""
        device = self.settings.device
        self.processor.bias = batch.texts.bias
        noisy = torch.lerp(batch.x_BCTHW, noise, sigma_B.to(device).view(-1, 1, 1, 1, 1))
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=self.settings.half and device != "cpu"):
            predicted: Tensor = self.model(
                hidden_states=torch.cat((noisy, batch.condition_BCTHW), 1),
                timestep=(sigma_B * TIMESTEPS).floor().to(device),
                encoder_hidden_states=batch.texts.embeds,
                encoder_hidden_states_image=batch.images_BND.flatten(0, 1),
                return_dict=False,
            )[0]
        return predicted.float()

    def _rows(self, pool: Pool, frames: Tensor | None, rng: np.random.Generator) -> Tensor:
        """Draw clips of a pool, as many as fit into a batch; what moves is drawn more often."""
        tokens = pool.tokens if frames is None else pool.tokens * len(frames) // pool.x_NCTHW.shape[2]
        fitting = max(1, round(self.settings.tokens_per_batch / tokens))
        likely = pool.likely_N / pool.likely_N.sum()
        return torch.from_numpy(rng.choice(len(pool), min(fitting, len(pool)), replace=False, p=likely))

    def _texts(self, pool: Pool, rows: Tensor, rng: np.random.Generator) -> tuple[Texts, Tensor]:
        """Return the captions; now and then all of them among unrelated words, or some as the negative prompt or none.

        Also returns which [B] are prompts. Long ones come in batches of their own, since every text is padded to the
        longest.
        """
        settings, drawn = self.settings, rng.random()
        if drawn < settings.noise_share:
            return pool.noisy.texts(rows), torch.ones(len(rows), dtype=torch.bool)
        negative = drawn < settings.noise_share + settings.drop_share
        other = self.store.negative if negative else self.store.empty
        dropped = torch.from_numpy(rng.random(len(rows)) < (0.5 if negative else settings.drop_share / 2))
        return pool.captions.texts(rows, other, dropped), ~dropped

    @torch.no_grad()
    def validate(self, average: Average) -> str:
        """Return the averaged weights' loss at a few noise levels, by size, then with other clips' prompts at one."""
        self.validation.refresh()
        current = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        self.model.load_state_dict(average.weights)
        words = []
        for group, pools in self.validation.groups().items():
            if not pools:
                continue
            values = [
                torch.cat([self._validated(pool, level, index) for pool in pools]).mean().item()
                for index, level in enumerate(VALIDATION_SIGMAS)
            ]
            wrong = torch.cat([self._validated(pool, VALIDATION_SIGMAS[0], 0, shifted=1) for pool in pools])
            words.append(f"{group} " + "/".join(f"{value:.3f}" for value in values) + f" ({wrong.mean().item():.3f})")
        self.model.load_state_dict(current)
        return " ".join(words)

    def _validated(self, pool: Pool, level: float, index: int, shifted: int = 0) -> Tensor:
        """Return the errors of a pool's clips at a noise level; shifted: by how many rows captions are moved."""
        rows = torch.arange(len(pool))
        batch = pool.batch(rows, pool.captions.texts(rows.roll(shifted)))
        noise = torch.randn(batch.x_BCTHW.shape, generator=torch.Generator().manual_seed(index))
        noise = noise.to(batch.x_BCTHW.device)
        return self.error(batch, torch.full((len(pool),), level), noise, noise - batch.x_BCTHW)


def _split(model: WanTransformer3DModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Separate the blocks' matrices for Muon from everything else."""
    matrices, others = [], []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            (matrices if weight.ndim == 2 and name.startswith("blocks.") else others).append(weight)
    return matrices, others
