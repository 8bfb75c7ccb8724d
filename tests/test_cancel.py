"""Cancel within one block: a check runs before every tensor that is read and every block that runs, in every stage.

On a card within two: the host enqueues a block while the one before it computes.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.stamps import stamp_request, stamp_settings
from wan_local import offload
from wan_local import stage as stage_module
from wan_local.checkpoint import ModelFiles, find_model
from wan_local.errors import Cancelled
from wan_local.jobs import Queue, Ticket
from wan_local.models.transformer import ContextKV, Modulation, Transformer
from wan_local.offload import CheckedBlocks, abreast
from wan_local.pipeline import Pipeline
from wan_local.planner import StagePlan
from wan_local.request import Request, Result, Step
from wan_local.settings import load_settings
from wan_local.stage import Network, load_network, stage

CPU = torch.device("cpu")
BLOCKS: dict[Network, str] = {
    "text_encoder": "encoder.block",
    "image_encoder": "encoder.layers",
    "context_embedder": "blocks",
    "transformer": "blocks",
}
STREAMED = ("text_encoder", "context_embedder", "transformer")


class CancelledAfter:
    """A check that lets `calls` calls pass."""

    def __init__(self, calls: float = float("inf")) -> None:
        self.calls, self.left = 0, calls

    def __call__(self) -> None:
        self.calls += 1
        if self.calls > self.left:
            raise Cancelled("stop")


@pytest.fixture(scope="module")
def files() -> ModelFiles:
    return find_model(load_settings(model="tiny"))


@pytest.mark.parametrize("network", BLOCKS)
def test_every_tensor_is_asked_about_while_loading(files: ModelFiles, network: Network) -> None:
    check = CancelledAfter()
    load_network(network, files, CPU, torch.float32, check=check)
    tensors = check.calls
    assert tensors > 5
    held: list[nn.Module] = []
    check = CancelledAfter(tensors // 2)
    with pytest.raises(Cancelled), stage(network, files, CPU, torch.float32, check=check) as module:
        held.append(module)
    assert not held and check.calls == tensors // 2 + 1


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("network", BLOCKS)
def test_no_block_runs_after_the_check_says_stop(files: ModelFiles, network: Network, streamed: bool) -> None:
    if streamed and network not in STREAMED:
        pytest.skip("this network is small and always whole")
    plan = StagePlan("x", 0, 0, resident_blocks=1, source="file") if streamed else None
    check = CancelledAfter()
    with stage(network, files, CPU, torch.float32, plan=plan, check=check) as module:
        blocks = module.get_submodule(BLOCKS[network])
        count = len(blocks)
        assert len(list(blocks)) == count
        for _ in range(2):  # the second pass, too
            passing = iter(blocks)
            for _ in range(count - 1):
                next(passing)
            check.left = 0
            with pytest.raises(Cancelled):
                next(passing)
            check.left = float("inf")
    assert all(parameter.is_meta for parameter in module.parameters())


class _Slow(nn.Module):
    """A block that takes a while and tells when it began."""

    def __init__(self, began: Callable[[], None]) -> None:
        super().__init__()
        self.began = began
        self.work = nn.Linear(768, 768)

    def forward(self, hidden: torch.Tensor, *_: Any) -> None:
        self.began()
        for _ in range(6):
            hidden.copy_(self.work(hidden))


def test_a_cancel_from_another_thread_ends_a_forward_pass_within_a_block(files: ModelFiles) -> None:
    """On a model whose blocks take tens of milliseconds: the wait is at most what was left of one block."""
    config = replace(files.config.transformer, num_attention_heads=12, attention_head_dim=64, ffn_dim=8, num_layers=16)
    cancelled, began = threading.Event(), []

    def check() -> None:
        if cancelled.is_set():
            raise Cancelled("stop")

    net = Transformer(replace(config, num_layers=1)).requires_grad_(False)
    net.blocks = CheckedBlocks((_Slow(lambda: began.append(time.perf_counter())) for _ in range(16)), check)
    latents, modulation = torch.randn(1, 36, 4, 32, 32), Modulation(torch.zeros(1, 768), torch.zeros(1, 6, 768))
    contexts: list[list[ContextKV]] = [[None] * 16]  # type: ignore[list-item]
    net(latents, modulation, contexts)
    block_seconds = statistics.median(after - before for before, after in pairwise(began))
    began.clear()
    stopped_at: list[float] = []

    def stop() -> None:
        stopped_at.append(time.perf_counter())
        cancelled.set()

    threading.Timer(6.5 * block_seconds, stop).start()
    with pytest.raises(Cancelled):
        net(latents, modulation, contexts)
    latency = time.perf_counter() - stopped_at[0]
    assert 2 < len(began) < 16
    assert sum(moment > stopped_at[0] for moment in began) <= 1  # one may be starting as the flag is set
    assert latency < 4 * block_seconds + 0.05, (latency, block_seconds)


class _Card:
    """A card that does nothing of what is enqueued until the host waits for it."""

    def __init__(self) -> None:
        self.enqueued = self.done = 0

    def event(self, *, blocking: bool) -> _Event:
        assert blocking  # else the host spins
        return _Event(self)


class _Event:
    def __init__(self, card: _Card) -> None:
        self.card, self.after = card, 0

    def record(self, stream: object) -> None:
        self.after = self.card.enqueued

    def synchronize(self) -> None:
        self.card.done = max(self.card.done, self.after)


def test_the_host_enqueues_no_block_before_the_one_before_the_last_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    card, behind = _Card(), []
    monkeypatch.setattr(torch.cuda, "Event", card.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    check = abreast(lambda: behind.append(card.enqueued - card.done), torch.device("cuda"))
    for _ in range(2):
        for _ in CheckedBlocks([nn.Identity() for _ in range(5)], check):
            card.enqueued += 1
    assert behind == [0, *[1] * 9]


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
def test_the_host_is_kept_abreast_of_every_block(
    files: ModelFiles, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []
    for module in (offload, stage_module):
        monkeypatch.setattr(module, "abreast", lambda check, device: lambda: asked.append(device))
    plan = StagePlan("x", 0, 0, resident_blocks=1, source="file") if streamed else None
    with stage("transformer", files, CPU, torch.float32, plan=plan) as network:
        assert asked == []
        assert len(list(network.blocks)) == len(asked)


@pytest.mark.parametrize("stage_name", ["plan", "text", "image", "condition", "context", "denoise", "decode"])
def test_the_pipeline_ends_at_the_first_check_of_any_stage(
    stage_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled after the last sign of the stage before: the next check, not the next sign, ends the run."""
    check, settings = CancelledAfter(), stamp_settings(tmp_path, monkeypatch)
    running = Pipeline(settings).generate(stamp_request(), output=tmp_path / "x.mp4", check=check)

    def run() -> None:
        for event in running:
            if isinstance(event, Step) and event.stage == stage_name:
                check.left = check.calls

    with pytest.raises(Cancelled):
        run()
    assert not list(tmp_path.rglob("*.mp4")) and not list(tmp_path.rglob("*.part"))


def test_a_queues_cancel_reaches_an_engine_that_yields_nothing() -> None:
    inside = threading.Event()

    def engine(_: Request, ticket: Ticket) -> Iterator[Step | Result]:
        while True:  # an engine in the middle of a forward pass
            ticket.check()
            inside.set()
            time.sleep(0.01)
        yield

    queue = Queue(engine)
    job = queue.submit(Request(prompt="x", start_image_url="a", end_image_url="b"))
    assert inside.wait(5)
    assert queue.cancel(job)
    assert queue.wait(job, 5) and isinstance(job.error, Cancelled)
    queue.close(1)
