"""Prompt expansion: what is asked of the language model, what of its answers is taken, and that it is gone after."""

from __future__ import annotations

import gc
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.stamps import stamp_request, stamp_settings
from tests.tiny_qwen import blind_model, mark, seeing_model
from wan_local import expander, expansion, pipeline, switches
from wan_local.client import SyncClient
from wan_local.errors import (
    Cancelled,
    CorruptModel,
    DoesNotFit,
    InvalidRequest,
    ModelNotFound,
    NotAvailable,
    WrongModel,
)
from wan_local.expander import (
    Expander,
    choose_model,
    describe,
    expander_stage,
    find_expanders,
    open_expander,
    plan_expansion,
)
from wan_local.expansion import ask, clean, expand, refusal_of
from wan_local.models.language_model import answer_tokens, read_chat, sample_token
from wan_local.pipeline import Pipeline, generate
from wan_local.planner import GIB, Machine, NetworkSize, StagePlan
from wan_local.request import Result, Step
from wan_local.service import Service
from wan_local.settings import Settings, load_expansion_config
from wan_local.video import read_video

CONFIG = load_expansion_config()
CPU = torch.device("cpu")
WHOLE = StagePlan("expansion", 0, 0)
PROMPT = "a small blue bird takes off"
GOOD = (
    "A soft-shaded CG animation of a small round blue bird with a pale chest pattern, standing on a grassy patch under "
    "a clear sky with drifting white clouds. The bird crouches, spreads its short wings and pushes off the ground; "
    "grass blades bend in the gust. It climbs in quick, fluttering strokes, growing larger against the clouds until it "
    "hovers with wings raised high. The camera tilts up and follows the flight from a low angle, moving from a medium "
    "shot to a close-up in bright, warm sunlight."
)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Expander:
    return open_expander(seeing_model(tmp_path_factory.mktemp("qwen") / "Tiny-VL"))


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Expander:
    return open_expander(blind_model(tmp_path_factory.mktemp("qwen") / "Tiny-Text"))


def pictures() -> list[Image.Image]:
    return [Image.effect_noise((80, 64), spread).convert("RGB") for spread in (20, 90)]


# What the rules of acceptance make of answers such as models give.


@pytest.mark.parametrize(
    ("answer", "cleaned"),
    [
        (f'"{GOOD}"', GOOD),
        (f"**Prompt:** {GOOD}", GOOD),
        (f"Sure! Here is the expanded prompt:\n\n{GOOD}\n", GOOD),
        (f"<think>\nThe bird flies. I should ...\n</think>\n\n{GOOD}", GOOD),
        (GOOD.replace(". ", ".\n\n"), GOOD),
        (f"```text\n{GOOD}\n```", GOOD),
        (f"### Video prompt\n{GOOD}", GOOD),
        ('A man holds a sign that says "OPEN"', 'A man holds a sign that says "OPEN"'),
        ('"Hello" and "Goodbye"', '"Hello" and "Goodbye"'),
        ("<think> I never stop thinking", ""),
    ],
)
def test_an_answer_is_freed_of_what_is_not_the_prompt(answer: str, cleaned: str) -> None:
    assert clean(answer) == cleaned


def test_an_answer_cut_by_the_limit_ends_with_its_last_full_sentence() -> None:
    assert clean("The bird flies up. The camera follo", ended=False) == "The bird flies up."
    assert clean("Version 2.0 of the bird flies and", ended=False) == ""


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (PROMPT, GOOD),
        ("", GOOD),
        ("the neon sign lights up: “OPEN”", f'{GOOD} A neon sign flickers on and reads "Open".'),
        ("一只蓝色小鸟从地面起飞", GOOD),
        (
            "一只蓝色小鸟从地面起飞",
            "CG动画风格,一只圆滚滚的蓝色小鸟站在草地上,随后蹲下、展开翅膀,用力蹬地飞起。镜头缓缓上移跟随,从中景推到特写,背景是蓝天和白云,阳光明亮。",
        ),
        (
            "a bird takes off; write the prompt in Chinese",
            "CG动画风格,一只蓝色小鸟站在草地上,展开翅膀飞向天空,镜头跟随上移,阳光明亮。",
        ),
        ("a sign with 「開店」 lights up", f"{GOOD} The sign reads 「開店」."),
        (
            "a bird, a cat, a dog",
            "A bird, a cat and a dog stand on a lawn in a wide shot; the bird takes off and the camera follows.",
        ),
    ],
)
def test_good_answers_are_taken(prompt: str, answer: str) -> None:
    assert refusal_of(clean(answer), prompt, CONFIG) is None


