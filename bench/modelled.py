"""What the kernels should take on cards that nobody has measured them on: a MODEL from stated rates, no measurement.

python -m bench.modelled [--write]        the table, and with --write into kernels/README.md between its marks

One forward of the 14B transformer (one branch of guidance, 81 frames). Dense peaks are multiprocessors x boost clock x
published rate; the shares of them below were published for such kernels (SageAttention's charts, cuBLAS) or assumed.
`wan-local doctor` prints a line: kept in bench/results/doctor.jsonl, it makes that card's row of measured rates, or one
more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.world import RESULTS
from wan_local.geometry import Geometry, Size
from wan_local.settings import load_model_config

DOCTORS = RESULTS / "doctor.jsonl"
README = Path(__file__).parents[1] / "kernels" / "README.md"
BEGIN, END = "<!-- modelled: python -m bench.modelled --write -->", "<!-- end of modelled -->"
SIZES = {"480p": Size(480, 832), "720p": Size(720, 1280)}

# Shares of the peak that are assumed: cuBLAS in bf16, our int8 linears, elementwise kernels of the bandwidth
GEMM_SHARE, INT8_SHARE, COPY_SHARE = 0.90, 0.75, 0.85
EAGER_BYTES, FUSED_BYTES = 259, 48  # moved between linears, for each token and channel of a block
GEMM_FLOPS_OF_CONTEXT = 1026  # keys of text and images that each token sees


class LineRefused(ValueError):
    """A line of the doctor that lacks what the model is made of; the message says what."""


@dataclass(frozen=True)
class CardRates:
    """Peaks in TFLOPS or TOPS (bf16 and int8, dense) and GB/s; attention in TFLOPS: flash as measured by others, int8
    logits with fp16 values as published for that method (4060, 4070, 5060 Ti, 3060: scaled by bf16 peak)."""

    bf16: float
    int8: float
    bandwidth: float
    flash: float
    attention_int8: float


CARDS = {
    "3060": CardRates(25.5, 102, 360, 25.0, 48.0),
    "3090": CardRates(71.2, 285, 936, 70.0, 134.0),
    "4060": CardRates(30.2, 121, 272, 30.0, 59.0),
    "4070": CardRates(58.3, 233, 504, 58.0, 114.0),
    "4090": CardRates(165.0, 661, 1008, 164.0, 322.0),
    "5060 Ti": CardRates(47.4, 190, 448, 48.0, 108.0),
    "5090": CardRates(210.0, 838, 1792, 214.0, 479.0),
}


@dataclass(frozen=True)
class Work:
    """FLOPs of one forward by kind, and tokens x channels x blocks."""

    linear: float
    attention: float
    cross: float
    elements: float


def work_of(size: Size) -> Work:
    config, tokens = load_model_config("flf2v_14b").transformer, Geometry(size, 81).tokens
    dim, ffn, layers = config.dim, config.ffn_dim, config.num_layers
    return Work(
        linear=2 * tokens * (6 * dim**2 + 2 * dim * ffn) * layers,
        attention=4 * tokens**2 * dim * layers,
        cross=4 * tokens * GEMM_FLOPS_OF_CONTEXT * dim * layers,
        elements=tokens * dim * layers,
    )


def seconds(card: CardRates, work: Work) -> tuple[float, float, float, float]:
    """Return seconds of a forward: bf16 eager, with fused kernels, with int8 linears, with int8 attention."""
    bf16 = work.linear / (card.bf16 * 1e12 * GEMM_SHARE)
    int8 = work.linear / (card.int8 * 1e12 * INT8_SHARE)
    flash, cross = work.attention / (card.flash * 1e12), work.cross / (card.flash * 1e12)
    fast = work.attention / (card.attention_int8 * 1e12)
    eager, fused = (work.elements * n / (card.bandwidth * 1e9 * COPY_SHARE) for n in (EAGER_BYTES, FUSED_BYTES))
    return (bf16 + flash + cross + eager, bf16 + flash + cross + fused, int8 + flash + cross + fused,
            int8 + fast + cross + fused)  # fmt: skip


def table() -> str:
    """Return the table as Markdown."""
    lines = [
        "| card (modelled) | bf16, eager | fused | and int8 linears | and int8 attention |",
        "|---|---|---|---|---|",
    ]
    rows = {name: (name, card) for name, card in CARDS.items()} | cards_of_doctors(DOCTORS)
    for name, card in rows.values():
        both = zip(*(seconds(card, work_of(size)) for size in SIZES.values()), strict=True)
        lines.append(f"| {name} | " + " | ".join(f"{low:.1f} / {high:.0f} s" for low, high in both) + " |")
    return "\n".join(lines)


def cards_of_doctors(file: Path) -> dict[str, tuple[str, CardRates]]:
    """Return what each row says of its card and the rates by what `wan-local doctor` measured, one line a card.

    Keys are names of `CARDS` where the card is one of them, and the device's own else; a later line of a card counts.
    Raises LineRefused.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return dict(map(_measured, map(json.loads, lines)))


def _measured(line: dict[str, Any]) -> tuple[str, tuple[str, CardRates]]:
    """Return a card's name and its rates, which are reached and not peaks: the shares of peaks are taken out again."""
    world, kernels = line["world"], line["kernels"]
    card = _listed(world["device"])

    def rate(name: str) -> float:
        told = kernels.get(name, {"rate": "", "problem": "it is not in the line"})
        if not told["rate"]:
            raise LineRefused(f"{card} has no rate of {name}: {told.get('problem') or 'its numbers are wrong'}")
        return float(told["rate"].split()[0])

    rates = CardRates(
        rate("torch bfloat16 product") / GEMM_SHARE, _linear_rate(rate) / INT8_SHARE,
        rate("torch copy"), rate("torch attention"), rate("attention_int8, fp16 values"),
    )  # fmt: skip
    return card, (f"{card}, by its measured rates (triton {world['triton']})", rates)


def _listed(device: str) -> str:
    """Return the name of `CARDS` that is this device; a 4060 Ti or a laptop's 4060 is no 4060 and keeps its own."""
    name = device.removeprefix("NVIDIA ").removeprefix("GeForce ").removeprefix("RTX ")
    return name if name in CARDS else device


def _linear_rate(rate: Callable[[str], float]) -> float:
    """Return the TOPS of a block's linears together: their operations by the time that they take, tails left out."""
    config = load_model_config("flf2v_14b").transformer
    dim, wide = config.dim, config.ffn_dim
    counts = {
        f"linear_int8 {dim}x{dim}": 6 * dim * dim,  # of either attention; keys and values of the context are made once
        f"linear_int8 {wide}x{dim}": wide * dim,
        f"linear_int8_residual_ {dim}x{wide}": dim * wide,
    }
    return sum(counts.values()) / sum(count / rate(name) for name, count in counts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    text = table()
    print(text)
    if parser.parse_args().write:
        before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
