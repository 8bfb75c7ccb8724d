"""Trains the VAE in three stages: single images, whole clips, then the decoder alone while latents stay."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bench.tiny_model import vae as whole
from bench.tiny_model.log import Log
from bench.tiny_model.optimizer import Average, build_optimizers, learning_rate
from bench.tiny_model.photos import held_out_photos, training_photos
from bench.tiny_model.render import clip
from bench.tiny_model.scenes import KINDS
from bench.tiny_model.state import TrainingState

Stage = Literal["images", "clips", "decoder"]
ENDS_EVERY = 7
"""Every so many steps the clip is [first, grey..., last], as the pipeline's condition is."""
VALIDATION_SEED = 10**6
STANDARD_FRAMES = 81
VALIDATION_CLIPS = 12
CLIP_SHAPES = ((9, 2, 64, 64), (5, 2, 64, 64), (9, 2, 80, 48), (17, 2, 48, 48), (5, 2, 48, 64), (9, 2, 48, 64))
"""Frames, clips, width, height of the batches in turn; with one clip torch would leave oneDNN for a far slower path."""
WARMUP_STEPS = 40
MOST_STEPS = 10**6


@dataclass(frozen=True)
class Settings:
    """How one stage is trained; `seconds` is time spent in steps, evaluation not counted.

    clips_factor: how many times the clips of `CLIP_SHAPES` are in a batch. render_processes: 0 to render in between.
    """

    stage: Stage
    seconds: float
    peak_rate: float
    hold: float = 0.4
    gradient_weight: float = 0.5
    latent_weight: float = 1e-3
    average_decay: float = 0.98
    report_seconds: float = 120.0
    device: str = "cpu"
    clips_factor: int = 1
    render_processes: int = 0

    @classmethod
    def on_card(cls, stage: Stage, seconds: float, peak_rate: float, device: str, *, hold: float) -> "Settings":
        """Return settings for a GPU: larger batches, rendered by other processes meanwhile."""
        return cls(
            stage,
            seconds,
            peak_rate,
            hold=hold,
            average_decay=0.995,
            report_seconds=30.0,
            device=device,
            clips_factor=8,
            render_processes=6,
        )


def train_stage(vae: AutoencoderKLWan, settings: Settings, folder: Path, log: Log) -> AutoencoderKLWan:
    """Train one stage from where it stands and return the averaged weights; skips a finished stage."""
    done, partial = folder / f"vae_{settings.stage}.pt", folder / f"vae_{settings.stage}_partial.pt"
    if done.exists():
        vae.load_state_dict(torch.load(done, weights_only=True, map_location="cpu"))
        return vae
    vae.to(settings.device)
    if settings.stage == "decoder":
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    optimizers = build_optimizers(*_split(vae), settings.peak_rate, weight_decay=0.0)
    state = TrainingState(vae, Average(vae, settings.average_decay), optimizers)
    if partial.exists():
        state.restore(partial)
    log.write(f"vae {settings}")
    _loop(vae, settings, state, partial, log)
    vae.load_state_dict(state.average.weights)
    torch.save(vae.state_dict(), done)
    partial.unlink(missing_ok=True)
    return vae


def _loop(vae: AutoencoderKLWan, settings: Settings, state: TrainingState, partial: Path, log: Log) -> None:
    next_report = state.seconds + settings.report_seconds
    running: list[list[float]] = []
    batches = iter(DataLoader(_Batches(settings, state.step), batch_size=None, num_workers=settings.render_processes))
    while state.seconds < settings.seconds:
        start = time.perf_counter()
        progress = state.seconds / settings.seconds
        state.set_rate(learning_rate(progress, state.step, settings.peak_rate, settings.hold, WARMUP_STEPS))
        loss, terms = _loss(vae, settings, state.step, next(batches).to(settings.device))
        state.descend(loss)
        running.append(terms)
        state.seconds += time.perf_counter() - start
        if state.seconds >= next_report or state.seconds >= settings.seconds:
            next_report += settings.report_seconds
            names = ("l1", "l2", "colour", "grad", "mu2")
            losses = " ".join(
                f"{n} {v:.4f}" for n, v in zip(names, torch.tensor(running).mean(0).tolist(), strict=True)
            )
            running.clear()
            figures = " ".join(f"{n} {v:.2f}" for n, v in _validate(vae, state.average, settings).items())
            log.write(f"{settings.stage} {state.seconds:.0f} s step {state.step} {losses} | PSNR {figures}")
            state.save(partial)


class _Batches(Dataset[Tensor]):
    """The batches of the steps from `first` on."""

    def __init__(self, settings: Settings, first: int) -> None:
        self.settings, self.first = settings, first

    def __len__(self) -> int:
        return MOST_STEPS

    def __getitem__(self, index: int) -> Tensor:
        return _batch(self.settings, self.first + index)