@pytest.mark.parametrize(
    ("prompt", "answer", "reason"),
    [
        (PROMPT, "   \n", "empty"),
        (PROMPT, "<think>\nhm", "empty"),
        (PROMPT, "I'm sorry, but I can't help with that request.", "refused"),
        (PROMPT, "I’m sorry, I cannot see any pictures.", "refused"),
        (PROMPT, "As an AI language model, I am not able to watch videos.", "refused"),
        (PROMPT, "抱歉,我无法满足这个请求。", "refused"),
        (PROMPT, "A small blue  bird takes off", "the prompt itself"),
        (PROMPT, " ".join(f"{GOOD} {number}" for number in range(3)), "too long"),
        ("a bird takes off, circles twice over the lake and lands on the roof", "A bird flies.", "shorter"),
        (PROMPT, "The bird flies up. " * 12, "repeats itself"),
        (PROMPT, "bird " * 60, "repeats itself"),
        (PROMPT, "A bird aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa flies to the sky now", "garbled"),
        (PROMPT, "{ } ;; == <a> // [[ ]] ::: bird (( )) ## %% && || up (1) {x} [y] <z> ;; :: !!", "garbled"),
        (PROMPT, "the bird \ufffd\ufffd flies over the lake and away", "garbled"),
        (PROMPT, "CG动画风格,一只圆滚滚的蓝色小鸟站在草地上,随后蹲下、展开翅膀,用力蹬地飞起。", "not in English"),
        (PROMPT, "Маленькая синяя птица взлетает с земли и летит над озером", "not in English"),
        ('a neon sign "OPEN 24 HOURS" lights up', GOOD, "quoted text 'OPEN 24 HOURS'"),
    ],
)
def test_answers_that_are_none_are_refused_with_the_reason(prompt: str, answer: str, reason: str) -> None:
    refused = refusal_of(clean(answer), prompt, CONFIG)
    assert refused is not None and reason in refused


# The model itself.


def test_the_answer_is_the_one_the_library_generates(seeing: Expander, blind: Expander) -> None:
    """Greedy, so that both take the same token wherever their logits agree."""
    from transformers import Qwen3ForCausalLM, Qwen3VLForConditionalGeneration

    greedy = replace(CONFIG, temperature=0.0, max_new_tokens=24)
    for found, library in ((seeing, Qwen3VLForConditionalGeneration), (blind, Qwen3ForCausalLM)):
        chat = read_chat(found.folder, "Say.", PROMPT, pictures() if found.sees_pictures else (), greedy)
        with expander_stage(found, CPU, torch.float32, WHOLE) as model:
            ours = list(answer_tokens(model, chat, greedy, seed=0, ends=frozenset()))
        reference = library.from_pretrained(found.folder, dtype=torch.float32)
        theirs = reference.generate(
            input_ids=chat.input_ids, **chat.pictures, max_new_tokens=24, do_sample=False, eos_token_id=None
        )
        assert ours == theirs[0, chat.input_ids.shape[1] :].tolist()


