"""The asynchronous client: the same requests and errors, and nothing that holds up the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.stub_engine import SOON, StubEngine
from wan_local.client_async import AsyncClient
from wan_local.handle import AsyncRequestHandle, Completed, InProgress, Queued, Status
from wan_local.service import FalClientHTTPError, FalClientTimeoutError, Service

APPLICATION = "fal-ai/wan-flf2v"


@pytest.fixture
def engine(tmp_path: Path) -> StubEngine:
    return StubEngine(tmp_path)


@pytest.fixture
def service(engine: StubEngine, tmp_path: Path) -> Iterator[Service]:
    service = Service(engine, output_dir=tmp_path / "outputs")
    yield service
    engine.gate.set()
    service.close()


@pytest.fixture
def client(service: Service) -> AsyncClient:
    return AsyncClient.of(service)


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "frame.png"
    Image.new("RGB", (80, 64), "navy").save(path)
    return {"prompt": "a cat", "start_image_url": str(path), "end_image_url": str(path), "num_inference_steps": 3}


async def begun(engine: StubEngine) -> None:
    while not engine.requests:
        await asyncio.sleep(0.001)


def test_two_runs_at_once_leave_the_loop_free(
    client: AsyncClient, engine: StubEngine, arguments: dict[str, Any]
) -> None:
    async def main() -> list[Any]:
        engine.hold()
        ticks = 0
        runs = asyncio.gather(*(client.run(APPLICATION, arguments | {"seed": seed}) for seed in (1, 2)))
        for _ in range(20):
            await asyncio.sleep(0.005)
            ticks += 1
        assert not runs.done()
        engine.gate.set()
        return [ticks, *(await runs)]

    ticks, first, second = asyncio.run(main())
    assert ticks == 20
    assert (first["seed"], second["seed"]) == (1, 2)


def test_events_and_logs_come_through_a_handle(
    client: AsyncClient, engine: StubEngine, arguments: dict[str, Any]
) -> None:
    async def main() -> None:
        engine.hold()
        await client.submit(APPLICATION, arguments)
        await begun(engine)
        handle = await client.submit(APPLICATION, arguments)
        assert isinstance(handle, AsyncRequestHandle)
        asyncio.get_running_loop().call_later(0.05, engine.gate.set)
        events = [event async for event in handle.iter_events(with_logs=True, interval=0.01)]
        assert events[0] == Queued(0)
        last = events[-1]
        assert isinstance(last, Completed)
        assert [entry["message"] for entry in last.logs or []] == ["step 1", "step 2", "step 3"]
        output = await handle.get()
        assert output == await client.result(APPLICATION, handle.request_id)
        assert await client.status(APPLICATION, handle.request_id) == await handle.status()
        assert repr(handle) == f"AsyncRequestHandle(request_id='{handle.request_id}')"
        with pytest.raises(FalClientHTTPError, match="ALREADY_COMPLETED"):
            await client.cancel(APPLICATION, handle.request_id)

    asyncio.run(main())


def test_callbacks_may_be_functions_or_coroutines(client: AsyncClient, arguments: dict[str, Any]) -> None:
    seen: list[Any] = []

    async def update(status: Status) -> None:
        await asyncio.sleep(0)
        seen.append(status)

    async def main() -> None:
        await client.subscribe(
            APPLICATION, arguments, on_enqueue=seen.append, on_queue_update=update, with_logs=True, interval=0.01
        )

    asyncio.run(main())
    assert isinstance(seen[0], str)
    assert all(isinstance(event, Queued | InProgress | Completed) for event in seen[1:])
    assert isinstance(seen[-1], Completed)


def test_an_error_in_a_callback_reaches_the_caller(client: AsyncClient, arguments: dict[str, Any]) -> None:
    async def update(_: Status) -> None:
        raise LookupError("mine")

    for given in ({"on_enqueue": update}, {"on_queue_update": update}):
        with pytest.raises(LookupError, match="mine"):
            asyncio.run(client.subscribe(APPLICATION, arguments, **given))  # type: ignore[arg-type]


def test_a_wrong_request_is_raised_by_run_and_by_a_handles_get(client: AsyncClient) -> None:
    async def main() -> None:
        with pytest.raises(FalClientHTTPError) as run:
            await client.run(APPLICATION, {"prompt": "x"})
        handle = await client.submit(APPLICATION, {"prompt": "x"})
        assert await handle.status() == Completed(logs=None, metrics={})
        with pytest.raises(FalClientHTTPError) as get:
            await handle.get()
        assert run.value.status_code == get.value.status_code == 422
        assert run.value.message == get.value.message
        with pytest.raises(ValueError, match="Invalid app id"):
            await client.status("nope", "x")
        with pytest.raises(ValueError, match="Priority must be one of"):
            await client.submit(APPLICATION, {}, priority="high")  # type: ignore[arg-type]

    asyncio.run(main())


def test_client_timeout_cancels_and_raises(
    client: AsyncClient, engine: StubEngine, arguments: dict[str, Any], service: Service
) -> None:
    async def main() -> None:
        engine.hold()
        ids: list[str] = []
        with pytest.raises(FalClientTimeoutError) as caught:
            await client.subscribe(APPLICATION, arguments, client_timeout=1.1, on_enqueue=ids.append)
        assert (caught.value.timeout, [caught.value.request_id]) == (1.1, ids)
        engine.gate.set()
        with pytest.raises(FalClientHTTPError) as late:
            await client.result(APPLICATION, ids[0])
        assert late.value.status_code == 499

    asyncio.run(main())


def test_a_client_timeout_after_the_end_gives_the_output(client: AsyncClient, arguments: dict[str, Any]) -> None:
    """The job ends while the next look at it is slept for."""
    output = asyncio.run(client.subscribe(APPLICATION, arguments, client_timeout=1.1, interval=60))
    assert set(output) == {"video", "seed"}


def test_a_callbacks_own_timeout_is_not_the_clients(
    client: AsyncClient, engine: StubEngine, arguments: dict[str, Any], service: Service
) -> None:
    def mine(_: str) -> None:
        raise TimeoutError("mine")

    engine.hold()
    with pytest.raises(TimeoutError, match="mine") as caught:
        asyncio.run(client.subscribe(APPLICATION, arguments, client_timeout=30, on_enqueue=mine))
    assert not isinstance(caught.value, FalClientTimeoutError)
    assert service.queue.unfinished == 1  # as after any other error of a callback


def test_a_start_timeout_beyond_the_client_timeout_is_warned_of(client: AsyncClient, arguments: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="start_timeout"):
        asyncio.run(client.subscribe(APPLICATION, arguments, client_timeout=30, start_timeout=40))


@pytest.mark.parametrize("call", ["run", "subscribe"])
def test_a_cancelled_task_cancels_its_request(
    client: AsyncClient, engine: StubEngine, arguments: dict[str, Any], service: Service, call: str
) -> None:
    async def main() -> None:
        engine.hold()
        task = asyncio.create_task(getattr(client, call)(APPLICATION, arguments))
        await begun(engine)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.gate.set()
        await client.run(APPLICATION, arguments)

    asyncio.run(main())
    assert service.queue.unfinished == 0
    assert len(engine.requests) == 2


def test_run_that_takes_too_long_is_cancelled(
    client: AsyncClient, engine: StubEngine, arguments: dict[str, Any], service: Service
) -> None:
    engine.hold()
    with pytest.raises(httpx.ReadTimeout):
        asyncio.run(client.run(APPLICATION, arguments, timeout=0.05))
    engine.gate.set()
    asyncio.run(client.run(APPLICATION, arguments))
    assert service.queue.unfinished == 0


def test_stream_gives_each_step_and_last_the_output(client: AsyncClient, arguments: dict[str, Any]) -> None:
    async def main() -> list[dict[str, Any]]:
        return [event async for event in client.stream(APPLICATION, arguments)]

    events = asyncio.run(main())
    assert [event.get("index") for event in events] == [1, 2, 3, None]
    assert set(events[-1]) == {"video", "seed"}


def test_a_stream_that_is_closed_cancels_its_request(
    client: AsyncClient, engine: StubEngine, arguments: dict[str, Any], service: Service
) -> None:
    async def main() -> None:
        events = client.stream(APPLICATION, arguments | {"num_inference_steps": 40})
        await anext(events)
        await events.aclose()

    engine.pause = 0.02
    asyncio.run(main())
    deadline = time.monotonic() + SOON
    while service.queue.unfinished and time.monotonic() < deadline:
        time.sleep(0.01)
    assert service.queue.unfinished == 0


def test_uploads_give_urls_that_a_request_takes(client: AsyncClient, arguments: dict[str, Any], tmp_path: Path) -> None:
    async def main() -> None:
        path = Path(arguments["start_image_url"])
        urls = [
            await client.upload(path.read_bytes(), "image/png", "name.png"),
            await client.upload_file(path),
            await client.upload_image(Image.open(path), "png"),
        ]
        for url in urls:
            await client.run(APPLICATION, arguments | {"end_image_url": url})
        with pytest.raises(ValueError, match="Unsupported upload repository 'x'"):
            await client.upload(b"", "image/png", repository="x")

    asyncio.run(main())


def test_clients_are_equal_and_hashable_as_fal_clients_are() -> None:
    assert AsyncClient(key="a") == AsyncClient(key="a")
    assert len({AsyncClient(), AsyncClient(), AsyncClient(default_timeout=1.0)}) == 2
    assert "key" not in repr(AsyncClient(key="secret"))