def _loss(vae: AutoencoderKLWan, settings: Settings, step: int, x: Tensor) -> tuple[Tensor, list[float]]:
    """Return the loss of one batch and its terms."""
    if settings.stage != "images" and step % ENDS_EVERY == ENDS_EVERY - 1:
        x = ends_only(x)
    with torch.set_grad_enabled(settings.stage != "decoder"):
        mean = whole.encode(vae, x)
    error = whole.decode(vae, mean + whole.FIXED_SIGMA * torch.randn_like(mean)) - x
    l1, l2, mu2 = error.abs().mean(), error.square().mean(), mean.square().mean()
    gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    # the error of local means, which a wrong colour costs and wrong detail does not
    colour = F.avg_pool3d(error, (1, 8, 8)).abs().mean()
    loss = l1 + l2 + colour + settings.gradient_weight * gradient + settings.latent_weight * mu2
    return loss, [l1.item(), l2.item(), colour.item(), gradient.item(), mu2.item()]


def ends_only(x_BCTHW: Tensor) -> Tensor:
    """Return the clip with everything but its first and last frame replaced by mid-grey."""
    y = torch.zeros_like(x_BCTHW)
    y[:, :, 0], y[:, :, -1] = x_BCTHW[:, :, 0], x_BCTHW[:, :, -1]
    return y


def _batch(settings: Settings, step: int) -> Tensor:
    """Render fresh clips: full-speed pieces of 81-frame clips, and up to five times faster ones."""
    rng = torch.Generator().manual_seed(step * 3 + {"images": 0, "clips": 1, "decoder": 2}[settings.stage])
    if settings.stage == "images":
        frames, count, width, height = 1, 8, 64, 64
    else:
        frames, count, width, height = CLIP_SHAPES[step % len(CLIP_SHAPES)]
    clips = []
    for item in range(count * settings.clips_factor):
        seed = int(torch.randint(2, 10**6, (1,), generator=rng)) + VALIDATION_SEED * 10
        speed, offset = torch.rand(2, generator=rng).tolist()
        span = min(1.0, (frames - 1) / (STANDARD_FRAMES - 1) * 5**speed)
        times = torch.linspace(0, span, frames) + offset * (1 - span)
        kind = "camera_photo" if item % 4 == 0 and speed < 0.5 else None
        x = clip(seed, training_photos(), width, height, times, kind)[0]
        # without this the green-magenta axis, rare in photographs, was not encoded at all
        x = x[torch.randperm(3, generator=rng)] * (1 if torch.rand(1, generator=rng).item() < 0.75 else -1)
        clips.append(x)
    return torch.stack(clips)


def psnr(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the peak signal-to-noise ratio in dB over `dims`, for pixels in [-1, 1]."""
    return -10 * torch.log10((a - b).square().mean(dims) / 4 + 1e-10)


@torch.no_grad()
def _validate(vae: AutoencoderKLWan, average: Average, settings: Settings) -> dict[str, float]:
    """Measure the averaged weights on held-out seeds and photographs."""
    current = {name: weight.clone() for name, weight in vae.state_dict().items()}
    vae.load_state_dict(average.weights)
    frames = 1 if settings.stage == "images" else 17
    figures: dict[str, list[float]] = {"shapes": [], "photos": [], "ends": []}
    times = torch.linspace(0, 1, 17) if frames > 1 else torch.tensor([0.5])
    for index in range(0, VALIDATION_CLIPS, 2):
        kind = KINDS[index // 2 % len(KINDS)]
        seeds = (VALIDATION_SEED + index, VALIDATION_SEED + index + 1)
        x = torch.stack([clip(seed, held_out_photos(), 64, 64, times, kind)[0] for seed in seeds]).to(settings.device)
        y = whole.decode(vae, whole.encode(vae, x)).clamp(-1, 1)
        group = "photos" if kind in ("camera_photo", "dissolve") else "shapes"
        figures[group] += psnr(x, y, (1, 2, 3, 4)).tolist()
        if frames > 1 and index % 6 == 0:
            y = whole.decode(vae, whole.encode(vae, ends_only(x))).clamp(-1, 1)
            figures["ends"] += [psnr(x[:, :, k], y[:, :, k], (0, 1, 2, 3)).item() for k in (0, -1)]
    vae.load_state_dict(current)
    return {name: sum(values) / len(values) for name, values in figures.items() if values}


def _split(vae: AutoencoderKLWan) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Separate convolution weights for Muon from gains, biases, and the thin layers at pixels."""
    matrices, others = [], []
    for weight in vae.parameters():
        if weight.requires_grad:
            thick = weight.ndim >= 4 and weight.shape[0] > 3 and weight.shape[1] > 1
            (matrices if thick else others).append(weight)
    return matrices, others


def measure_latents(vae: AutoencoderKLWan, device: str, clips: int = 48) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each latent channel over clips for training."""
    total, square, count = torch.zeros(whole.Z_DIM), torch.zeros(whole.Z_DIM), 0
    for index in range(clips):
        x = clip(index, training_photos(), 96, 64, torch.linspace(0, 1, 33))[0][None].to(device)
        with torch.no_grad():
            z = whole.encode(vae, x).double().flatten(2)[0].cpu()
        total, square, count = total + z.sum(1), square + z.square().sum(1), count + z.shape[1]
    mean = total / count
    variance = (square / count - mean.square()).tolist()
    return mean.tolist(), [math.sqrt(value) for value in variance]
