// The controls: built from a model's card, filled with settings, read as settings.

import { byId, element, fillSelect } from "./dom.js";
import { fillOptions, fillStages, readOptions, readStages } from "./options.js";

const EDITS_ONLY = ["translate"];
const OFFERED = 4; // prompts below the field
const MANY = 24; // classes, from which on one types to find one
const TASKS = {
  inpainting: ["Inpainting", "Makes what you paint over, to fit the rest."],
  uncropping: ["Uncropping", "Makes what lies beyond the borders: paint over them."],
  colorization: ["Colorization", "Gives a gray image colors."],
  jpeg: ["JPEG restoration", "Takes away what a strong JPEG compression left."],
  super_resolution: ["Super-resolution", "Gives a small image more pixels."],
};

export const canEdit = (generator) => generator.tasks.length > 0;
export const canMake = (generator) => !EDITS_ONLY.includes(generator.name);

/** The generators of a card that the mode ("make" or "edit") has work for; to edit, those of most tasks first. */
export const generatorsFor = (card, mode) => mode === "edit"
  ? card.generators.filter(canEdit).sort((one, other) => other.tasks.length - one.tasks.length)
  : card.generators.filter(canMake);

export const modeNow = () => document.querySelector("input[name=mode]:checked").value;

/** The generator that is chosen; of another mode than the controls are of, where that was just changed. */
export function generatorNow(card) {
  const chosen = document.querySelector("input[name=generator]:checked")?.value;
  const there = generatorsFor(card, modeNow());
  return there.find((generator) => generator.name === chosen) ?? there[0];
}

let shown = null; // {generator, editing}: what the controls were last built for

/** Show what the card lets one choose, with settings (what is not set is the model's own). */
export function fillControls(card, settings) {
  const focused = document.activeElement?.id;
  fillModes(card);
  fillGenerators(card, settings.generator);
  const generator = generatorNow(card);
  shown = { generator, editing: modeNow() === "edit" };
  fillSubject(generator, settings);
  byId("seed").value = settings.seed ?? newSeed();
  byId("n").value = settings.n ?? 1;
  fillOptions(generator, settings);
  fillStages(generator, settings);
  if (focused) byId(focused)?.focus();
}

function fillModes(card) {
  const [make, edit] = ["make", "edit"].map((mode) => generatorsFor(card, mode).length > 0);
  byId("modes").hidden = !(make && edit);
  const only = make ? "make" : "edit";
  if (make !== edit) document.querySelector(`input[name=mode][value=${only}]`).checked = true;
}

function fillGenerators(card, chosen) {
  const there = generatorsFor(card, modeNow());
  const picked = there.some((generator) => generator.name === chosen) ? chosen : there[0].name;
  byId("generators").replaceChildren(
    ...there.map(({ name, title }) => {
      const radio = { type: "radio", name: "generator", value: name, id: `generator-${name}`, checked: name === picked };
      return element("label", {}, element("input", radio), element("span", {}, title));
    }),
  );
  byId("generator-field").hidden = there.length < 2;
  byId("both-field").hidden = there.length < 2 || modeNow() === "edit";
  byId("both-text").textContent = `${there.length === 2 ? "Both" : "All"} generators from one seed`;
}

function fillSubject(generator, settings) {
  const editing = modeNow() === "edit";
  byId("task-field").hidden = !editing;
  fillSelect(byId("task"), generator.tasks.map((task) => [task, TASKS[task]?.[0] ?? task]), settings.task);
  byId("task-hint").textContent = TASKS[byId("task").value]?.[1] ?? "";
  byId("prompt-field").hidden = !generator.reads_prompts;
  byId("prompt").value = settings.prompt ?? "";
  const fill = (text) => () => Object.assign(byId("prompt"), { value: text }).focus();
  const offered = generator.prompts.slice(0, OFFERED);
  byId("prompts").replaceChildren(...offered.map((text) => element("button", { type: "button", onclick: fill(text) }, text)));
  byId("label-field").hidden = generator.classes.length < 2;
  byId("label-holder").replaceChildren(...classField(generator.classes, settings.label ?? ""));
  const side = editing ? null : generator.condition_side;
  byId("condition-field").hidden = side === null;
  byId("condition-hint").textContent = `An image of ${side} x ${side} pixels; others are cut and scaled to it.`;
}

function classField(classes, chosen) {
  const name = classes.includes(chosen) ? chosen : (classes[chosen] ?? chosen); // a name goes before an id in digits
  if (classes.length < MANY) {
    const select = element("select", { id: "label" });
    fillSelect(select, [["", "any"], ...classes.map((each) => [each, each])], name);
    return [select];
  }
  const list = element("datalist", { id: "classes" }, ...classes.map((each) => element("option", { value: each })));
  const field = { id: "label", type: "text", value: name, autocomplete: "off", placeholder: `any of ${classes.length}` };
  const input = element("input", field);
  input.setAttribute("list", "classes");
  return [input, list];
}

/** What the controls say; only what is set. */
export function readControls() {
  const { generator, editing } = shown;
  const settings = { generator: generator.name, seed: Number(byId("seed").value || 0), n: Number(byId("n").value || 1) };
  if (editing) settings.task = byId("task").value;
  if (generator.reads_prompts && byId("prompt").value.trim()) settings.prompt = byId("prompt").value.trim();
  if (generator.classes.length && byId("label").value) settings.label = byId("label").value;
  return { ...settings, ...readOptions(generator), ...readStages(generator) };
}

export const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 1000000;
