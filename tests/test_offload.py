from __future__ import annotations

import gc
import random
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import parity
from wan_local import flat_block, host_blocks, layers, offload
from wan_local.checkpoint import ModelFiles, find_model, open_model
from wan_local.conditioning import Tokens, embed_prompt
from wan_local.errors import WrongModel
from wan_local.flat_block import FlatBlock
from wan_local.models.transformer import Transformer
from wan_local.offload import Residency, StreamedBlocks
from wan_local.planner import StagePlan, spread
from wan_local.settings import load_settings
from wan_local.stage import stage

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files() -> ModelFiles:
    return find_model(load_settings(model="tiny"))


def streamed(resident: int) -> StagePlan:
    return StagePlan("denoise", 0, 0, resident_blocks=resident, source="file")


def velocities(files: ModelFiles, plan: StagePlan | None, steps: int = 2) -> list[Tensor]:
    """Run a few steps with two contexts; return every velocity."""
    config = files.config.transformer
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(1, config.in_channels, 2, 4, 6, generator=generator)
    text = torch.randn(2, 1, config.text_tokens, config.text_dim, generator=generator)
    images = torch.randn(1, config.image_tokens, config.image_dim, generator=generator)
    with stage("context_embedder", files, CPU, torch.float32, plan=plan) as embedder:
        contexts = [embedder(prompt, images) for prompt in text]
        modulations = embedder.modulations(torch.arange(100, 100 + steps))
    with stage("transformer", files, CPU, torch.float32, plan=plan) as transformer:
        return [v for step in range(steps) for v in transformer(latents, modulations[100 + step], contexts)]


