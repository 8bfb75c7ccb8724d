"""Whether an attention backend works here: tried once, in a process of its own, since a broken one can abort it.

What it computed, right or wrong, is remembered by card, driver, torch, Triton, the backend's package and our own
sources; a change of any of them asks again. That it came to no end (a crash, a hang, no memory or no C compiler at that
moment) holds for this process alone.

python -m wan_local.probe DEVICE BACKEND FILE        writes {"problem": "..."}, empty where all is well
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from wan_local.attention import (
    BACKENDS,
    OURS,
    KernelChoice,
    attention_in_pieces,
    card_of,
    choose,
    package_version,
    triton_version,
    wrong_kernels,
)
from wan_local.device import driver_version
from wan_local.durable import make_folder, write
from wan_local.home import home_folder
from wan_local.settings import AttentionName, KernelsChoice, ModelConfig, Settings

REMEMBERED = Path(".wan_local") / "probes.json"  # below the home folder
_SECONDS = 240  # a first compilation of every kernel takes one to two minutes on a slow CPU
_COSINE = 0.995  # int8 attention of what `_operands` gives has 0.9998; a wrong scale, tail or layout is below 0.97
_QUERIES, _KEYS, _HEADS, _HEAD_DIM = 130, 301, 4, 128  # odd lengths, for tails are where kernels break
_log = logging.getLogger(__name__)


def choose_kernels(settings: Settings, device: torch.device, config: ModelConfig) -> KernelChoice:
    """Return what the transformer computes with under these settings; raises NotAvailable for what cannot run here."""
    attention, fused = _asked_for(settings)

    def broken(name: AttentionName) -> str:
        return problem_of(name, device)

    head_dim = config.transformer.attention_head_dim
    return choose(attention, fused, card_of(device), head_dim, broken=broken)


def assumed_kernels(settings: Settings) -> KernelChoice:
    """Return what a GeForce card of Ampere or later computes with under these settings; nothing is looked at."""
    attention, asked = _asked_for(settings)
    fused = asked in ("auto", "on")
    if attention == "auto":
        attention = "int8" if fused else "sdpa"
    how = "fused kernels" if fused else "linears with float16 sums" if asked == "fp16" else "plain linears"
    reason = f"assumed of a GeForce card of Ampere or later: {attention} attention, {how}"
    return KernelChoice(attention, fused, asked == "fp16", reason=reason)


def _asked_for(settings: Settings) -> tuple[AttentionName, KernelsChoice]:
    attention, fused = settings.attention, settings.kernels
    if settings.precision == "reference":  # what is not asked for by name stays exact
        attention, fused = "sdpa" if attention == "auto" else attention, "off" if fused == "auto" else fused
    return attention, fused


@dataclass(frozen=True, slots=True)
class Answer:
    """What is wrong with a backend, or nothing. `lasts`: its numbers say so, and not a probe that came to no end."""

    problem: str
    lasts: bool


def problem_of(name: AttentionName, device: torch.device, *, home: Path | None = None) -> str:
    """Return what is wrong with a backend on a card, or nothing; on a CPU nothing is tried."""
    if device.type != "cuda" or name == "sdpa":
        return ""
    return remembered_problem(name, device, world_of(name, device), home or home_folder())


def remembered_problem(name: AttentionName, device: torch.device, world: str, home: Path) -> str:
    """Return what was found in this world before, or try now and remember it."""
    file, key = home / REMEMBERED, f"{world}|{name}"
    known = _known(file)
    if key in known:
        return known[key]
    answer = _tried_here(name, device, world)
    if answer.lasts:
        _remember(file, key, answer.problem)
    return answer.problem


@functools.lru_cache(maxsize=32)
def _tried_here(name: AttentionName, device: torch.device, world: str) -> Answer:
    """Try a backend, once in this process and world; whether it can answer does not change from run to run."""
    _log.warning("trying attention backend %s on %s once; this can take a minute", name, device)
    answer = try_apart(name, device)
    if not answer.lasts:
        _log.warning("%s is not used by this process: %s; the next one tries again", name, answer.problem)
    return answer


def _known(file: Path) -> dict[str, str]:
    """Return what is remembered; a file that is damaged counts as none and is replaced by the next answer."""
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(key): str(problem) for key, problem in known.items()} if isinstance(known, dict) else {}


def _remember(file: Path, key: str, problem: str) -> None:
    """Add an answer to what is in the file by now; where it cannot be written, each process asks for itself."""
    try:
        make_folder(file.parent)
        write(file, [json.dumps({**_known(file), key: problem}, indent=1).encode()])
    except OSError as error:
        _log.warning("what the probe found could not be kept in %s: %s", file, error)


def try_apart(name: AttentionName, device: torch.device, *, seconds: float = _SECONDS) -> Answer:
    """Try a backend in a process of its own and return what is wrong with it; a crash or a hang is an answer, too."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "wan_local.probe", str(device), name, str(answer)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return Answer(f"its probe gave no answer within {seconds:.0f} s", lasts=False)
        if done.returncode or not answer.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return Answer(f"its probe ended with code {done.returncode}: {last[:200]}", lasts=False)
        return Answer(str(json.loads(answer.read_text(encoding="utf-8"))["problem"]), lasts=True)


def trial(name: AttentionName, device: torch.device) -> str:
    """Return what is wrong with a backend, found by running it here: its numbers, and for ours every kernel's."""
    operands = _operands()
    exact = attention_in_pieces(*operands)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    got = BACKENDS[name].function(*(x.to(device, dtype) for x in operands)).float().cpu()
    if not torch.isfinite(got).all():
        return "it gave NaN or infinity"
    cosine = float(torch.nn.functional.cosine_similarity(got.flatten(), exact.flatten(), dim=0))
    if not cosine > _COSINE:
        return f"its cosine to exact attention is {cosine:.4f}, below {_COSINE}"
    wrong = wrong_kernels(device) if name in OURS else []
    return f"these kernels compute wrongly: {', '.join(wrong)}" if wrong else ""


def _operands() -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [1, 130, 4, 128], keys and values [1, 301, 4, 128] of which each query sees a few.

    Attention that is nearly uniform, or values with a mean, would look right however wrong the weights are.
    """
    generator = torch.Generator().manual_seed(0)
    rows = (_QUERIES, _KEYS, _KEYS)
    q, k, v = (torch.randn((1, count, _HEADS, _HEAD_DIM), generator=generator) for count in rows)
    return 3 * q, k + 2, v


def world_of(name: AttentionName, device: torch.device) -> str:
    """Return what an answer holds for: card, driver, versions (of the backend's package, too), and our own sources."""
    versions = [f"torch {torch.__version__}", f"triton {triton_version()}", package_version(name), sources_hash()]
    return "|".join([torch.cuda.get_device_name(device), driver_version(), *filter(None, versions)])


@functools.cache
def sources_hash() -> str:
    """Return a hash of every kernel's source, of the table of backends and of the trial itself."""
    origin = importlib.util.find_spec("wan_kernels")
    assert origin is not None and origin.origin is not None, "wan_kernels is part of this package"
    ours = (Path(__file__).with_name(name) for name in ("attention.py", "probe.py"))
    files = [*sorted(Path(origin.origin).parent.glob("*.py")), *ours]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def main(arguments: list[str]) -> None:
    """Try the backend that is named and write the answer."""
    device, name, file = arguments
    problem = trial(cast(AttentionName, name), torch.device(device))
    Path(file).write_text(json.dumps({"problem": problem}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
