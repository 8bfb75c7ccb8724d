"""Qwen3-VL and Qwen3, from the transformers library: a chat with or without pictures to an answer, token by token.

Shape legend: L tokens, P patches of all pictures, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from wan_local.errors import CorruptModel, NotAvailable, NumericalError, WrongModel
from wan_local.request import Check, unchecked
from wan_local.switch_config import ExpansionConfig

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

SEEING, BLIND = "qwen3_vl", "qwen3"  # model_type in config.json
LAYERS = {SEEING: "model.language_model.layers", BLIND: "model.layers"}
_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
_PROCESSOR = "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl"  # new in 5.23
_MARK = re.compile(r"<\|[^|<>]*\|>")  # what speaks to the model and not of the video


@dataclass(frozen=True, slots=True)
class Chat:
    """What the model reads: `input_ids` [1, L] and, where it sees pictures, their patches and where they belong."""

    input_ids: Tensor
    pictures: dict[str, Tensor]

    def to(self, device: torch.device, dtype: torch.dtype) -> Chat:
        moved = {name: value.to(device) for name, value in self.pictures.items()}
        if "pixel_values" in moved:
            moved["pixel_values"] = moved["pixel_values"].to(dtype)
        return Chat(self.input_ids.to(device), moved)


def require_language_models() -> None:
    """Raise NotAvailable where the installed transformers is older than the classes that are used."""
    if importlib.util.find_spec(_PROCESSOR) is None:
        import transformers

        raise NotAvailable(
            f"enable_prompt_expansion needs transformers 5.23 or newer; {transformers.__version__} is installed. Run "
            "`pip install 'transformers>=5.23'` (or install wan_local with its extra `expansion`), or leave "
            "enable_prompt_expansion false. Nothing was generated."
        )


def build_language_model(folder: Path) -> nn.Module:
    """Return the module that `folder`/config.json describes, its parameters on `meta`. Raises WrongModel."""
    from transformers import AutoConfig, Qwen3ForCausalLM, Qwen3VLForConditionalGeneration

    kinds = {SEEING: Qwen3VLForConditionalGeneration, BLIND: Qwen3ForCausalLM}
    with _Readable(folder, "config.json"):
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    with torch.device("meta"):
        model: nn.Module = kinds[config.model_type](config)
    for name, part in list(model.named_modules()):
        if "inv_freq" in dict(part.named_buffers(recurse=False)):  # computed, in no checkpoint: not to stay on meta
            model.set_submodule(name, type(part)(part.config))
    return model


def load_chat_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer from the model's own folder; nothing is ever fetched."""
    from transformers import AutoTokenizer

    with _Readable(folder, "tokenizer.json"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return tokenizer


class _Readable:
    """Turns what the libraries raise about one of a model's small files into CorruptModel with the file's name.

    `tokenizers` raises plain Exception for a file that it cannot make sense of, so that class itself counts, too.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name

    def __enter__(self) -> None:
        if not (self._folder / self._name).is_file():
            raise CorruptModel(f"{self._folder} holds no {self._name}. Download the model again.")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        known = (OSError, ValueError, TypeError, LookupError, AttributeError, StrictDataclassError)
        if error is not None and (kind is Exception or isinstance(error, known)):
            why = " ".join(str(error).split())[:200]
            raise CorruptModel(
                f"{self._folder / self._name} cannot be read ({why}). Download the model again."
            ) from error


def read_chat(folder: Path, system: str, request: str, pictures: Sequence[Image], config: ExpansionConfig) -> Chat:
    """Return the tokens of a chat in Qwen's format: instructions, pictures if there are any, and a request.

    Marks such as <|im_end|> in the request are left out: they could end its turn and speak as someone else.
    """
    vocabulary = _text_config(folder).vocab_size
    tokenizer = load_chat_tokenizer(folder)
    if len(tokenizer) > vocabulary:  # a card would fail at such a token in a way that ends the process
        raise WrongModel(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens and the model {vocabulary}: they are of two models"
        )
    seen = f"First frame: {_PICTURE}\nLast frame: {_PICTURE}\n" if pictures else ""
    said = f"{seen}Request: {_MARK.sub(' ', request).strip()}"
    text = (
        f"<|im_start|>system\n{system.strip()}<|im_end|>\n<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
    )
    if "enable_thinking" in str(tokenizer.chat_template):
        text += "<think>\n\n</think>\n\n"  # how a model that can think aloud is told not to
    if not pictures:
        return Chat(torch.tensor([tokenizer(text)["input_ids"]]), {})
    return _with_pictures(folder, tokenizer(text)["input_ids"], pictures, config)


def _text_config(folder: Path) -> Any:
    from transformers import AutoConfig

    with _Readable(folder, "config.json"):
        return AutoConfig.from_pretrained(str(folder), local_files_only=True).get_text_config()


def _with_pictures(folder: Path, ids: list[int], pictures: Sequence[Image], config: ExpansionConfig) -> Chat:
    from transformers import AutoConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    with _Readable(folder, "preprocessor_config.json"):
        processor = Qwen2VLImageProcessorPil.from_pretrained(str(folder), local_files_only=True)
    size = {"shortest_edge": (processor.patch_size * processor.merge_size) ** 2, "longest_edge": config.image_area}
    patches: Any = processor(images=list(pictures), size=size, return_tensors="pt")
    counts = (patches["image_grid_thw"].prod(-1) // processor.merge_size**2).tolist()
    pad = AutoConfig.from_pretrained(str(folder), local_files_only=True).image_token_id
    if ids.count(pad) != len(counts):
        raise WrongModel(
            f"config.json in {folder} says that token {pad} stands for a picture; its tokenizer says otherwise"
        )
    input_ids = torch.tensor([_with_places(ids, pad, counts)])
    kinds = (input_ids == pad).int()
    return Chat(input_ids, {**patches, "mm_token_type_ids": kinds})


def _with_places(ids: list[int], pad: int, counts: Sequence[int]) -> list[int]:
    """Return `ids` with as many `pad` tokens in the place of each as its picture has tokens."""
    places, left = [], iter(counts)
    for token in ids:
        places += [pad] * next(left) if token == pad else [token]
    return places


@torch.no_grad()
def answer_tokens(
    model: Any, chat: Chat, config: ExpansionConfig, *, seed: int, ends: frozenset[int], check: Check = unchecked
) -> Iterator[int]:
    """Yield the answer's tokens, the end mark not among them, at most `max_new_tokens`; a seed gives them again.

    Sampled with temperature, top_k and top_p on the CPU from float32 logits, so that a card's generator has no part.
    Raises NumericalError where the model's numbers are none.
    """
    from transformers import DynamicCache

    generator = torch.Generator("cpu").manual_seed(seed)
    cache = DynamicCache(config=model.config.get_text_config())
    fresh: dict[str, Any] = {"input_ids": chat.input_ids, **chat.pictures}
    for _ in range(config.max_new_tokens):
        check()
        logits_BLV = model(**fresh, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        logits_V = logits_BLV[0, -1].float().cpu()
        if not bool(logits_V.isfinite().all()):
            raise NumericalError("the language model's numbers are not finite")
        token = sample_token(logits_V, config, generator)
        if token in ends:
            return
        yield token
        fresh = {"input_ids": torch.tensor([[token]], device=chat.input_ids.device)}


def sample_token(logits_V: Tensor, config: ExpansionConfig, generator: torch.Generator) -> int:
    """Draw a token from the `top_k` likeliest, of them the fewest that hold `top_p`; temperature 0 takes the first."""
    if config.temperature == 0:
        return int(logits_V.argmax())
    best = torch.topk(logits_V, min(config.top_k, len(logits_V)))
    probabilities = (best.values / config.temperature).softmax(0)
    kept = probabilities.cumsum(0) - probabilities < config.top_p
    drawn = torch.multinomial(probabilities * kept, 1, generator=generator)
    return int(best.indices[drawn])


def end_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end an answer, by generation_config.json and the tokenizer."""
    from transformers import GenerationConfig

    ends: set[int] = set()
    if (folder / "generation_config.json").is_file():
        with _Readable(folder, "generation_config.json"):
            named = GenerationConfig.from_pretrained(str(folder), local_files_only=True).eos_token_id
        ends |= {named} if isinstance(named, int) else set(named or ())
    if tokenizer.eos_token_id is not None:
        ends.add(int(tokenizer.eos_token_id))
    return frozenset(ends)
