// "Make" and "Stop".

import { generatorNow, generatorsFor, modeNow, readControls } from "./controls.js";
import { byId, showNotice } from "./dom.js";
import { editedFiles } from "./editor.js";
import { conditionNow, handlers } from "./opening.js";
import { keep } from "./past.js";
import { run } from "./run.js";
import { card, loadModels, model, modelLine } from "./served.js";
import { clean, linkOf } from "./settings.js";

let running = null; // AbortController of the images under way

export const stop = () => running?.abort();

/** Make what the controls say. Throws Error, a sentence, or AbortError. */
export async function make() {
  if (running) return;
  running = new AbortController();
  showRunning(true);
  try {
    await makeNow(running.signal);
  } finally {
    running = null;
    showRunning(false);
  }
}

async function makeNow(signal) {
  const settings = readControls();
  const editing = modeNow() === "edit";
  const files = editing ? await editedFiles(settings.task) : null;
  const address = linkOf({ model: model().id, version: card().version, ...settings });
  if (!editing) history.replaceState(null, "", address);
  showNotice("");
  const call = { model: model().id, asked: callsOf(settings), files, condition: conditionNow(), signal };
  await run({ ...call, handlers: handlers(), onMade: (tile) => made(tile, files) });
}

/** One call a generator: the chosen one as the controls say, the others by their own sampling. */
function callsOf(settings) {
  const chosen = generatorNow(card());
  if (!byId("both").checked || modeNow() === "edit") return [{ generator: chosen, settings }];
  const { label, prompt, seed, n } = settings;
  return generatorsFor(card(), "make").map((generator) => {
    const own = clean({ generator: generator.name, label, prompt, seed, n });
    return { generator, settings: generator === chosen ? settings : own };
  });
}

function showRunning(on) {
  const [before, after] = on ? [byId("make"), byId("stop")] : [byId("stop"), byId("make")];
  const focused = document.activeElement === before;
  byId("stop").hidden = !on;
  byId("make").disabled = on;
  if (focused) after.focus();
}

async function made(tile, files) {
  const { image = null, mask = null } = files ?? {};
  await keep({ settings: tile.settings, title: tile.title, png: tile.blob, image, mask });
  const { version } = tile.settings;
  if (!version || version === card().version) return;
  await loadModels().catch(() => null); // a new one answers
  byId("version").textContent = modelLine();
}
