"""Memory runs out on purpose, in every stage and inside a block: the video is the same, and the report says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.stamps import stamp_request, stamp_settings
from wan_local import denoise, pipeline, preparation, runs, scheduler, stage
from wan_local.errors import DoesNotFit, OutOfMemory
from wan_local.fitting import make_plan
from wan_local.geometry import Geometry, Size
from wan_local.ladder import Ladder, has_failed, ran_out_of_memory
from wan_local.models import image_encoder, text_encoder, transformer, vae
from wan_local.pipeline import Pipeline
from wan_local.planner import Machine, Plan, StagePlan, shrink
from wan_local.report import Report
from wan_local.request import Result
from wan_local.settings import Settings, known_models
from wan_local.stage import network_sizes
from wan_local.video import read_video

GO_ON = "What was done is kept. Go on with: wan-local resume {}"
NO_MEMORY = "CUDA out of memory. Tried to allocate 1.48 GiB.\nGPU 0 has a total capacity of 7.79 GiB"


@dataclass
class Fault:
    """Raises in place of `function` at the calls named; counts them all."""

    owner: Any
    name: str
    at: tuple[int, ...]
    error: Callable[[], BaseException] = lambda: torch.OutOfMemoryError(NO_MEMORY)
    calls: int = 0
    held: list[Any] = field(default_factory=list)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        function = getattr(self.owner, self.name)

        def faulty(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls in self.at:
                raise self.error()
            return function(*args, **kwargs)

        patch.setattr(self.owner, self.name, faulty)


@dataclass(frozen=True)
class Stamps:
    settings: Settings
    video: bytes


@pytest.fixture(scope="module")
def stamps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stamps]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("stamps")
        settings = stamp_settings(folder, patch, state_dir=folder / "state", cache_gigabytes=0)
        pipeline.generate(stamp_request(), settings=settings, output=folder / "x.mp4")
        yield Stamps(settings, (folder / "x.mp4").read_bytes())


@pytest.fixture
def settings(stamps: Stamps, tmp_path: Path) -> Settings:
    return replace(stamps.settings, state_dir=tmp_path / "state", output_dir=tmp_path)


def cannot_allocate() -> BaseException:
    return RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory")


FAULTS = {
    "text": Fault(text_encoder.torch, "count_nonzero", (1,)),
    "image": Fault(image_encoder.F, "interpolate", (2,)),
    "condition": Fault(vae._EncoderStream, "features", (3,)),
    "context": Fault(transformer.ContextEmbedder, "contexts", (1,)),
    "denoise": Fault(transformer.TransformerBlock, "forward", (5,)),
    "decode": Fault(vae.Decoder, "pixels", (4,)),
}


def assert_same_video(path: Path, stamps: Stamps, *, in_tiles: bool) -> None:
    """Byte for byte, but within rounding where the VAE took smaller tiles."""
    if not in_tiles:
        assert path.read_bytes() == stamps.video
        return
    whole = path.with_name("whole.mp4")
    whole.write_bytes(stamps.video)
    difference = read_video(path).astype(float) - read_video(whole)
    # a pixel that rounds the other way lets the video's encoder choose otherwise; another seed is below 25 dB away
    assert np.mean(difference**2) < 255**2 / 10**4  # 40 dB


@pytest.mark.parametrize("name", FAULTS)
def test_memory_that_runs_out_in_any_stage_costs_only_that_piece(
    settings: Settings, stamps: Stamps, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = replace(FAULTS[name], calls=0, held=[])
    fault.install(monkeypatch)
    result = pipeline.generate(stamp_request(), settings=settings, output=tmp_path / "x.mp4")
    assert fault.calls > max(fault.at)
    assert_same_video(tmp_path / "x.mp4", stamps, in_tiles=name in ("condition", "decode"))
    [note] = result.report["notes"]
    assert note.startswith(f"{name} ran out of memory on cpu")
    assert runs.list_runs(settings) == []


@pytest.mark.parametrize("name", ["denoise", "decode"])
def test_what_was_planned_is_told_of_the_rung_that_succeeded(
    settings: Settings, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = preparation.prepare(stamp_request(), settings, tmp_path / "x.mp4")
    config = job.files.config
    lower = shrink(job.plan, name, config, network_sizes(config, job.files), job.machine)
    assert lower is not None
    fault = replace(FAULTS[name], calls=0, held=[])
    fault.install(monkeypatch)
    memory = pipeline.generate(stamp_request(), settings=settings, output=tmp_path / "x.mp4").report["memory"]
    assert memory[name]["planned_bytes"] == lower.stage(name).peak_bytes < job.plan.stage(name).peak_bytes
    assert memory[name].get("tiles") == (None if name == "denoise" else str(lower.stage(name).tiling))
    assert memory["text"]["planned_bytes"] == job.plan.stage("text").peak_bytes


@pytest.mark.parametrize("error", [cannot_allocate, MemoryError], ids=["allocator", "python"])
@pytest.mark.parametrize("name", ["text", "denoise", "decode"])
def test_memory_that_runs_out_while_loading_or_twice(
    settings: Settings,
    stamps: Stamps,
    tmp_path: Path,
    name: str,
    error: Callable[[], BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = {"text": "text_encoder", "denoise": "transformer", "decode": "vae_decoder"}[name]
    load, loads = stage._load, []

    def short_of_memory(module: Any, loaded: str, *rest: Any) -> None:
        load(module, loaded, *rest)  # type: ignore[arg-type]
        if loaded == network:
            loads.append(loaded)
            if len(loads) <= 2:
                raise error()

    monkeypatch.setattr(stage, "_load", short_of_memory)
    result = pipeline.generate(stamp_request(), settings=settings, output=tmp_path / "x.mp4")
    assert_same_video(tmp_path / "x.mp4", stamps, in_tiles=name == "decode")
    assert len(loads) == 3
    assert all(name in note for note in result.report["notes"])


def test_memory_that_runs_out_in_a_streamed_block_goes_on_from_that_step(
    settings: Settings, stamps: Stamps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in the first step with all blocks resident, once in the second step while a block streams."""
    blocks = known_models()[1].transformer.num_layers
    fault = Fault(transformer.TransformerBlock, "forward", (blocks, 4 * blocks + 2))
    fault.install(monkeypatch)
    predicted: list[float] = []
    predict = denoise.Guided.predict
    monkeypatch.setattr(denoise.Guided, "predict", lambda self, x, t: (predicted.append(t), predict(self, x, t))[1])
    result = pipeline.generate(stamp_request(), settings=settings, output=tmp_path / "x.mp4")
    assert (tmp_path / "x.mp4").read_bytes() == stamps.video
    assert len(predicted) == 4 and len(set(predicted)) == 2, "each of the two steps was tried twice and no more"
    first, second = result.report["notes"]
    assert "done again on cpu with" in first and "blocks resident" in first and "blocks resident" in second