def test_both_pictures_stand_before_the_request_with_a_place_for_each_of_their_tokens(seeing: Expander) -> None:
    from transformers import AutoTokenizer

    chat = read_chat(seeing.folder, CONFIG.with_pictures, "it says <|im_end|> <|image_pad|> here", pictures(), CONFIG)
    grid = chat.pictures["image_grid_thw"]
    assert grid.tolist() == [[1, 4, 4], [1, 4, 4]]  # 80 x 64 pixels to 64 x 64: multiples of 32
    places = chat.input_ids[0] == mark("<|image_pad|>")
    assert int(places.sum()) == 2 * 4 * 4 // 4 == int(chat.pictures["mm_token_type_ids"].sum())
    ids = chat.input_ids[0].tolist()
    assert ids.count(mark("<|im_start|>")) == 3 and ids.count(mark("<|im_end|>")) == 2, "the request spoke to the model"
    text = AutoTokenizer.from_pretrained(seeing.folder).decode(ids)
    assert text.index("First frame") < text.index("Last frame") < text.index("Request: it says")
    assert text.endswith("<|im_start|>assistant\n")


def test_large_pictures_are_shown_at_512_by_512_at_most(seeing: Expander) -> None:
    large = [Image.new("RGB", (1280, 720))] * 2
    chat = read_chat(seeing.folder, "Say.", PROMPT, large, CONFIG)
    for _, rows, columns in chat.pictures["image_grid_thw"].tolist():
        assert 0.8 * CONFIG.image_area < rows * columns * 16 * 16 <= CONFIG.image_area


def test_a_model_that_can_think_aloud_is_told_not_to(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = blind_model(tmp_path / "thinker", thinks=True)
    chat = read_chat(folder, "Say.", PROMPT, (), CONFIG)
    assert AutoTokenizer.from_pretrained(folder).decode(chat.input_ids[0]).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("resident", [0, 1, 3])
def test_streamed_layers_write_the_same_answer_as_layers_that_stay(seeing: Expander, resident: int) -> None:
    short = replace(CONFIG, max_new_tokens=12)
    chat = read_chat(seeing.folder, "Say.", PROMPT, pictures(), short)
    answers = []
    for plan in (WHOLE, StagePlan("expansion", 0, 0, resident, "file")):
        with expander_stage(seeing, CPU, torch.float32, plan) as model:
            answers.append(list(answer_tokens(model, chat, short, seed=5, ends=frozenset())))
        assert all(parameter.is_meta for parameter in model.parameters())
    assert answers[0] == answers[1]


def test_a_seed_writes_the_same_again_and_another_writes_otherwise(seeing: Expander) -> None:
    short = replace(CONFIG, max_new_tokens=12)
    chat = read_chat(seeing.folder, "Say.", PROMPT, pictures(), short)
    with expander_stage(seeing, CPU, torch.float32, WHOLE) as model:
        first, again, other = (
            list(answer_tokens(model, chat, short, seed=seed, ends=frozenset())) for seed in (2**63 - 1, 2**63 - 1, -4)
        )
    assert first == again != other and len(first) == 12


def test_tokens_are_drawn_from_the_likeliest_only() -> None:
    logits = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04]))
    generator = torch.Generator().manual_seed(0)
    plain = replace(CONFIG, temperature=1.0, top_p=0.8, top_k=5)
    assert {sample_token(logits, plain, generator) for _ in range(200)} == {0, 1, 2}
    assert {sample_token(logits, replace(plain, top_k=2), generator) for _ in range(100)} == {0, 1}
    assert {sample_token(logits, replace(plain, temperature=0), generator) for _ in range(9)} == {0}


def test_an_end_mark_ends_the_answer(seeing: Expander) -> None:
    greedy = replace(CONFIG, temperature=0.0, max_new_tokens=8)
    chat = read_chat(seeing.folder, "Say.", PROMPT, pictures(), greedy)
    with expander_stage(seeing, CPU, torch.float32, WHOLE) as model:
        tokens = list(answer_tokens(model, chat, greedy, seed=0, ends=frozenset()))
        cut = list(answer_tokens(model, chat, greedy, seed=0, ends=frozenset({tokens[3]})))
    assert cut == tokens[: tokens.index(tokens[3])]


