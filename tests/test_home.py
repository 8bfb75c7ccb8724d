"""A container's user: no name, no HOME, or a HOME that may not be looked into. Nothing of that ends a run."""

from __future__ import annotations

import errno
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stamps import stamp_request, stamp_settings
from wan_kernels import hardware
from wan_local import probe
from wan_local.cache import EncodingCache
from wan_local.checkpoint import find_model
from wan_local.errors import ModelNotFound
from wan_local.home import home_folder, temporary_folder
from wan_local.pipeline import Pipeline
from wan_local.request import Result
from wan_local.settings import hub_cache_dir, load_settings, usual_places


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)


def test_without_a_home_everything_of_ours_goes_into_a_temporary_folder(
    no_home: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert home_folder() == temporary_folder() and home_folder().parent == tmp_path
    settings = load_settings(models_dir="here")
    assert settings.models_dir == Path.cwd() / "here"
    assert settings.state_dir.is_relative_to(home_folder()) and settings.cache_dir.is_relative_to(home_folder())
    assert hub_cache_dir().is_relative_to(home_folder())
    assert hardware.tuned_problem() == ""
    monkeypatch.setattr(probe, "world_of", lambda *_: "a world")
    monkeypatch.setattr(probe, "_tried_here", lambda *_: probe.Answer("", lasts=True))
    assert probe.problem_of("int8", torch.device("cuda")) == ""
    assert (home_folder() / probe.REMEMBERED).is_file()


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that nothing may be looked up in, as another user's home; root is kept out, too."""
    folder = tmp_path / "locked"

    def keep_out(name: str) -> None:
        real = getattr(os, name)

        def guarded(path: Any, *rest: Any, **options: Any) -> Any:
            if not isinstance(path, int) and Path(os.fspath(path)).is_relative_to(folder / "home"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *rest, **options)

        monkeypatch.setattr(os, name, guarded)

    for name in ("stat", "mkdir", "open", "scandir"):
        keep_out(name)
    return folder / "home"


def test_a_cache_that_may_not_be_looked_into_is_no_cache(locked: Path) -> None:
    cache = EncodingCache(locked / "encodings", 1000)
    assert cache.get("text-1") is None and cache.entries() == [] and cache.clear() == 0
    cache.put("text-1", {"x": torch.zeros(1)})


def test_a_home_that_may_not_be_looked_into_costs_the_state_and_not_the_run(
    locked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = stamp_settings(tmp_path, monkeypatch)
    settings = replace(settings, state_dir=locked / "state", cache_dir=locked / "cache")
    result = list(Pipeline(settings).generate(stamp_request(), output=tmp_path / "x.mp4", run_id="kept"))[-1]
    assert isinstance(result, Result) and (tmp_path / "x.mp4").is_file()
    assert any("cannot be saved" in note for note in result.report["notes"])


def test_weights_in_a_home_that_may_not_be_looked_into_are_none(locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(locked / "hub"))
    settings = load_settings(models_dir=str(locked / "models"))
    assert usual_places(settings, "model", "somebody/model") == []
    with pytest.raises(ModelNotFound, match="wan-local download"):
        find_model(settings)