@pytest.mark.parametrize("resident", [0, 1, 3, 4])
def test_streaming_is_bit_equal_to_all_resident(files: ModelFiles, resident: int) -> None:
    expected = velocities(files, None)
    got = velocities(files, streamed(resident))
    assert len(got) == len(expected) == 4
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_rotary_table_is_made_once_for_all_steps_and_goes_with_the_stage(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = [], layers.rotary_embedding
    monkeypatch.setattr(layers, "rotary_embedding", lambda *of: made.append(of) or make(*of))
    velocities(files, None, steps=3)
    assert len(made) == 1
    with stage("transformer", files, CPU, torch.float32) as transformer:
        for grid in ((2, 2, 3), (2, 2, 3), (1, 2, 3), (2, 2, 3)):
            got, true = transformer.rotary(grid, CPU), make(grid, files.config.transformer.attention_head_dim, CPU)
            assert torch.equal(got.cos, true.cos) and torch.equal(got.sin, true.sin)
    assert len(made) == 4
    assert all(buffer.is_meta for buffer in transformer.buffers())


def test_a_misshapen_tensor_of_a_streamed_block_is_refused_before_anything_runs(
    files: ModelFiles, tmp_path: Path
) -> None:
    """A copy would have broadcast it."""
    folder = Path(shutil.copytree(files.folder, tmp_path / "model"))
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["blocks.2.attn1.norm_q.weight"] = torch.ones(1)
    save_file(state, file)
    with (
        pytest.raises(WrongModel, match=r"blocks\.2\.attn1\.norm_q\.weight"),
        stage("transformer", open_model(folder), CPU, torch.float32, plan=streamed(0)),
    ):
        pass


class Scale(nn.Module):
    """A block that multiplies by its weight, after a nap."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3))
        self.bias = nn.Parameter(torch.empty(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


def make_blocks(count: int, resident: frozenset[int], *, nap: float = 0.0) -> StreamedBlocks:
    naps = random.Random(7)

    def fill(index: int, views: Mapping[str, Tensor]) -> None:
        for name, view in views.items():
            time.sleep(naps.random() * nap)
            view.fill_(index if name == "bias" else 1 + index / 100)

    with torch.device("meta"):
        blocks = [Scale() for _ in range(count)]
    for index in resident:
        blocks[index].load_state_dict(
            {"weight": torch.full((3,), 1 + index / 100), "bias": torch.tensor([index], dtype=torch.float64)},
            assign=True,
        )
    layouts = [FlatBlock(block, lambda name: torch.float64 if name == "bias" else torch.float32) for block in blocks]
    return StreamedBlocks(blocks, layouts, fill, Residency(resident, "file"), CPU)


def walk(blocks: StreamedBlocks, nap: float = 0.0) -> Tensor:
    x, naps = torch.ones(3, dtype=torch.float64), random.Random(3)
    for block in blocks:
        time.sleep(naps.random() * nap)
        x = block(x)
    return x


@pytest.mark.parametrize("num_resident", range(9))
def test_random_delays_on_either_side_change_nothing(num_resident: int) -> None:
    x = torch.ones(3, dtype=torch.float64)
    for index in range(8):
        x = x * torch.full((3,), 1 + index / 100) + index
    blocks = make_blocks(8, spread(8, num_resident), nap=0.004)
    assert len(blocks) == 8
    for _ in range(4):
        assert torch.equal(walk(blocks, nap=0.004), x)
    blocks.close()


def test_a_pass_left_half_way_is_begun_anew() -> None:
    blocks = make_blocks(7, frozenset({2}))
    expected = walk(blocks)
    for stop in (1, 2, 4, 6):
        for index, _ in enumerate(blocks):
            if index == stop:
                break
        assert torch.equal(walk(blocks), expected)
    blocks.close()


def test_closing_in_the_middle_of_a_pass_raises_nothing_later(recwarn: pytest.WarningsRecorder) -> None:
    blocks = make_blocks(5, frozenset())
    walking = iter(blocks)
    next(walking)
    blocks.close()
    del walking
    gc.collect()
    assert not [warning for warning in recwarn if issubclass(warning.category, pytest.PytestUnraisableExceptionWarning)]


def test_only_the_resident_blocks_and_the_ring_hold_memory_and_nothing_after_close() -> None:
    blocks = make_blocks(40, spread(40, 5))
    held = [parameter for module in blocks.modules_held() for parameter in module.parameters()]
    assert len(blocks.modules_held()) == 5 + 2
    assert not any(parameter.is_meta for parameter in held)
    blocks.close()
    blocks.close()
    assert all(parameter.is_meta for module in blocks.modules_held() for parameter in module.parameters())


def test_an_error_while_reading_reaches_the_one_who_computes() -> None:
    def fill(index: int, views: Mapping[str, Tensor]) -> None:
        if index == 3:
            raise OSError("the disk is gone")
        for view in views.values():
            view.zero_()

    with torch.device("meta"):
        modules = [Scale() for _ in range(5)]
    layouts = [FlatBlock(module, lambda _: torch.float32) for module in modules]
    blocks = StreamedBlocks(modules, layouts, fill, Residency(frozenset(), "file"), CPU)
    with pytest.raises(OSError, match="the disk is gone"):
        walk(blocks)
    blocks.close()


@pytest.mark.parametrize("broken", [0, 1, 3, 4])
def test_a_pass_whose_read_failed_is_begun_anew(broken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = make_blocks(5, frozenset())
    expected, whole = walk(blocks), blocks._fill
    left = [OSError("the share does not answer")] * 2

    def fill(index: int, views: Mapping[str, Tensor]) -> None:
        if index == broken and left:
            raise left.pop()
        whole(index, views)

    monkeypatch.setattr(blocks, "_fill", fill)
    with pytest.raises(OSError, match="does not answer"):
        [walk(blocks) for _ in range(2)]  # the first blocks of the first of these were read before
    with pytest.raises(OSError, match="does not answer"):
        walk(blocks)
    assert torch.equal(walk(blocks), expected)
    blocks.close()


@pytest.mark.parametrize("num_resident", [0, 1, 7, 20, 39])
def test_resident_blocks_are_spread_evenly_among_the_streamed(num_resident: int) -> None:
    resident = spread(40, num_resident)
    gone = [index for index in range(40) if index not in resident]
    gaps = [after - before for before, after in zip(gone, [*gone[1:], gone[0] + 40], strict=True)]
    assert len(resident) == num_resident
    assert max(gaps) - min(gaps) <= 1


def test_a_flat_block_is_aligned_and_holds_every_tensor_once() -> None:
    with torch.device("meta"):
        block = Transformer(parity.transformer_config("dit")).blocks[0]  # type: ignore[index]
    layout = FlatBlock(block, lambda name: torch.float32 if "norm" in name else torch.bfloat16)
    flat = torch.zeros(layout.nbytes, dtype=torch.uint8)
    views = layout.views(flat)
    assert set(views) == {name for name, _ in block.named_parameters()}
    for number, view in enumerate(views.values(), start=1):
        assert view.data_ptr() % 256 == flat.data_ptr() % 256
        view.fill_(number)
    assert all((view == number).all() for number, view in enumerate(views.values(), start=1))


@pytest.fixture
def tokens() -> Tokens:
    return Tokens(torch.tensor([[5, 9, 300, 5, 1]]), cut=0)


def test_a_streamed_text_encoder_with_gathered_rows_equals_the_whole_one(files: ModelFiles, tokens: Tokens) -> None:
    with stage("text_encoder", files, CPU, torch.float32) as encoder:
        whole = embed_prompt(encoder, tokens, length=512)
    with stage("text_encoder", files, CPU, torch.float32, plan=streamed(0)) as encoder:
        assert not any(p.shape[0] == files.config.text_encoder.vocab_size for p in encoder.parameters() if p.dim() == 2)
        got = embed_prompt(encoder, tokens, length=512)
    assert torch.equal(got, whole)


def test_the_worker_does_not_spin_while_it_waits_for_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    spinning: list[bool] = []

    class Event:
        def __init__(self, *, blocking: bool = False) -> None:
            self.blocking = blocking

        def synchronize(self) -> None:
            spinning.append(not self.blocking)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: SimpleNamespace(wait_stream=lambda _: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    offload._Copies(torch.device("cuda:0"), 2).wait_until_sent(1)
    assert spinning == [False]


class Five(nn.Module):
    """A block of five tensors; which ones stand together in a span depends on its size."""

    def __init__(self) -> None:
        super().__init__()
        for name, size in zip("abcde", (5, 90, 1, 200, 7), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(size)))


@pytest.mark.parametrize(
    ("nbytes", "together"),
    [(1, "a b c d e"), (600, "a b c d e"), (800, "ab c d e"), (1100, "abc d e"), (1300, "abc de"), (2**26, "abcde")],
)
def test_spans_are_a_block_cut_between_tensors(nbytes: int, together: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors take 256, 512, 256, 1024 and 256 bytes in the buffer."""
    monkeypatch.setattr(flat_block, "SPAN_BYTES", nbytes)
    with torch.device("meta"):
        layout = FlatBlock(Five(), lambda _: torch.float32)
    spans = layout.spans()
    assert ["".join(span.names) for span in spans] == together.split()
    assert [span.begin for span in spans] == [0, *(span.end for span in spans[:-1])]
    assert spans[-1].end == layout.nbytes == 2304
    flat = torch.zeros(layout.nbytes, dtype=torch.uint8)
    whole = layout.views(flat)
    for span in spans:
        part = layout.views(flat[span.begin : span.end], span)
        assert list(part) == list(span.names)
        assert all(part[name].data_ptr() == whole[name].data_ptr() for name in part)


def test_a_block_without_tensors_has_no_spans() -> None:
    assert FlatBlock(nn.Identity(), lambda _: torch.float32).spans() == []


class LateCopies:
    """Stands for a card's copies: each is made only when something waits for it."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Tensor, int | None]] = []
        self._lock = threading.Lock()

    def into(self, _slot: int) -> AbstractContextManager[None]:
        return nullcontext()

    def copy(self, target: Tensor, source: Tensor, buffer: int | None = None) -> None:
        with self._lock:
            self.asked.append((target, source, buffer))

    def wait_until_sent(self, buffer: int) -> None:
        with self._lock:
            while any(asked[2] == buffer for asked in self.asked):
                self._make_one()

    def wait_until_copied(self, _slot: int) -> None:
        with self._lock:
            while self.asked:
                self._make_one()

    def _make_one(self) -> None:
        target, source, _ = self.asked.pop(0)
        target.copy_(source)

    def mark_freed(self, _slot: int) -> None: ...
    def finish(self) -> None: ...


def five_streamed(copies: LateCopies | None) -> StreamedBlocks:
    """Return six blocks, the second resident, each tensor filled with a number of its own."""

    def fill(index: int, views: Mapping[str, Tensor]) -> None:
        for name, view in views.items():
            view.fill_(10 * index + "abcde".index(name))

    with torch.device("meta"):
        modules = [Five() for _ in range(6)]
    layouts = [FlatBlock(module, lambda _: torch.float32) for module in modules]
    resident = layouts[1].onto(modules[1], torch.empty(layouts[1].nbytes, dtype=torch.uint8))
    fill(1, dict(resident.named_parameters()))
    blocks = StreamedBlocks(modules, layouts, fill, Residency(frozenset({1}), "file"), CPU)
    if copies is not None:
        for future in blocks._pending.values():
            future.result()
        blocks._host = host_blocks.HostBlocks(blocks._streamed, layouts, fill, "file", CPU)
        blocks._copies = copies  # type: ignore[assignment]
        for flat in blocks._flat:
            flat.zero_()
        blocks._begin()
    return blocks


def seen(blocks: StreamedBlocks) -> list[list[list[float]]]:
    """Return which numbers each tensor of each block holds."""
    return [[tensor.unique().tolist() for tensor in block.parameters()] for block in blocks]


EACH_ITS_OWN = [[[10.0 * index + place] for place in range(5)] for index in range(6)]


@pytest.mark.parametrize(("nbytes", "largest"), [(1, 1024), (800, 1024), (1300, 1280), (2**26, 2304)])
def test_spans_from_a_file_reach_the_card_through_two_buffers_whole_and_in_order(
    nbytes: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_block, "SPAN_BYTES", nbytes)
    monkeypatch.setattr(host_blocks, "_page_lock", lambda *_: False)
    blocks = five_streamed(LateCopies())
    assert blocks._host is not None and blocks._host._slab.nbytes == 2 * largest
    for _ in range(3):
        assert seen(blocks) == EACH_ITS_OWN
    blocks.close()


def test_a_buffer_that_is_filled_before_its_copy_was_made_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above is worth."""
    monkeypatch.setattr(flat_block, "SPAN_BYTES", 1)
    monkeypatch.setattr(host_blocks, "_page_lock", lambda *_: False)
    monkeypatch.setattr(LateCopies, "wait_until_sent", lambda *_: None)
    blocks = five_streamed(LateCopies())
    assert seen(blocks) != EACH_ITS_OWN
    blocks.close()
