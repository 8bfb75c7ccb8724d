"""Prompts and pictures to what the denoiser is told: from the cache, else by an encoder that is loaded for it.

On a hit no weight is read, and what the cache gives is what the encoder gave, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from wan_local.cache import make_key
from wan_local.conditioning import (
    clean_prompt,
    embed_images,
    embed_prompt,
    encode_condition,
    load_tokenizer,
    tokenize,
)
from wan_local.identity import folder_identity, part_identity, part_times
from wan_local.key_map import Part
from wan_local.ladder import Rung
from wan_local.record import Record, fingerprint
from wan_local.workspace import Workspace

Encoding = Literal["text", "image", "condition"]
Prompts = Mapping[str, str]  # by the field they came in
Pictures = tuple[Tensor, Tensor]  # each [3, H, W] in [-1, 1]


def encode_prompts(prompts: Prompts, space: Workspace) -> dict[str, Tensor]:
    """Return the embeddings [1, text_tokens, text_dim] of every prompt, float32, zero beyond its true length."""
    length = space.files.config.transformer.text_tokens
    cleaned = {name: clean_prompt(text) for name, text in prompts.items()}
    keys = {name: _text_key(text, length, space) for name, text in cleaned.items()}
    found = {name: space.cache.get(key) for name, key in keys.items()}
    missing = [name for name, record in found.items() if record is None]
    if missing:
        for attempt in space.attempts("text"):
            with attempt as rung:
                fresh = _embed_prompts([cleaned[name] for name in missing], length, space, rung)
                for name, made in zip(missing, fresh, strict=True):
                    found[name] = made
                    _keep("text", keys[name], made, space, rung)
    embeds: dict[str, Tensor] = {}
    for name, known in found.items():
        assert known is not None, "an attempt succeeds or the last one raises"
        if cut := known.header["cut"]:
            space.report.note(f"{name} is {length + cut} tokens long; the last {cut} beyond {length} were left out.")
        used = known.tensors["embeds"].to(space.device)
        embeds[name] = used.new_zeros((1, length, used.shape[2]))
        embeds[name][:, : used.shape[1]] = used
    return embeds


def _embed_prompts(prompts: Sequence[str], length: int, space: Workspace, rung: Rung) -> list[Record]:
    """Return a record of each prompt's embeddings, without the zeros beyond its true length."""
    tokenizer = load_tokenizer(space.files.folder / "tokenizer")
    records = []
    with space.open("text_encoder", rung) as text_encoder:
        for prompt in prompts:
            tokens = tokenize(tokenizer, prompt, limit=length)
            embeds = embed_prompt(text_encoder, tokens, length=length)
            records.append(Record({"embeds": embeds[:, : tokens.input_ids.shape[1]]}, {"cut": tokens.cut}))
    return records


def encode_images(pictures: Pictures, space: Workspace) -> Tensor:
    """Return image_embeds [1, image_tokens, image_dim], float32."""

    def embed(rung: Rung) -> Tensor:
        with space.open("image_encoder", rung) as image_encoder:
            return embed_images(image_encoder, pictures, space.files.config.image_encoder)

    key = _key("image", space, encoder=_identity("image_encoder", space), pictures=fingerprint(pictures))
    return _cached("image", key, embed, space)


def encode_frames(pictures: Pictures, generated_frames: int, space: Workspace) -> Tensor:
    """Return the condition [1, 4 + z_dim, T, H/8, W/8], float32: the mask and both frames' latents."""

    def encode(rung: Rung) -> Tensor:
        with space.open("vae_encoder", rung) as vae:
            return encode_condition(vae, pictures, generated_frames, tiling=rung.plan.tiling, check=space.check)

    tiling = space.ladder.planned("condition").tiling
    key = _key(
        "condition",
        space,
        vae=_identity("vae", space),
        pictures=fingerprint(pictures),
        frames=generated_frames,
        tiling=str(tiling),
    )
    return _cached("condition", key, encode, space)


def _cached(name: Encoding, key: str, encode: Callable[[Rung], Tensor], space: Workspace) -> Tensor:
    record = space.cache.get(key)
    if record is None:
        for attempt in space.attempts(name):
            with attempt as rung:
                record = Record({"encoding": encode(rung)}, {})
                _keep(name, key, record, space, rung)
    assert record is not None, "an attempt succeeds or the last one raises"
    return record.tensors["encoding"].to(space.device)


def _keep(name: Encoding, key: str, record: Record, space: Workspace, rung: Rung) -> None:
    """Keep an encoding that is finite: for this run, and for others if memory did not run out while it was made."""
    if all(bool(tensor.isfinite().all()) for tensor in record.tensors.values()):
        as_planned = rung.device == space.device and rung.plan.tiling == space.ladder.planned(name).tiling
        space.cache.put(key, record.tensors, record.header, shared=as_planned)


def _text_key(prompt: str, length: int, space: Workspace) -> str:
    tokenizer = folder_identity(space.files.folder / "tokenizer")
    encoder = _identity("text_encoder", space)
    return _key("text", space, encoder=encoder, tokenizer=tokenizer, prompt=prompt, length=length)


def _identity(part: Part, space: Workspace) -> str:
    return f"{part_identity(space.files, part)} {part_times(space.files, part)}"


def _key(kind: Encoding, space: Workspace, **depends_on: object) -> str:
    """Return a key that also tells where and how it was computed, for the bits to be the same."""
    arithmetic, device = space.ladder.planned(kind).int8_arithmetic, space.device.type
    return make_key(
        kind, torch=torch.__version__, device=device, dtype=space.dtype, arithmetic=arithmetic, **depends_on
    )
