"""Cached clips on the training device, one pool a shape, with their texts encoded: a batch is a few lookups.

Pools grow while training runs, as shards appear on disk. Legend: N clips, C channels, T frames, H height, W width,
L text tokens, D their width.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.tiny_model.cache import Shard, load_shard
from bench.tiny_model.encoders import TEXT_DIM, Encoders, noisy_caption
from bench.tiny_model.sentences import DEFAULT_NEGATIVE_PROMPT, sentence
from bench.tiny_model.transformer import Texts, pad_texts

Group = str
GROUPS: tuple[Group, ...] = ("short", "small", "480p", "720p")
STANDARD_LATENT_FRAMES = 21
SMALL_POSITIONS, LARGE_POSITIONS = 80, 160
"""Latent positions of a frame: below the first a canvas is "small", from the second on it is "720p"."""
REST_SHARE = 0.03
"""Added to a clip's motion for its chance to be drawn: clips that a cross-fade explains teach little but must stay."""


@dataclass(frozen=True)
class Batch:
    """Model inputs apart from the noise; `x` are clean latents, `condition` 4 mask and 16 latent channels."""

    x_BCTHW: Tensor
    condition_BCTHW: Tensor
    images_BND: Tensor
    texts: Texts


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts, fp16 [N, L, D] with zeros after each one's own tokens."""

    states_NLD: Tensor
    lengths_N: Tensor

    def to(self, device: str) -> "Prompts":
        """Return the states on a device; lengths stay in RAM, where batches are cut."""
        return Prompts(self.states_NLD.to(device), self.lengths_N)

    def texts(self, rows: Tensor, other: "Prompts | None" = None, replaced: Tensor | None = None) -> Texts:
        """Return some prompts as the model takes them; the one prompt of `other` stands for those in `replaced`."""
        lengths, states = self.lengths_N[rows], self.states_NLD[rows.to(self.states_NLD.device)]
        if other is not None and replaced is not None and bool(replaced.any()):
            lengths = torch.where(replaced, other.lengths_N, lengths)
            states = F.pad(states, (0, 0, 0, max(0, int(lengths.max()) - states.shape[1])))
            states[replaced.to(states.device), : other.states_NLD.shape[1]] = other.states_NLD[0]
        return pad_texts(states[:, : int(lengths.max())].float(), lengths)


def encode(encoders: Encoders, prompts: list[str]) -> Prompts:
    """Return encoded prompts of whatever lengths, on the CPU."""
    states = encoders.encode_texts(prompts)
    lengths = torch.tensor([len(state) for state in states])
    padded = torch.zeros(len(states), int(lengths.max()), TEXT_DIM, dtype=torch.float16)
    for row, state in zip(padded, states, strict=True):
        row[: len(state)] = state
    return Prompts(padded, lengths)


def join(first: Prompts, second: Prompts) -> Prompts:
    """Return both, on the first one's device."""
    longest = max(first.states_NLD.shape[1], second.states_NLD.shape[1])
    states = [
        F.pad(part.states_NLD.to(first.states_NLD.device), (0, 0, 0, longest - part.states_NLD.shape[1]))
        for part in (first, second)
    ]
    return Prompts(torch.cat(states), torch.cat((first.lengths_N, second.lengths_N)))


