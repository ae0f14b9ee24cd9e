// What comes from elsewhere into the controls: links, PNGs, the history, images to work on; and what can be done with a
// finished image.

import { canEdit, fillControls, generatorNow, generatorsFor, modeNow, readControls } from "./controls.js";
import { byId, showNotice, showTrouble, tried } from "./dom.js";
import { giveImage, giveMask, refit } from "./editor.js";
import { fitted, pngOf } from "./images.js";
import { readSettings } from "./png.js";
import { card, chooseModel, modelLine } from "./served.js";
import { clean } from "./settings.js";
import { Tile } from "./tile.js";
import { clearTiles, showTiles } from "./view.js";

let condition = null; // PNG

/** The condition image, where the generator is conditioned on one. */
export const conditionNow = () => (modeNow() === "make" && generatorNow(card()).condition_side ? condition : null);

/** Fill the controls, and show what belongs to the mode. */
export function change(settings) {
  fillControls(card(), settings);
  const editing = modeNow() === "edit";
  if (editing === byId("editor").hidden) clearTiles(); // what was made in the other mode is in the history
  byId("editor").hidden = !editing;
  byId("work").classList.toggle("editing", editing);
  byId("version").textContent = modelLine();
  if (editing) refit(generatorNow(card()), byId("task").value).catch((error) => showTrouble(error.message));
}

/** As the controls say, of the mode and the generator that were just chosen. */
export const changeAgain = () => change({ ...readControls(), generator: generatorNow(card()).name });

/** Settings of a link, a PNG or the history into the controls. */
export function restore(given) {
  const settings = clean(given);
  const served = settings.model === undefined || chooseModel(settings.model);
  setMode(settings.task || given.needs?.includes("image") ? "edit" : "make");
  byId("both").checked = false;
  change(settings);
  if (settings.sampling) byId("more").open = byId("all").open = true;
  showNotice(strangeness(settings, served));
}

function setMode(mode) {
  if (!generatorsFor(card(), mode).length) return;
  document.querySelector(`input[name=mode][value=${mode}]`).checked = true;
}

/** Why an image may come out otherwise than before; "" where it will not. */
function strangeness({ model, version, seed }, served) {
  if (Math.abs(seed) > Number.MAX_SAFE_INTEGER) return "this seed has more digits than a page keeps: take `cascade sample --like FILE`";
  if (!served) return `these settings are of the model ${model}, which is not served here`;
  if (!version || version === card().version) return "";
  return `these settings are of version ${version}; version ${card().version} answers now, and its image may differ`;
}

/** Edit an image: a file, or one that was made. */
export async function workOn(file) {
  setMode("edit");
  changeAgain();
  await giveImage(file, generatorNow(card()), byId("task").value);
  byId("editor").scrollIntoView({ block: "nearest" });
}

export const handlers = () => ({
  onCopy: copyLink,
  onEdit: card().generators.some(canEdit) ? (blob) => tried(() => workOn(blob)) : null,
});

async function copyLink(event) {
  event.preventDefault();
  const { href } = event.currentTarget;
  history.replaceState(null, "", href);
  const copied = await navigator.clipboard?.writeText(href).then(() => true, () => false);
  showNotice(copied ? "The link is copied; it makes this image again" : "The address of this page makes this image again");
}

export async function giveCondition(file) {
  const side = generatorNow(card()).condition_side;
  condition = await pngOf(await fitted(file, side, side));
  URL.revokeObjectURL(byId("condition-shown").src);
  byId("condition-shown").src = URL.createObjectURL(condition);
  byId("condition-shown").hidden = false;
  byId("condition-text").textContent = "Another image";
}

/** A file that was dropped on the page: settings, or else an image to work on. */
export async function openFile(file) {
  const settings = await readSettings(file);
  if (settings) {
    restore(settings);
    const needs = settings.needs?.includes("condition") ? "the condition image" : settings.needs && "the image to work on";
    const missing = needs ? `; ${needs} is not in the file: give it again` : "";
    const there = `the settings of ${file.name || "the image"} are in the controls${missing}`;
    showNotice(byId("notice").textContent || there);
  } else if (card().generators.some(canEdit)) await workOn(file);
  else throw new Error(`${file.name || "the image"} holds no settings of an image made here`);
}

/** An entry of the history: its image, and its settings in the controls. */
export async function showAgain(entry) {
  restore(entry.settings);
  const tile = new Tile(entry.settings, null, { ...handlers(), title: entry.title });
  tile.finish(entry.png, entry.settings);
  const size = await createImageBitmap(entry.png);
  const generator = generatorNow(card());
  if (entry.image && canEdit(generator)) {
    await giveImage(entry.image, generator, entry.settings.task);
    if (entry.mask) await giveMask(entry.mask);
  }
  showTiles([tile], size);
  byId("view").scrollIntoView({ block: "nearest" });
}
