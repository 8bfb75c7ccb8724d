"""Random language models of the classes that prompt expansion uses, 400 KB and less, in folders as published."""

from __future__ import annotations

import json
from pathlib import Path

import torch

TEXTS = ("a small blue bird takes off from the ground, flapping its wings " * 4, "The camera follows it upward.")
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SIZES |= {"intermediate_size": 64, "num_hidden_layers": 4, "max_position_embeddings": 4096}


def save_tokenizer(folder: Path, chat_template: str = "{{ messages }}") -> int:
    """Write a byte-level tokenizer with Qwen's marks; return the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=list(MARKS))
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return len(fast)


def mark(name: str) -> int:
    return MARKS.index(name)  # special tokens come first in the vocabulary


def _finish(model: torch.nn.Module, folder: Path) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="150KB")  # type: ignore[operator]
    ends = {"eos_token_id": [mark("<|im_end|>"), mark("<|endoftext|>")]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


def seeing_model(folder: Path, *, tied: bool = True) -> Path:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {**SIZES, "vocab_size": save_tokenizer(folder), "rope_parameters": rope}
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    marks = {"image_token_id": mark("<|image_pad|>"), "video_token_id": 10**6}
    marks |= {"vision_start_token_id": mark("<|vision_start|>"), "vision_end_token_id": mark("<|vision_end|>")}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **marks)
    half = [0.5, 0.5, 0.5]
    Qwen2VLImageProcessorPil(patch_size=16, image_mean=half, image_std=half).save_pretrained(folder)
    return _finish(Qwen3VLForConditionalGeneration(config), folder)


def blind_model(folder: Path, *, thinks: bool = False) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    size = save_tokenizer(folder, "{% if enable_thinking %}{% endif %}" if thinks else "{{ messages }}")
    return _finish(Qwen3ForCausalLM(Qwen3Config(**SIZES, vocab_size=size, tie_word_embeddings=True)), folder)
