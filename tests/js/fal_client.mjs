// The unmodified @fal-ai/client through its proxyUrl: node fal_client.mjs URL FRAME. Ends with 0 if every claim holds.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { ApiError, ValidationError, fal } from "@fal-ai/client";

const [url, frame] = process.argv.slice(2);
const app = "fal-ai/wan-flf2v";
fal.config({ credentials: "not:needed", proxyUrl: { url: `${url}/api/fal/proxy`, when: "always" } });

const blob = new Blob([await readFile(frame)], { type: "image/png" });
const uri = `data:image/png;base64,${Buffer.from(await blob.arrayBuffer()).toString("base64")}`;
const input = { prompt: "a cat", start_image_url: uri, end_image_url: uri, num_inference_steps: 3, seed: 7 };

function checkResult(result) {
  assert.deepEqual(Object.keys(result.data).sort(), ["seed", "video"]);
  assert.deepEqual(Object.keys(result.data.video).sort(), ["content_type", "file_name", "file_size", "url"]);
  assert.match(result.requestId, /^[0-9a-f-]{36}$/);
}

// run
checkResult(await fal.run(app, { input }));

// the queue, step by step
const { request_id: requestId, status } = await fal.queue.submit(app, { input, priority: "low" });
assert.equal(status, "IN_QUEUE");
const last = await fal.queue.subscribeToStatus(app, { requestId, logs: true });
assert.equal(last.status, "COMPLETED");
assert.deepEqual((await fal.queue.status(app, { requestId, logs: true })).logs.map((log) => log.message), ["step 1", "step 2", "step 3"]);
const queued = await fal.queue.result(app, { requestId });
checkResult(queued);
assert.equal(queued.requestId, requestId);

// subscribe, polling and streaming: the same logs, none twice
for (const mode of ["polling", "streaming"]) {
  let logs = [];
  const seen = [];
  const result = await fal.subscribe(app, {
    input, logs: true, mode, pollInterval: 20,
    onQueueUpdate: (update) => { seen.push(update.status); if (update.logs) logs = update.logs.map((log) => log.message); },
  });
  checkResult(result);
  assert.deepEqual(logs, ["step 1", "step 2", "step 3"], mode);
  assert.equal(seen.at(-1), "COMPLETED");
}

// the status as a stream of its own: each log once, the last status at its end
const followed = await fal.queue.submit(app, { input });
const updates = await fal.queue.streamStatus(app, { requestId: followed.request_id, logs: true });
const told = [];
for await (const update of updates) told.push(...(update.logs ?? []).map((log) => log.message));
assert.deepEqual(told, ["step 1", "step 2", "step 3"]);
assert.equal((await updates.done()).status, "COMPLETED");

// stream: a local extension; one whose run fails is an error
const stream = await fal.stream(app, { input });
const events = [];
for await (const event of stream) events.push(event);
assert.deepEqual(events.map((event) => event.index), [1, 2, 3, undefined]);
assert.equal((await stream.done()).seed, 7);
const failing = await fal.stream(app, { input: { ...input, prompt: "crash" } });
await assert.rejects(failing.done(), { name: "ApiError", status: 500 });

// uploads: small, as an input, and in parts
const small = await fal.storage.upload(blob);
assert.equal((await fetch(small)).headers.get("content-type"), "image/png");
checkResult(await fal.subscribe(app, { input: { ...input, start_image_url: small, end_image_url: blob } }));
const large = await fal.storage.upload(new Blob([new Uint8Array(91 * 2 ** 20)], { type: "image/png" }));
assert.equal((await fetch(large, { method: "HEAD" })).headers.get("content-length"), String(91 * 2 ** 20));

// errors
const wrong = await fal.run(app, { input: { ...input, num_frames: 80 } }).catch((error) => error);
assert.ok(wrong instanceof ValidationError);
assert.equal(wrong.status, 422);
assert.equal(wrong.getFieldErrors("num_frames").length, 1);
assert.equal(wrong.getFieldErrors("num_frames")[0].type, "greater_than_equal");
const late = await fal.subscribe(app, { input: { ...input, num_frames: 101 } }).catch((error) => error);
assert.ok(late instanceof ValidationError);

const slow = await fal.queue.submit(app, { input: { ...input, prompt: "slow" } });
const timeout = await fal.run(app, { input, startTimeout: 1.2 }).catch((error) => error);
assert.ok(timeout instanceof ApiError);
assert.equal(timeout.status, 504);
assert.ok(timeout.isUserTimeout);
await fal.queue.cancel(app, { requestId: slow.request_id });
await fal.queue.subscribeToStatus(app, { requestId: slow.request_id });
const cancelled = await fal.queue.result(app, { requestId: slow.request_id }).catch((error) => error);
assert.equal(cancelled.status, 499);
const leave = new AbortController();
setTimeout(() => leave.abort(), 300);
await assert.rejects(fal.run(app, { input: { ...input, prompt: "slow" }, abortSignal: leave.signal }), { name: "AbortError" });
while ((await (await fetch(`${url}/health`)).json()).unfinished) await new Promise((done) => setTimeout(done, 20)); // cancelled
const unknown = await fal.queue.status(app, { requestId: "nothing" }).catch((error) => error);
assert.equal(unknown.status, 404);
console.log("every claim holds");
