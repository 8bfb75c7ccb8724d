"""Every name of fal_client 1.0.3 is here and takes what it takes there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import wan_local
import wan_local.client
from tests.fal_client_surface import EXTRA_NAMES, surface

GOLDEN = json.loads((Path(__file__).parent / "golden" / "fal_client.json").read_text())


def test_the_golden_surface_is_that_of_the_installed_fal_client() -> None:
    real = pytest.importorskip("fal_client")
    assert real.__version__ == GOLDEN["fal_client"]
    assert sorted(real.__all__) == GOLDEN["all"]
    assert surface(real, sorted({*real.__all__, *EXTRA_NAMES})) == GOLDEN["names"]


def test_every_name_of_fal_client_is_public_here() -> None:
    assert set(GOLDEN["all"]) <= set(wan_local.__all__)


@pytest.mark.parametrize("name", GOLDEN["names"])
def test_the_name_takes_what_it_takes_there(name: str) -> None:
    assert surface(wan_local, [name.partition(".")[0]])[name] == GOLDEN["names"][name]


def test_the_client_module_has_the_names_that_people_import_from_it() -> None:
    real = pytest.importorskip("fal_client.client")
    names = [
        "AsyncClient", "AsyncRealtimeConnection", "AsyncRequestHandle", "Completed", "FalClientError",
        "FalClientHTTPError", "FalClientTimeoutError", "InProgress", "ObjectExpiration", "Queued",
        "RealtimeConnection", "RealtimeError", "Status", "StorageACL", "StorageACLDecision", "StorageACLRule",
        "StorageSettings", "SyncClient", "SyncRequestHandle", "encode", "encode_file", "encode_image",
    ]  # fmt: skip
    assert surface(wan_local.client, names) == surface(real, names)


def test_errors_have_fal_clients_parents() -> None:
    assert issubclass(wan_local.FalClientHTTPError, wan_local.FalClientError)
    assert issubclass(wan_local.FalClientTimeoutError, wan_local.FalClientError)
    assert issubclass(wan_local.FalClientTimeoutError, TimeoutError)
    assert issubclass(wan_local.client.RealtimeError, RuntimeError)


def test_realtime_refuses_and_says_what_to_use_instead() -> None:
    for name in ("realtime", "ws_connect", "realtime_async", "ws_connect_async"):
        with pytest.raises(wan_local.FalClientError, match=f"{name}: .*no realtime endpoint.*subscribe"):
            getattr(wan_local, name)("fal-ai/wan-flf2v")
    with pytest.raises(NotImplementedError):
        wan_local.RealtimeConnection(None)


@pytest.mark.parametrize("wrong", [True, 0, -5, "2h"])
def test_an_expiry_that_fal_client_refuses_is_refused(wrong: object) -> None:
    real = pytest.importorskip("fal_client")
    with pytest.raises(ValueError, match="lifecycle expires_in") as ours:
        wan_local.StorageSettings(expires_in=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lifecycle expires_in") as theirs:
        real.StorageSettings(expires_in=wrong)
    assert str(ours.value) == str(theirs.value)


def test_other_expiries_are_taken() -> None:
    for fine in (None, "never", "immediate", "1h", "1y", 60):
        assert wan_local.StorageSettings(expires_in=fine).expires_in == fine
    rule = wan_local.StorageACLRule("someone", "hide")
    assert wan_local.StorageSettings(initial_acl=wan_local.StorageACL("allow", [rule])).initial_acl is not None


def test_the_hook_for_hosted_apps_is_taken_and_not_called() -> None:
    wan_local.set_get_current_app(lambda: pytest.fail("called"))