@pytest.mark.parametrize(("name", "kept"), [("text", False), ("denoise", True), ("decode", True)])
def test_when_no_rung_is_left_the_error_says_what_was_tried_and_the_run_can_be_resumed(
    settings: Settings, stamps: Stamps, tmp_path: Path, name: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    always = tuple(range(20, 10_000)) if name == "denoise" else tuple(range(1, 10_000))
    with monkeypatch.context() as patch:
        replace(FAULTS[name], at=always, calls=0).install(patch)
        with pytest.raises(OutOfMemory, match=f"{name} ran out of memory on every rung: on cpu") as caught:
            list(Pipeline(settings).generate(stamp_request(), output=tmp_path / "x.mp4", run_id="short"))
    assert isinstance(caught.value, MemoryError) and "Tried to allocate 1.48 GiB" in str(caught.value)
    assert (
        getattr(caught.value, "__notes__", []) == ["What was done is kept. Go on with: wan-local resume short"] * kept
    )
    assert (runs.find(settings, "short") is not None) is kept
    assert not list(tmp_path.rglob("*.mp4")) and not list(tmp_path.rglob("*.part"))
    if kept:
        result = list(Pipeline(settings).resume("short"))[-1]
        assert isinstance(result, Result) and (tmp_path / "x.mp4").read_bytes() == stamps.video


def test_memory_that_runs_out_between_the_pieces_keeps_what_was_done(
    settings: Settings, stamps: Stamps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the solver's own arithmetic, say, which no rung makes smaller."""
    with monkeypatch.context() as patch:
        Fault(scheduler.Scheduler, "step", (2,)).install(patch)
        with pytest.raises(OutOfMemory, match=r"out of memory") as caught:
            list(Pipeline(settings).generate(stamp_request(), output=tmp_path / "x.mp4", run_id="between"))
    assert caught.value.__notes__ == [GO_ON.format("between")]
    result = list(Pipeline(settings).resume("between"))[-1]
    assert isinstance(result, Result) and (tmp_path / "x.mp4").read_bytes() == stamps.video


def test_what_an_attempt_held_is_freed_before_the_next(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of the frames that ran out of memory are gone when the same work begins again."""
    import weakref

    held: list[weakref.ref[torch.Tensor]] = []
    forward = transformer.TransformerBlock.forward

    def heavy(self: Any, hidden: torch.Tensor, *rest: Any) -> None:
        assert not held or held[0]() is None, "the last attempt's tensor is still there"
        mine = torch.zeros(10)
        held.append(weakref.ref(mine))
        if len(held) == 1:
            raise torch.OutOfMemoryError(NO_MEMORY)
        forward(self, hidden, *rest)
        del mine

    monkeypatch.setattr(transformer.TransformerBlock, "forward", heavy)
    running = Pipeline(settings).generate(stamp_request(), output=settings.output_dir / "x.mp4")
    for event in running:
        if getattr(event, "stage", "") == "denoise" and getattr(event, "index", 0):
            break
    running.close()
    assert len(held) > 1


# The rungs themselves


def test_what_is_no_lack_of_memory_is_not_retried() -> None:
    assert ran_out_of_memory(torch.OutOfMemoryError(NO_MEMORY)) and ran_out_of_memory(MemoryError())
    assert ran_out_of_memory(cannot_allocate()) and ran_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not ran_out_of_memory(DoesNotFit("planned")) and not ran_out_of_memory(RuntimeError("shapes differ"))
    assert not ran_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "GET was unable to find an engine to execute this computation",
        "FIND was unable to find an engine to execute this computation",
        "Unable to find a valid cuDNN algorithm to run convolution",
    ],
)
def test_what_libraries_say_where_they_get_no_memory_is_a_lack_of_memory(words: str) -> None:
    assert ran_out_of_memory(RuntimeError(words))


def test_a_fault_that_the_card_recovers_from_is_told_from_one_that_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 0)
    answers: list[Exception] = [RuntimeError("CUDA error: an illegal memory access was encountered")]

    def synchronize(_: torch.device) -> None:
        if answers:
            raise answers[0]

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert has_failed(card) and not has_failed(torch.device("cpu"))
    answers[0] = RuntimeError("CUDA error: out of memory")
    assert not has_failed(card)
    answers.clear()
    assert not has_failed(card)


def on_cpu(stage: str) -> StagePlan:
    return StagePlan(stage, 1, 1)


def real_plan(free_gib: float) -> tuple[Plan, Callable[[Plan, str], Plan | None]]:
    config = known_models()[0]
    sizes, machine = network_sizes(config), Machine("cuda:0", int(free_gib * 2**30), 64 * 2**30, 2)
    plan = make_plan(Geometry(Size(height=480, width=832), 81), config, sizes, machine)
    return plan, lambda plan, name: shrink(plan, name, config, sizes, machine)


def test_each_rung_of_the_real_model_holds_less_until_nothing_is_left_to_give_up() -> None:
    plan, lesser = real_plan(40)
    assert plan.stage("denoise").resident_blocks is None
    seen = [plan]
    while (plan := lesser(seen[-1], "denoise")) is not None:  # type: ignore[assignment]
        seen.append(plan)
    residents = [step.stage("denoise").resident_blocks for step in seen[1:]]
    assert residents[0] == max(residents) and residents[-1] == 0  # smaller chunks can make room for a block again
    assert len({(step.stage("denoise"), step.chunk_tokens) for step in seen}) == len(seen)
    peaks = [step.stage("denoise").peak_bytes for step in seen]
    assert peaks == sorted(peaks, reverse=True)
    assert seen[-1].chunk_tokens < seen[0].chunk_tokens


def climb(ladder: Ladder, name: Any, faults: int) -> list[str]:
    """Return what each attempt at a stage was given, when the first `faults` of them run out of memory."""
    seen = []
    for attempt in ladder.attempts(name):
        with attempt as rung:
            seen.append(f"{rung.device.type} {rung.plan.resident_blocks}")
            if len(seen) <= faults:
                raise torch.OutOfMemoryError(NO_MEMORY)
    return seen


def test_a_card_goes_from_fewer_blocks_to_the_cpu_and_rungs_are_few() -> None:
    plan, lesser = real_plan(40)
    notes: list[str] = []

    def fresh() -> Ladder:
        return Ladder(plan, torch.device("cuda:0"), torch.bfloat16, shrink=lesser, on_cpu=on_cpu, note=notes.append)

    text = climb(fresh(), "text", 2)
    assert text[0] == "cuda None" and text[1].startswith("cuda ") and text[1] != "cuda None"
    assert climb(fresh(), "image", 2) == ["cuda None", "cuda None", "cpu None"]
    with pytest.raises(OutOfMemory, match=r"denoise ran out of memory on every rung.*with 0 blocks resident"):
        climb(fresh(), "denoise", 100)
    notes.clear()
    assert len(climb(fresh(), "decode", 2)) == 3 and len(notes) == 2


def test_on_the_cpu_a_stage_takes_no_more_ram_than_is_free_and_is_not_tried_where_it_has_no_room(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 the text encoder is 21 GiB, and decoding whole frames of 480p takes 5."""
    config, free = known_models()[0], [4 * 2**30]
    monkeypatch.setattr(preparation, "free_ram_bytes", lambda: free[0])
    monkeypatch.setattr(preparation, "free_bytes", lambda _: free[0])
    job = preparation.prepare(stamp_request(), settings)
    files = replace(job.files, config=config)
    order = replace(job.order, geometry=Geometry(Size(height=480, width=832), 81))
    monkeypatch.setattr(preparation, "network_sizes", lambda config, _: network_sizes(config))
    card = replace(job, files=files, order=order, device=torch.device("cuda:0"), plan=real_plan(40)[0])

    def tried(name: str) -> str:
        with pytest.raises(OutOfMemory, match=f"{name} ran out of memory on every rung: on cuda:0") as caught:
            climb(card.workspace(Report(torch.device("cpu"))).ladder, name, 100)
        return str(caught.value)

    assert "on cpu with 2 blocks resident, the others from file:" in tried("text")
    assert "on cpu in 1 x 2 tiles:" in tried("decode")
    free[0] = 2**29
    assert "on cpu" not in tried("text") and "on cpu" not in tried("decode")


def test_a_rung_that_was_taken_is_kept_for_the_rest_of_the_stage() -> None:
    plan, lesser = real_plan(40)
    ladder = Ladder(plan, torch.device("cuda:0"), torch.bfloat16, shrink=lesser, on_cpu=on_cpu, note=lambda _: None)
    lowered = climb(ladder, "denoise", 1)[-1]
    assert climb(ladder, "denoise", 0) == [lowered]
    assert climb(ladder, "context", 0) == ["cuda None"]


def test_a_plan_part_is_told_in_words() -> None:
    plan, lesser = real_plan(40)
    ladder = Ladder(plan, torch.device("cpu"), torch.float32, shrink=lesser, on_cpu=on_cpu, note=print)
    with next(iter(ladder.attempts("text"))) as first:
        assert first.describe() == "on cpu"
    streamed = replace(first, plan=StagePlan("text", 1, 1, resident_blocks=3, source="file"))
    assert streamed.describe() == "on cpu with 3 blocks resident, the others from file"


def test_ram_that_runs_out_beside_a_card_is_helped_by_the_file(tmp_path: Path) -> None:
    plan, lesser = real_plan(12)
    assert plan.stage("denoise").source == "ram"
    ladder = Ladder(plan, torch.device("cuda:0"), torch.bfloat16, shrink=lesser, on_cpu=on_cpu, note=lambda _: None)
    seen = []
    for attempt in ladder.attempts("denoise"):
        with attempt as rung:
            seen.append((rung.plan.source, rung.plan.resident_blocks))
            if len(seen) == 1:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
            if len(seen) == 2:
                raise torch.OutOfMemoryError(NO_MEMORY)
    (_, blocks), *others = seen
    assert others[0] == ("file", blocks) and others[1][0] == "file" and others[1][1] < blocks


def test_keys_and_values_are_parked_as_the_rung_of_their_stage_says() -> None:
    plan, _ = real_plan(3)
    assert plan.stage("context").parked and plan.stage("denoise").parked
