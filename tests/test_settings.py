from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest

from wan_local.geometry import Size
from wan_local.settings import known_models, load_acceleration_config, load_model_config, load_settings


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODEL", "DEVICE", "OUTPUT_DIR", "MODELS_DIR", "URL_SCHEME", "PRECISION", "EMBED_METADATA"):
        monkeypatch.delenv(f"WAN_LOCAL_{name}", raising=False)


def test_what_is_passed_wins_over_the_environment_and_that_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().model is None
    monkeypatch.setenv("WAN_LOCAL_MODEL", "tiny")
    monkeypatch.setenv("WAN_LOCAL_EMBED_METADATA", "no")
    assert load_settings().model == "tiny"
    assert load_settings().embed_metadata is False
    assert load_settings(model="/weights").model == "/weights"
    assert load_settings(model=None).model == "tiny"


def test_paths_are_absolute_and_know_the_home_folder() -> None:
    settings = load_settings(output_dir="~/videos", models_dir="here")
    assert settings.output_dir == Path.home() / "videos"
    assert settings.models_dir == Path.cwd() / "here"


@pytest.mark.parametrize(
    "wrong", [{"modle": "tiny"}, {"url_scheme": "ftp"}, {"precision": "low"}, {"embed_metadata": "perhaps"}]
)
def test_a_wrong_name_or_value_is_refused_with_the_choices(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"known are|it can be"):
        load_settings(**wrong)


def test_both_known_models_speak_of_the_same_architecture() -> None:
    real, tiny = known_models()
    assert real.embedded is None and tiny.embedded == "tiny_model"
    for config in (real, tiny):
        assert config.transformer.in_channels == 36
        assert config.transformer.image_tokens == 2 * config.image_encoder.tokens
        assert config.transformer.text_dim == config.text_encoder.d_model
        assert config.transformer.image_dim == config.image_encoder.hidden_size
        assert len(config.vae.latents_mean) == len(config.vae.latents_std) == config.vae.z_dim == 16
    assert real.vae.dim_mult == tiny.vae.dim_mult
    assert real.vae.temporal_downsample == tiny.vae.temporal_downsample


def test_14b_configuration_has_the_official_numbers() -> None:
    config = load_model_config("flf2v_14b")
    assert (config.transformer.num_layers, config.transformer.dim, config.transformer.ffn_dim) == (40, 5120, 13824)
    assert config.transformer.image_tokens == 514 and config.transformer.text_tokens == 512
    assert config.canvas("720p").buckets["16:9"] == Size(height=720, width=1280)


def test_configuration_of_the_tiny_model_is_what_its_folder_says() -> None:
    tiny, folder = load_model_config("flf2v_tiny"), resources.files("wan_local") / "tiny_model"
    transformer, vae, text, image = (
        json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
        for part in ("transformer", "vae", "text_encoder", "image_encoder")
    )
    for ours, theirs in (
        ("num_layers",) * 2,
        ("ffn_dim",) * 2,
        ("freq_dim",) * 2,
        ("image_tokens", "pos_embed_seq_len"),
    ):
        assert getattr(tiny.transformer, ours) == transformer[theirs]
    assert tiny.transformer.dim == transformer["num_attention_heads"] * transformer["attention_head_dim"]
    assert tiny.vae.base_dim == vae["base_dim"] and tiny.vae.num_res_blocks == vae["num_res_blocks"]
    assert tiny.vae.latents_mean == pytest.approx(vae["latents_mean"], rel=1e-5)
    assert tiny.vae.latents_std == pytest.approx(vae["latents_std"], rel=1e-5)
    assert tiny.text_encoder.vocab_size == text["vocab_size"] and tiny.text_encoder.d_kv == text["d_kv"]
    assert tiny.image_encoder.hidden_act == image["hidden_act"]


def test_merging_thresholds_are_the_documented_ones() -> None:
    config = load_acceleration_config().merge
    assert (config.tau, config.max_merged, config.tail, config.max_gap) == (0.05, 2, 2, 0.12)


def test_a_file_of_thresholds_goes_over_the_shipped_ones_and_a_named_policy_over_both(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[regular]\npolicy = "reuse"\n[merge]\ntau = 0.1\n', encoding="utf-8")
    config = load_acceleration_config(load_settings(acceleration_file=path))
    assert (config.policy, config.merge.tau, config.merge.tail, config.reuse.max_reused) == ("reuse", 0.1, 2, 2)
    assert (
        load_acceleration_config(load_settings(acceleration_file=path, acceleration_policy="merge")).policy == "merge"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[merge]\ntaw = 1", "'taw' in \\[merge\\]"),
        ("[warp]\ntau = 1", "has \\[warp\\]"),
        ('[merge]\ntau = "much"', "tau .* is 'much'"),
        ("[merge]\ntail = 1.5", "tail .* is 1.5"),
        ("[merge", "cannot be read"),
        ('[regular]\npolicy = "fast"', "acceleration_policy is 'fast'"),
        ("[merge]\ntail = 0", "mine.toml: tail in \\[merge\\] is 0; it is a number of 1 or more"),
        ("[merge]\nwarm_min = 1", "warm_min in \\[merge\\] is 1; it is a number of 2 or more"),
        ("[merge]\ntau = nan", "tau in \\[merge\\] is nan; it is a number of 0 or more"),
        ("[merge]\nmax_gap = inf", "max_gap in \\[merge\\] is inf"),
        ("[merge]\nstatic_rho = -1", "static_rho in \\[merge\\] is -1"),
        ("[reuse]\nwarm_fraction = 1.5", "warm_fraction in \\[reuse\\] is 1.5; it is a number from 0 to 1"),
        ("[reuse]\nmax_reused = -1", "max_reused in \\[reuse\\] is -1"),
    ],
)
def test_a_mistake_in_the_file_of_thresholds_is_named_at_once(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=says):
        load_settings(acceleration_file=path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_settings(acceleration_file=tmp_path / "none.toml")


@pytest.mark.parametrize("value", ["much", "-1", "nan", "inf"])
def test_a_budget_that_is_no_amount_is_refused_by_name(value: str) -> None:
    with pytest.raises(ValueError, match=f"vram_gibibytes is '{value}'; it is a number of 0 or more"):
        load_settings(vram_gibibytes=value)
