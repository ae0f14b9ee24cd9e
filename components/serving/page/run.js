// One press of "Make": requests, their events, and the tiles that show them.

import { edit, generate } from "./api.js";
import { announce, byId } from "./dom.js";
import { base64Of, blobOf } from "./images.js";
import { stepsOf } from "./settings.js";
import { Tile } from "./tile.js";
import { dropTiles, showTiles } from "./view.js";

const PREVIEWS = 8;
const OPENAI_PREVIEWS = 3; // what every service allows
const QUIET = 3000; // milliseconds between words on progress

/**
 * Make images, and show them as they come.
 *
 * asked: [{generator, settings}], one call each; files: {image, mask} to work on, or null; condition: a PNG or null.
 * onMade(tile) is called for each finished image. Throws the first Refusal, when all have ended, or AbortError.
 */
export async function run({ model, asked, files, condition, signal, handlers, onMade }) {
  const calls = asked.map((call) => ({ ...call, tiles: tilesOf(call, handlers) }));
  const columns = calls.length;
  const order = calls[0].tiles.flatMap((_, index) => calls.map((call) => call.tiles[index]));
  showTiles(order, calls[0].generator, columns);
  byId("view").scrollIntoView({ block: "nearest" });
  byId("view").ariaBusy = "true";
  announce(`making ${order.length === 1 ? "an image" : `${order.length} images`}`);
  const ends = await Promise.allSettled(calls.map((call) => answer(model, call, files, condition, signal, onMade)));
  for (const tile of order) tile.stop();
  dropTiles(order.filter((tile) => !tile.frames.length));
  byId("view").ariaBusy = "false";
  const failed = ends.find((end) => end.status === "rejected");
  if (failed) throw failed.reason;
}

function tilesOf({ generator, settings }, handlers) {
  return Array.from({ length: settings.n }, (_, index) => {
    const { n, ...own } = { ...settings, seed: settings.seed + index };
    return new Tile(own, generator, { ...handlers, title: generator.title });
  });
}

async function answer(model, { generator, settings, tiles }, files, condition, signal, onMade) {
  const { version, ...fields } = { ...settings, model, prompt: settings.prompt ?? "", stream: true };
  if (condition) fields.condition = await base64Of(condition);
  const call = (previews) => {
    const body = { ...fields, ...(files ?? {}), partial_images: previews };
    return files ? edit(body, { signal }) : generate(body, { signal });
  };
  let last = 0;
  for await (const event of withPreviews(call, previewsOf(generator, settings))) {
    const tile = tiles[event.image_index ?? 0];
    if (event.type.endsWith(".partial_image")) {
      const text = tile.preview(blobOf(event.b64_json), event.step, event.stage);
      if (Date.now() - last > QUIET) announce(text);
      last = Date.now() - last > QUIET ? Date.now() : last;
    } else if (event.type.endsWith(".completed")) {
      const made = { ...tile.settings, seed: event.seed ?? tile.settings.seed, model, version: event.version ?? version };
      tile.finish(blobOf(event.b64_json), made);
      announce(`finished: ${tile.image.alt}`);
      onMade(tile);
    }
  }
  if (tiles.some((tile) => !tile.blob)) throw new Error("the answer ended before the last image was there");
}

/** As many previews as the service lets one have. */
async function* withPreviews(call, previews) {
  try {
    yield* call(previews);
  } catch (error) {
    if (error.param !== "partial_images" || previews <= OPENAI_PREVIEWS) throw error;
    yield* call(OPENAI_PREVIEWS);
  }
}

function previewsOf(generator, settings) {
  if (!generator.shows_steps) return 0;
  const steps = stepsOf(generator, settings).reduce((sum, [, each]) => sum + each, 0);
  return Math.min(PREVIEWS, steps);
}