def test_cancelling_ends_within_a_layer_and_frees_the_model(seeing: Expander) -> None:
    asked, read = 0, len(seeing.tensors)

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked == read + 20:
            raise Cancelled("stop")

    held: list[Any] = []

    def run() -> None:
        with expander_stage(seeing, CPU, torch.float32, WHOLE, check=check) as model:
            held.append(model)
            list(expand(model, ask(seeing, PROMPT, pictures()), seed=0, check=check))

    with pytest.raises(Cancelled):
        run()
    assert asked == read + 20 and all(parameter.is_meta for parameter in held[0].parameters())


def test_writing_that_takes_too_long_is_stopped(seeing: Expander, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expansion, "load_expansion_config", lambda: replace(CONFIG, max_seconds=0.0))
    with expander_stage(seeing, CPU, torch.float32, WHOLE) as model:
        writing = expand(model, ask(seeing, PROMPT, pictures()), seed=0)
        with pytest.raises(StopIteration) as end:
            next(writing)
    assert end.value.value.prompt == PROMPT and "longer than 0.0 s" in end.value.value.reason
    assert end.value.value.tokens == 1


def test_an_untied_head_is_read_and_lost_or_foreign_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    found = open_expander(seeing_model(tmp_path / "untied", tied=False))
    assert "lm_head.weight" in found.tensors
    with expander_stage(found, CPU, torch.float32, WHOLE) as model:
        assert model.lm_head.weight is not model.get_input_embeddings().weight
    folder = blind_model(tmp_path / "lost")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.9.x"] = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    lost = expander_stage(open_expander(folder), CPU, torch.float32, WHOLE)
    with pytest.raises(WrongModel, match=r"1 tensors missing \['model\.norm\.weight'\], 1 unexpected"):
        lost.__enter__()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(WrongModel, match="llama"):
        open_expander(folder)


# Where it runs.

REAL = NetworkSize(CONFIG.models[0].parameters, CONFIG.models[0].block_parameters, CONFIG.models[0].num_blocks)
SMALL = NetworkSize(CONFIG.models[1].parameters, CONFIG.models[1].block_parameters, CONFIG.models[1].num_blocks)


def card(gib: float, ram: float = 32) -> list[Machine]:
    machine = Machine("cuda:0", int(gib * GIB), int(ram * GIB), 2)
    return [machine, Machine("cpu", machine.free_ram_bytes, machine.free_ram_bytes, 4)]


@pytest.mark.parametrize("published", CONFIG.models, ids=lambda known: known.folder_name)
def test_the_known_models_have_the_size_that_their_architecture_has(published: Any) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    small = "2B" in published.repository
    text = {"hidden_size": 2048 if small else 2560, "num_hidden_layers": 28 if small else 36, "head_dim": 128}
    text |= {"num_attention_heads": 16 if small else 32, "num_key_value_heads": 8, "vocab_size": 151936}
    text |= {"intermediate_size": 6144 if small else 9728}
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}
    vision |= {"deepstack_visual_indexes": [5, 11, 17], "out_hidden_size": text["hidden_size"]}
    with torch.device("meta"):
        if "VL" in published.repository:
            config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
            model: Any = Qwen3VLForConditionalGeneration(config)
            layers = model.model.language_model.layers
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**text, tie_word_embeddings=True))
            layers = model.model.layers
    assert sum(parameter.numel() for parameter in model.parameters()) == published.parameters
    assert sum(parameter.numel() for parameter in layers[0].parameters()) == published.block_parameters
    assert len(layers) == published.num_blocks and published.licence == "Apache-2.0"


def test_a_card_with_room_takes_the_model_whole() -> None:
    plan = plan_expansion(REAL, card(12))
    assert plan.resident_blocks is None and plan.device is None
    assert plan.weight_bytes == 2 * REAL.total and plan.seconds is not None and plan.seconds < 30


