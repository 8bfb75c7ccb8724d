"""Trains the transformer by flow matching on cached latents: v = noise - x0 at (1 - sigma) * x0 + sigma * noise."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from bench.tiny_model.cache import Shard, load_shard
from bench.tiny_model.encoders import Encoders, noisy_caption
from bench.tiny_model.log import Log
from bench.tiny_model.optimizer import Average, build_optimizers, learning_rate
from bench.tiny_model.sentences import DEFAULT_NEGATIVE_PROMPT, sentence
from bench.tiny_model.state import TrainingState
from bench.tiny_model.transformer import FramesRope, ShortCrossAttention, choose_frames, shorten_text, stack_texts

Group = str
GROUPS: tuple[Group, ...] = ("short", "small", "480p", "720p")
STANDARD_LATENT_FRAMES = 21
INNER_FRAMES = 3
REST_SHARE = 0.03
"""Added to a clip's motion for its chance to be drawn: clips that a cross-fade explains teach little but must stay."""
TIMESTEPS = 1000
GOLDEN = 0.6180339887498949
VALIDATION_SIGMAS = (0.95, 0.7, 0.4, 0.15)


@dataclass(frozen=True)
class Settings:
    """How the transformer is trained; `mixture` gives the groups' shares of steps from a progress in [0, 1] on."""

    seconds: float
    peak_rate: float = 4e-3
    hold: float = 0.45
    weight_decay: float = 0.05
    tokens_per_batch: int = 1900
    sigma_shift: float = 5.0
    drop_share: float = 0.12
    noise_share: float = 0.10
    text_weight: float = 0.1
    average_decay: float = 0.99
    report_seconds: float = 120.0
    warmup_steps: int = 60
    device: str = "cpu"
    half: bool = False
    mixture: tuple[tuple[float, tuple[float, float, float, float]], ...] = field(
        default=((0.0, (0.2, 0.5, 0.2, 0.1)), (0.5, (0.1, 0.4, 0.3, 0.2)), (0.8, (0.05, 0.25, 0.35, 0.35)))
    )
    sparse: tuple[tuple[float, float], ...] = ((0.0, 1.0), (0.6, 0.1))
    """From a progress on: the share of steps on only the first, the last and `INNER_FRAMES` other latent frames."""


@dataclass(frozen=True)
class Batch:
    """Model inputs apart from the noise; `x` are clean latents, `condition` 4 mask and 16 latent channels."""

    x_BCTHW: Tensor
    condition_BCTHW: Tensor
    images_BND: Tensor
    prompts: list[str]


class Store:
    """Shards in memory by shape; shards that appear on disk while training runs are picked up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: set[Path] = set()
        self.shards: dict[Group, list[Shard]] = {group: [] for group in GROUPS}

    def refresh(self) -> int:
        """Load new shards and return the number of clips at hand."""
        for path in sorted(set(self.folder.glob("*.pt")) - self.seen):
            self.seen.add(path)
            shard = load_shard(path)
            self.shards[group_of(shard)].append(shard)
        return sum(len(shard) for shards in self.shards.values() for shard in shards)

    def draw(self, rng: np.random.Generator, shares: tuple[float, ...]) -> Shard:
        """Draw a shard by group, then by its number of clips."""
        weights = np.array([s if self.shards[g] else 0.0 for g, s in zip(GROUPS, shares, strict=True)])
        if weights.sum() == 0:
            weights = np.array([1.0 if self.shards[g] else 0.0 for g in GROUPS])
        shards = self.shards[GROUPS[int(rng.choice(len(GROUPS), p=weights / weights.sum()))]]
        sizes = np.array([len(shard) for shard in shards], dtype=float)
        return shards[int(rng.choice(len(shards), p=sizes / sizes.sum()))]


def group_of(shard: Shard) -> Group:
    """Sort a shard by length and area: the offered canvases have about 7,000 and 17,000 pixels."""
    frames, height, width = shard.x_NCTHW.shape[2:]
    if frames < STANDARD_LATENT_FRAMES:
        return "short"
    if height * width < 80:
        return "small"
    return "480p" if height * width < 160 else "720p"


def motion(shard: Shard) -> np.ndarray:
    """Return how far each clip's latents are from a cross-fade of its ends (mean square, latents have variance one)."""
    if shard.motion_N is None:
        x = shard.x_NCTHW.float()
        weight = torch.linspace(0, 1, x.shape[2]).view(1, 1, -1, 1, 1)
        fade = torch.lerp(x[:, :, :1], x[:, :, -1:], weight)
        shard.motion_N = (x - fade).square().mean((1, 2, 3, 4)).double().numpy()
    return shard.motion_N