@dataclass
class Pool:
    """Clips of one shape: fp16 latents and states on the device; captions as they are and among unrelated words."""

    x_NCTHW: Tensor
    y_NCTHW: Tensor
    images_NKLD: Tensor
    captions: Prompts
    noisy: Prompts
    likely_N: np.ndarray

    def __len__(self) -> int:
        return len(self.x_NCTHW)

    @property
    def tokens(self) -> int:
        frames, height, width = self.x_NCTHW.shape[2:]
        return frames * (height // 2) * (width // 2)

    def batch(self, rows: Tensor, texts: Texts, frames: Tensor | None = None) -> Batch:
        """Put the mask channels before the condition's latents.

        With `frames` only those latent frames are kept; they include the first and the last one.
        """
        here = rows.to(self.x_NCTHW.device)
        x, y = self.x_NCTHW[here], self.y_NCTHW[here]
        if frames is not None:
            x, y = x[:, :, frames.to(x.device)], y[:, :, frames.to(x.device)]
        x, y = x.float(), y.float()
        mask = x.new_zeros(len(rows), 4, *x.shape[2:])
        mask[:, :, 0] = 1
        mask[:, 3, -1] = 1
        return Batch(x, torch.cat((mask, y), 1), self.images_NKLD[here].float(), texts)


def motion(x_NCTHW: Tensor) -> np.ndarray:
    """Return how far each clip's latents are from a cross-fade of its ends (mean square, latents have variance one)."""
    x = x_NCTHW.float()
    weight = torch.linspace(0, 1, x.shape[2], device=x.device).view(1, 1, -1, 1, 1)
    fade = torch.lerp(x[:, :, :1], x[:, :, -1:], weight)
    return (x - fade).square().mean((1, 2, 3, 4)).double().cpu().numpy()


def make_pool(shard: Shard, encoders: Encoders, device: str) -> Pool:
    """Move a shard to the device and encode its captions."""
    rng = np.random.default_rng(len(shard.captions[0]) + len(shard))
    noisy = [_among_other_words(text, rng) for text in shard.captions]
    captions, among = (encode(encoders, texts).to(device) for texts in (shard.captions, noisy))
    x = shard.x_NCTHW.to(device)
    return Pool(x, shard.y_NCTHW.to(device), shard.images_NKLD.to(device), captions, among, motion(x) + REST_SHARE)


def _among_other_words(text: str, rng: np.random.Generator) -> str:
    other = sentence(rng)
    return other if rng.random() < 0.4 else noisy_caption(text, rng, other)


class Store:
    """Pools by shape; shards that appear on disk while training runs are picked up."""

    def __init__(self, folder: Path, encoders: Encoders, device: str) -> None:
        self.folder, self.encoders, self.device = folder, encoders, device
        self.seen: set[Path] = set()
        self.pools: dict[tuple[int, ...], Pool] = {}
        self.empty, self.negative = (encode(encoders, [text]).to(device) for text in ("", DEFAULT_NEGATIVE_PROMPT))

    def refresh(self) -> int:
        """Load new shards and return the number of clips at hand."""
        for path in sorted(set(self.folder.glob("*.pt")) - self.seen):
            self.seen.add(path)
            new = make_pool(load_shard(path), self.encoders, self.device)
            shape = tuple(new.x_NCTHW.shape[2:])
            self.pools[shape] = _merged(self.pools[shape], new) if shape in self.pools else new
        return sum(len(pool) for pool in self.pools.values())

    def groups(self) -> dict[Group, list[Pool]]:
        """Return the pools by length and area."""
        grouped: dict[Group, list[Pool]] = {group: [] for group in GROUPS}
        for shape, pool in self.pools.items():
            grouped[group_of(shape)].append(pool)
        return grouped

    def draw(self, rng: np.random.Generator, shares: tuple[float, ...]) -> Pool:
        """Draw a pool by group, then by its number of clips."""
        grouped = self.groups()
        weights = np.array([s if grouped[g] else 0.0 for g, s in zip(GROUPS, shares, strict=True)])
        if weights.sum() == 0:
            weights = np.array([1.0 if grouped[g] else 0.0 for g in GROUPS])
        pools = grouped[GROUPS[int(rng.choice(len(GROUPS), p=weights / weights.sum()))]]
        sizes = np.array([len(pool) for pool in pools], dtype=float)
        return pools[int(rng.choice(len(pools), p=sizes / sizes.sum()))]


def group_of(shape: tuple[int, ...]) -> Group:
    """Sort latent frames, height and width: the offered canvases have about 7,000 and 17,000 pixels."""
    frames, height, width = shape
    if frames < STANDARD_LATENT_FRAMES:
        return "short"
    if height * width < SMALL_POSITIONS:
        return "small"
    return "480p" if height * width < LARGE_POSITIONS else "720p"


def _merged(a: Pool, b: Pool) -> Pool:
    return Pool(
        torch.cat((a.x_NCTHW, b.x_NCTHW)),
        torch.cat((a.y_NCTHW, b.y_NCTHW)),
        torch.cat((a.images_NKLD, b.images_NKLD)),
        join(a.captions, b.captions),
        join(a.noisy, b.noisy),
        np.concatenate((a.likely_N, b.likely_N)),
    )