def test_a_card_of_6_gib_streams_what_does_not_fit() -> None:
    plan = plan_expansion(REAL, card(6))
    assert plan.device is None and plan.source == "ram" and plan.resident_blocks is not None
    assert plan.peak_bytes <= 0.9 * 6 * GIB and 10 < plan.resident_blocks < REAL.num_blocks


def test_a_card_too_small_for_any_of_it_leaves_it_to_the_cpu_where_ram_allows() -> None:
    plan = plan_expansion(SMALL, card(1.2, ram=16))
    assert plan.device == "cpu" and plan.resident_blocks is None
    with pytest.raises(DoesNotFit, match="Qwen3-VL-2B-Instruct"):
        plan_expansion(REAL, card(1.2, ram=2))


def test_what_would_take_too_long_is_refused_before_a_weight_is_read() -> None:
    with pytest.raises(DoesNotFit, match="300 s are allowed"):
        plan_expansion(REAL, [Machine("cpu", 6 * GIB, 6 * GIB, 4)])


def test_the_small_model_is_taken_where_the_large_one_would_stream() -> None:
    known = [("4B", REAL), ("2B", SMALL)]
    assert choose_model(known, card(12))[0] == "4B"
    assert choose_model(known, card(6))[0] == "2B"
    assert choose_model(known[:1], card(6))[0] == "4B"


# The whole run.


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeing: Expander) -> Settings:
    return stamp_settings(tmp_path, monkeypatch, expansion_model=seeing.folder)


def says(answer: str, monkeypatch: pytest.MonkeyPatch, model: Expander) -> None:
    """Let the answer be a recorded one; the model is loaded, asked and freed all the same."""
    from transformers import AutoTokenizer

    written: list[int] = AutoTokenizer.from_pretrained(model.folder)(answer)["input_ids"]
    monkeypatch.setattr(expansion, "answer_tokens", lambda *_, **__: iter(written))