def pick_frames(latent_frames: int, rng: np.random.Generator) -> Tensor:
    """Draw the first, the last and a few latent frames between."""
    inner = rng.choice(np.arange(1, latent_frames - 1), min(INNER_FRAMES, latent_frames - 2), replace=False)
    return torch.tensor([0, *sorted(inner.tolist()), latent_frames - 1])


def make_batch(shard: Shard, rows: list[int], frames: Tensor | None = None) -> Batch:
    """Put the mask channels before the condition's latents and both images' states one after the other.

    With `frames` only those latent frames are kept; they include the first and the last one.
    """
    x, y = shard.x_NCTHW[rows], shard.y_NCTHW[rows]
    if frames is not None:
        x, y = x[:, :, frames], y[:, :, frames]
    x, y = x.float(), y.float()
    mask = torch.zeros(len(rows), 4, *x.shape[2:])
    mask[:, :, 0] = 1
    mask[:, 3, -1] = 1
    return Batch(x, torch.cat((mask, y), 1), shard.images_NKLD[rows].float(), [shard.captions[row] for row in rows])


def train(
    model: WanTransformer3DModel, settings: Settings, folder: Path, cache: Path, encoders: Encoders, log: Log
) -> WanTransformer3DModel:
    """Train from where it stands and return the averaged weights; skips a finished training."""
    done, partial = folder / "transformer.pt", folder / "transformer_partial.pt"
    if done.exists():
        model.load_state_dict(torch.load(done, weights_only=True))
        return model
    model.to(settings.device)
    processor = shorten_text(model)
    optimizers = build_optimizers(*_split(model), settings.peak_rate, settings.weight_decay)
    state = TrainingState(model, Average(model, settings.average_decay), optimizers)
    if partial.exists():
        state.restore(partial)
    log.write(f"transformer {sum(p.numel() for p in model.parameters())} parameters {settings}")
    trainer = Trainer(model, processor, choose_frames(model), settings, encoders)
    _loop(trainer, state, Store(cache), Store(folder / "validation"), partial, log)
    model.load_state_dict(state.average.weights)
    torch.save(model.state_dict(), done)
    return model


def _loop(trainer: "Trainer", state: TrainingState, store: Store, validation: Store, partial: Path, log: Log) -> None:
    settings = trainer.settings
    clips, next_report, running = store.refresh(), state.seconds + settings.report_seconds, []
    while state.seconds < settings.seconds:
        start = time.perf_counter()
        progress = state.seconds / settings.seconds
        state.set_rate(learning_rate(progress, state.step, settings.peak_rate, settings.hold, settings.warmup_steps))
        loss = trainer.loss(store, state.step, progress)
        state.descend(loss)
        running.append(loss.item())
        state.seconds += time.perf_counter() - start
        if state.seconds >= next_report or state.seconds >= settings.seconds:
            next_report += settings.report_seconds
            figures = trainer.validate(validation, state.average)
            head = f"transformer {state.seconds:.0f} s step {state.step} clips {clips} loss {np.mean(running):.4f}"
            log.write(f"{head} | {figures}")
            running, clips = [], store.refresh()
            state.save(partial)


