"""What the safety checker and prompt expansion go by; `wan_local.settings` reads them from `configs/`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SafetyConfig:
    """Thresholds and terms of the safety checker; `configs/safety.toml` says what each is."""

    flag_one: float
    flag_two: float
    output_frames: int
    unsafe_labels: tuple[str, ...]
    blocked: tuple[str, ...]
    suggestive: tuple[str, ...]
    harmless: tuple[str, ...]
    minors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ExpansionModel:
    """A language model that prompt expansion looks for. `block_parameters`: of one of its `num_blocks` layers."""

    repository: str
    licence: str
    download_gigabytes: int
    parameters: int
    block_parameters: int
    num_blocks: int

    @property
    def folder_name(self) -> str:
        return self.repository.split("/")[1]


@dataclass(frozen=True, slots=True)
class ExpansionConfig:
    """Limits, instructions and models of prompt expansion; `configs/expansion.toml` says what each is."""

    max_new_tokens: int
    max_seconds: float
    image_area: int
    temperature: float
    top_p: float
    top_k: int
    max_words: int
    refusals: tuple[str, ...]
    with_pictures: str
    without_pictures: str
    models: tuple[ExpansionModel, ...]