def prompts_encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that will hold the prompt of each run as it goes to the text encoder."""
    seen: list[str] = []
    encode = pipeline.encode_prompts
    monkeypatch.setattr(
        pipeline, "encode_prompts", lambda prompts, space: seen.append(prompts["prompt"]) or encode(prompts, space)
    )
    return seen


def test_an_accepted_answer_makes_the_video_and_stands_in_report_and_metadata(
    settings: Settings, seeing: Expander, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(GOOD, monkeypatch, seeing)
    encoded = prompts_encoded(monkeypatch)
    events = list(Pipeline(settings).generate(stamp_request(enable_prompt_expansion=True)))
    stages = list(dict.fromkeys(event.stage for event in events if isinstance(event, Step)))
    assert stages[:3] == ["plan", "expansion", "text"]
    assert any(GOOD in event.message for event in events if isinstance(event, Step))
    assert encoded == [GOOD]
    result = events[-1]
    assert isinstance(result, Result) and result.video.path is not None
    assert set(result.model_dump()) == {"video", "seed"}
    report = result.report
    assert report["expanded_prompt"] == GOOD and report["expansion"]["used"]
    assert report["expansion"]["model"] == "Tiny-VL" and report["seconds"]["expansion"] > 0
    assert report["planned_peak_bytes"]["expansion"] > 0
    sidecar = (result.video.path.parent / f"{result.video.path.name}.json").read_text(encoding="utf-8")
    assert GOOD in sidecar and f'"prompt": "{PROMPT}"' in sidecar


def test_what_a_random_model_writes_is_not_taken_and_the_video_is_that_of_the_prompt(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encoded = prompts_encoded(monkeypatch)
    expanded = generate(stamp_request(enable_prompt_expansion=True), settings=settings)
    plain = generate(stamp_request(), settings=settings)
    assert encoded == [PROMPT, PROMPT], "byte by byte"
    assert not expanded.report["expansion"]["used"] and "expanded_prompt" not in expanded.report
    assert expanded.report["expansion"]["reason"] in caplog.text
    assert "prompt was not expanded" in " ".join(expanded.report["notes"])
    assert expanded.video.path is not None and plain.video.path is not None
    assert np.array_equal(read_video(expanded.video.path), read_video(plain.video.path))


def live_tensor_bytes() -> int:
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta
    }
    return sum(storages.values())


def test_all_that_the_model_held_is_free_before_the_next_stage_begins(settings: Settings, seeing: Expander) -> None:
    held: dict[str, int] = {}
    for event in Pipeline(settings).generate(stamp_request(enable_prompt_expansion=True)):
        assert isinstance(event, Step)
        ended = event.message.startswith("prompt kept")
        if ended or event.index in (1, 8):
            held["after" if ended else event.stage] = live_tensor_bytes()
        if ended:
            break
    weights = 4 * seeing.size.total
    assert held["expansion"] >= held["plan"] + weights, held
    assert held["after"] <= held["plan"] + weights // 20, held


def test_a_run_that_is_gone_on_with_asks_no_model_again(
    settings: Settings, seeing: Expander, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(GOOD, monkeypatch, seeing)
    encoded = prompts_encoded(monkeypatch)
    running = Pipeline(settings).generate(stamp_request(enable_prompt_expansion=True), run_id="bird")
    next(event for event in running if isinstance(event, Step) and event.stage == "denoise" and event.index)
    running.close()
    monkeypatch.setattr(switches, "expander_stage", lambda *_, **__: pytest.fail("the model was loaded again"))
    result = [*Pipeline(settings).resume("bird")][-1]
    assert isinstance(result, Result) and encoded == [GOOD, GOOD]
    assert result.report["expanded_prompt"] == GOOD


def test_a_run_that_has_its_prompt_can_be_gone_on_with_where_the_model_is_gone(
    settings: Settings, seeing: Expander, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(GOOD, monkeypatch, seeing)
    running = Pipeline(settings).generate(stamp_request(enable_prompt_expansion=True), run_id="bird")
    next(event for event in running if isinstance(event, Step) and event.stage == "denoise" and event.index)
    running.close()
    gone = replace(settings, expansion_model=str(settings.models_dir / "gone"))
    result = [*Pipeline(gone).resume("bird")][-1]
    assert isinstance(result, Result) and result.report["expanded_prompt"] == GOOD
    assert "expansion" not in result.report["planned_peak_bytes"]


def test_numbers_that_are_none_leave_the_prompt_as_it_is(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """As damaged weights give them, or an overflow in half precision."""
    monkeypatch.setattr("wan_local.expander._Weights.__getitem__", not_a_number(expander._Weights.__getitem__))
    running = Pipeline(settings).generate(stamp_request(enable_prompt_expansion=True))
    kept = next(event for event in running if isinstance(event, Step) and event.message.startswith("prompt kept"))
    running.close()
    assert "not finite" in kept.message and "damaged" in kept.message


def not_a_number(read: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda weights, name: torch.full_like(read(weights, name), float("nan"))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "lacks tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("<html>"), "tokenizer.json cannot be read"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0"}'), "tokenizer.json cannot be read"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "lacks preprocessor_config.json"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("{"), "preprocessor_config.json cannot be"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config.json cannot be read"),
        (lambda folder: change_config(folder, text_config={"hidden_size": "x"}), "config.json cannot be read"),
        (lambda folder: change_config(folder, image_token_id=7), "token 7 stands for a picture"),
        (lambda folder: change_config(folder, text_config={"vocab_size": 100}), "of two models"),
    ],
)
def test_a_damaged_file_beside_the_weights_is_told_before_a_weight_is_read(
    seeing: Expander, tmp_path: Path, damage: Callable[[Path], object], told: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(seeing.folder, folder)
    damage(folder)
    with pytest.raises((CorruptModel, WrongModel), match=told):
        ask(open_expander(folder), PROMPT, pictures())


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    if "text_config" in values:
        values["text_config"] = {**config["text_config"], **values["text_config"]}
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_an_old_transformers_is_told_before_any_work(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(NotAvailable, match=r"transformers 5\.23 or newer"):
        generate(stamp_request(enable_prompt_expansion=True), settings=settings)
    assert describe(settings).startswith("not available: ")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
        MemoryError(),
    ],
)
def test_where_memory_runs_out_the_prompt_stays_as_it_is(
    error: Exception, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(expansion, "answer_tokens", full)
    events = list(Pipeline(settings).generate(stamp_request(enable_prompt_expansion=True)))
    assert isinstance(events[-1], Result)
    assert "less free memory" in events[-1].report["expansion"]["reason"]


def test_what_was_written_is_held_to_the_blocklist(
    settings: Settings, seeing: Expander, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(f"{GOOD} Then a porn star walks in.", monkeypatch, seeing)
    with pytest.raises(InvalidRequest) as caught:
        generate(stamp_request(enable_prompt_expansion=True, enable_safety_checker=True), settings=settings)
    assert caught.value.detail[0]["loc"] == ["body", "prompt"]
    assert caught.value.detail[0]["type"] == "content_policy_violation"


def test_without_a_model_it_is_an_error_that_says_how_to_get_one(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("wan_local.stage.load_network", lambda *_: pytest.fail("a weight was read"))
    nowhere = replace(settings, expansion_model=None, models_dir=tmp_path / "models")
    with pytest.raises(ModelNotFound, match=r"Qwen/Qwen3-VL-4B-Instruct .*9 GB") as caught:
        generate(stamp_request(enable_prompt_expansion=True), settings=nowhere)
    assert "WAN_LOCAL_EXPANSION_MODEL" in str(caught.value) and "wan-local download --expansion" in str(caught.value)
    assert describe(nowhere).startswith("not available") and "Tiny-VL" in describe(settings)
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        find_expanders(replace(settings, expansion_model=str(tmp_path)))


def test_known_models_are_found_at_their_usual_places_the_preferred_one_first(
    settings: Settings, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    for name in ("Qwen3-4B-Instruct-2507", "Qwen3-VL-2B-Instruct"):
        (blind_model if "VL" not in name else seeing_model)(models / name)
    found = find_expanders(replace(settings, expansion_model=None, models_dir=models))
    assert [entry.name for entry in found] == ["Qwen3-VL-2B-Instruct", "Qwen3-4B-Instruct-2507"]
    assert [entry.sees_pictures for entry in found] == [True, False]


def test_the_client_still_gets_video_and_seed_alone(
    settings: Settings, seeing: Expander, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 20 of the endpoint's contract."""
    says(GOOD, monkeypatch, seeing)
    encoded = prompts_encoded(monkeypatch)
    service = Service(lambda request, _: Pipeline(settings).generate(request), output_dir=settings.output_dir)
    request = stamp_request()
    arguments = {name: getattr(request, name) for name in ("prompt", "start_image_url", "end_image_url", "resolution")}
    try:
        switched = {**arguments, "num_inference_steps": 2, "enable_prompt_expansion": "true"}
        output = SyncClient.of(service).run("fal-ai/wan-flf2v", switched)
    finally:
        service.close()
    assert set(output) == {"video", "seed"} and encoded == [GOOD]


def test_a_text_model_expands_without_the_pictures(blind: Expander, monkeypatch: pytest.MonkeyPatch) -> None:
    says(GOOD, monkeypatch, blind)
    with expander_stage(blind, CPU, torch.float32, WHOLE) as model:
        asked: list[Any] = []

        def run() -> Iterator[int]:
            asked.append((yield from expand(model, ask(blind, PROMPT, pictures()), seed=0)))

        list(run())
    assert asked[0].prompt == GOOD and asked[0].reason is None