@dataclass
class Trainer:
    """The model with what a loss needs."""

    model: WanTransformer3DModel
    processor: ShortCrossAttention
    rope: FramesRope
    settings: Settings
    encoders: Encoders

    def loss(self, store: Store, step: int, progress: float) -> Tensor:
        """Return the flow-matching loss of one batch drawn by `step`."""
        rng = np.random.default_rng((step, 11))
        shares = [shares for start, shares in self.settings.mixture if progress >= start][-1]
        shard = store.draw(rng, shares)
        sparse = [share for start, share in self.settings.sparse if progress >= start][-1]
        frames = pick_frames(shard.x_NCTHW.shape[2], rng) if rng.random() < sparse else None
        batch = make_batch(shard, self._rows(shard, frames, rng), frames)
        rows = batch.prompts
        prompts = [self._corrupt(text, rng) for text in batch.prompts]
        # low-discrepancy sigmas: every step sees the whole range, however small the batch
        u = (rng.random() + np.arange(len(rows)) / len(rows) + step * GOLDEN) % 1.0
        shift = self.settings.sigma_shift
        sigma = torch.from_numpy(shift * u / (1 + (shift - 1) * u)).float()
        noise = torch.randn(batch.x_BCTHW.shape, generator=torch.Generator().manual_seed(step))
        # while motion is still unlearnt a prompt is only noise: left alone, attention leaves the text for good
        starved: list[Tensor] = []
        self.processor.starved = starved
        self.rope.frames = frames
        loss = self.error(batch, prompts, sigma, noise).mean()
        self.rope.frames = self.processor.starved = None
        return loss + self.settings.text_weight * torch.stack(starved).mean()

    def error(self, batch: Batch, prompts: list[str], sigma_B: Tensor, noise: Tensor) -> Tensor:
        """Return the squared error of the predicted velocity for each clip."""
        device = self.settings.device
        texts = stack_texts(self.encoders.encode_texts(prompts))
        self.processor.bias = texts.bias.to(device)
        sigma = sigma_B.view(-1, 1, 1, 1, 1)
        noisy = torch.lerp(batch.x_BCTHW, noise, sigma)
        timestep = (sigma_B * TIMESTEPS).floor().to(device)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=self.settings.half):
            velocity = self.model(
                hidden_states=torch.cat((noisy, batch.condition_BCTHW), 1).to(device),
                timestep=timestep,
                encoder_hidden_states=texts.embeds.to(device),
                encoder_hidden_states_image=batch.images_BND.flatten(0, 1).to(device),
                return_dict=False,
            )[0].float()
        return (velocity - (noise - batch.x_BCTHW).to(device)).square().mean((1, 2, 3, 4))

    def _rows(self, shard: Shard, frames: Tensor | None, rng: np.random.Generator) -> list[int]:
        """Draw clips of a shard, as many as fit into a batch."""
        count, height, width = shard.x_NCTHW.shape[2:]
        tokens = (count if frames is None else len(frames)) * (height // 2) * (width // 2)
        fitting = max(1, round(self.settings.tokens_per_batch / tokens))
        likely = motion(shard) + REST_SHARE
        return rng.choice(len(shard), min(fitting, len(shard)), replace=False, p=likely / likely.sum()).tolist()

    def _corrupt(self, text: str, rng: np.random.Generator) -> str:
        """Drop the prompt (for the empty or the default negative one) or mix ordinary English into it."""
        drawn, settings = rng.random(), self.settings
        if drawn < settings.drop_share:
            return "" if rng.random() < 0.5 else DEFAULT_NEGATIVE_PROMPT
        if drawn < settings.drop_share + settings.noise_share:
            other = sentence(rng)
            return other if rng.random() < 0.4 else noisy_caption(text, rng, other)
        return text

    @torch.no_grad()
    def validate(self, store: Store, average: Average) -> str:
        """Return the averaged weights' loss at a few noise levels, by size."""
        store.refresh()
        current = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        self.model.load_state_dict(average.weights)
        words = []
        for group, shards in store.shards.items():
            if not shards:
                continue
            batches = [make_batch(shard, list(range(len(shard)))) for shard in shards]
            values = []
            for index, level in enumerate(VALIDATION_SIGMAS):
                errors = []
                for batch in batches:
                    noise = torch.randn(batch.x_BCTHW.shape, generator=torch.Generator().manual_seed(index))
                    errors.append(self.error(batch, batch.prompts, torch.full((len(noise),), level), noise))
                values.append(torch.cat(errors).mean().item())
            words.append(f"{group} " + "/".join(f"{value:.3f}" for value in values))
        self.model.load_state_dict(current)
        return " ".join(words)


def _split(model: WanTransformer3DModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Separate the blocks' matrices for Muon from everything else."""
    matrices, others = [], []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            (matrices if weight.ndim == 2 and name.startswith("blocks.") else others).append(weight)
    return matrices, others
