// The unmodified client and the embedded model: node embedded_model.mjs URL FRAME. Ends with 0 if every claim holds.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { fal } from "@fal-ai/client";

const [url, frame] = process.argv.slice(2);
fal.config({ proxyUrl: { url: `${url}/api/fal/proxy`, when: "always" } });
const image = new Blob([await readFile(frame)], { type: "image/png" });
const input = { prompt: "a cat", start_image_url: image, end_image_url: image, resolution: "480p", num_inference_steps: 2, seed: 42 };
let logs = [];
const result = await fal.subscribe("fal-ai/wan-flf2v", { input, logs: true, mode: "streaming", onQueueUpdate: (update) => { logs = update.logs ?? logs; } });
assert.equal(result.data.seed, 42);
assert.equal(logs.filter((log) => log.message === "step 2 of 2").length, 1);
const video = Buffer.from(await (await fetch(result.data.video.url)).arrayBuffer());
assert.equal(video.length, result.data.video.file_size);
assert.equal(video.subarray(4, 8).toString(), "ftyp");
console.log("every claim holds");
