// The page in a browser: node playground.mjs URL FRAME LAST BAD CHROMIUM URL_WITH_KEY KEY [SHOTS]. Ends with 0 if every claim holds.
import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium } from "playwright-core";

const [url, frame, last, bad, executablePath, lockedUrl, key, shots] = process.argv.slice(2);
const args = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
const profile = mkdtempSync(join(tmpdir(), "wan-local-page-"));
const context = await chromium.launchPersistentContext(profile, { executablePath, args, viewport: { width: 1280, height: 900 } });
try {
  const page = await context.newPage();
  const complaints = [];
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("console", (message) => { if (/Content Security Policy|Refused/.test(message.text())) complaints.push(message.text()); });
  page.on("request", (request) => { if (![url, lockedUrl].some((ours) => request.url().startsWith(ours)) && !/^(data|blob):/.test(request.url())) complaints.push(`asks ${request.url()}`); });
  const shot = async (name) => { if (shots) await page.screenshot({ path: join(shots, `${name}.png`), fullPage: true }); };
  const submit = async (prompt) => { await page.fill("#prompt", prompt); await page.click("#submit"); };
  const state = () => page.textContent("#state");
  await page.goto(url);
  await page.waitForSelector("#prompt");

  // every field of the schema is there, with its range and default
  const schema = (await (await fetch(`${url}/openapi.json`)).json()).components.schemas.WanFlf2vInput.properties;
  for (const [name, field] of Object.entries(schema)) {
    assert.equal(await page.locator(`[data-field="${name}"]`).count(), 1, name);
    if (field.enum) assert.equal(await page.locator(`input[name="${name}"]:checked`).getAttribute("value"), field.default);
    else if (field.type === "boolean") assert.equal(await page.locator(`#${name}`).isChecked(), field.default);
    else if ("minimum" in field) {
      assert.equal(Number(await page.inputValue(`#${name}`)), field.default, name);
      assert.equal(Number(await page.getAttribute(`#${name}`, "min")), field.minimum, name);
      assert.equal(Number(await page.getAttribute(`#${name}`, "max")), field.maximum, name);
    } else if (name === "negative_prompt") assert.equal(await page.inputValue(`#${name}`), field.default);
  }

  // every control has a name, and the whole form can be walked by keyboard
  const nameless = await page.evaluate(() => [...document.querySelectorAll("input, textarea, button")].filter((control) => !(control.labels?.length || control.ariaLabel || control.textContent.trim() || control.getAttribute("aria-label"))).map((control) => control.outerHTML));
  assert.deepEqual(nameless, []);
  await page.focus("#start_image_url");
  const reached = new Set();
  for (let n = 0; n < 60; n++) { reached.add(await page.evaluate(() => document.activeElement.id || document.activeElement.name)); await page.keyboard.press("Tab"); }
  for (const id of ["start_image_url", "swap", "end_image_url", "prompt", "resolution", "aspect_ratio", "num_frames", "seed", "submit"]) assert.ok(reached.has(id), `${id} by keyboard`);

  // nothing chosen: the errors stand at the fields
  await page.click("#submit");
  await page.waitForSelector("#start_image_url-problem:not([hidden])");
  assert.ok(await page.locator("#end_image_url-problem").isVisible());
  assert.equal(await page.getAttribute("#start_image_url", "aria-invalid"), "true");

  // a file that is no image is told at its field
  await page.setInputFiles("#start_image_url", frame);
  await page.setInputFiles("#end_image_url", bad);
  await submit("a bad picture");
  await page.waitForSelector("#end_image_url-problem:not([hidden])");
  await page.waitForSelector("#alarm:not([hidden])");
  assert.match(await page.textContent("#alarm"), /Last frame/);
  await shot("bad_image");

  // a value out of range likewise, and the settings open for it
  await page.setInputFiles("#end_image_url", last);
  await page.evaluate(() => { document.getElementById("num_inference_steps").value = 99; });
  await submit("too many steps");
  await page.waitForSelector("#num_inference_steps-problem:not([hidden])");
  assert.ok(await page.evaluate(() => document.getElementById("more").open));
  await page.fill("#num_inference_steps", "3");

  // from upload to video
  await page.fill("#seed", "42");
  await submit("a small blue bird takes off");
  await page.waitForSelector("video");
  await page.waitForFunction(() => document.querySelector("video").readyState >= 2);
  assert.match(await page.textContent("#facts"), /seed 42/);
  assert.match(await page.getAttribute("#acts a", "href"), /download=1/);
  await page.waitForFunction(() => { const video = document.querySelector("video"); return video.currentTime > 0 || !video.paused; });
  await page.waitForSelector("#runs img");
  await shot("video");

  // swapping exchanges the images; another run that is cancelled while it shows its progress
  const before = await page.locator(".drop img").evaluateAll((images) => images.map((image) => image.src));
  await page.click("#swap");
  assert.deepEqual(await page.locator(".drop img").evaluateAll((images) => images.map((image) => image.src)), before.reverse());
  await submit("slow");
  await page.waitForSelector(".stage.latent img");
  assert.match(await state(), /Denoise \d+ of/);
  assert.match(await page.textContent("#eta"), /about .* left/);
  await shot("progress");

  // a second one waits behind it; after a reload the newest that has not ended is followed again
  await submit("waiting");
  await page.waitForFunction(() => /Next in line|Waiting/.test(document.getElementById("state").textContent));
  await page.reload();
  await page.waitForFunction(() => /Next in line|Waiting/.test(document.getElementById("state").textContent));
  await page.click("#runs li:nth-child(2) button");
  await page.waitForSelector(".stage.latent img");
  await page.click("text=Cancel");
  await page.waitForFunction(() => document.querySelector("#stage .empty")?.textContent === "Cancelled.");
  await page.click("#runs li:nth-child(1) button");
  await page.waitForSelector("video");

  // narrow windows: nothing is wider than the window, dark and light
  for (const [width, colorScheme] of [[390, "dark"], [360, "light"]]) {
    await page.setViewportSize({ width, height: 800 });
    await page.emulateMedia({ colorScheme });
    assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), `${width} px`);
    await shot(`narrow_${width}`);
  }

  // a server with a key asks for it once
  await page.goto(lockedUrl);
  await page.waitForSelector("#prompt");
  await page.setInputFiles("#start_image_url", frame);
  await page.setInputFiles("#end_image_url", last);
  await submit("locked");
  await page.waitForSelector("#key");
  await page.fill("#key", key);
  await page.click("#submit");
  await page.waitForSelector("video");
  assert.deepEqual(complaints, []);
  console.log("every claim holds");
} finally {
  await context.close();
  rmSync(profile, { recursive: true, force: true });
}
