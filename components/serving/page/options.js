// Controls of sampling: the short options of a generator, and every setting of every stage.

import { byId, element, fillSelect } from "./dom.js";
import { CHOICES, OPTIONS } from "./fields.js";
import { defaultOf, firstStage, optionsOf, shortName } from "./settings.js";

const NAMES = { num_inference_steps: "Steps", threshold_percentile: "Percentile", autoguidance_scale: "Autoguidance" };
const LISTS = ["guidance_interval"]; // two numbers

export function fillOptions(generator, settings) {
  byId("options").replaceChildren(
    ...optionsOf(generator).map((name) => {
      const option = OPTIONS[name];
      const most = name === "steps" ? generator.most_steps : option.max;
      const own = defaultOf(generator, name);
      const inStage = settings.sampling?.[option.stage ?? firstStage(generator)]?.[option.setting];
      const hint = own !== null && option.hint?.startsWith("empty: ") ? "" : option.hint; // it is the model's then
      return field(`option-${name}`, { ...option, hint, max: most ?? undefined }, inStage ?? settings[name] ?? own);
    }),
  );
}

/** What of the options is set, and is not the generator's own. */
export function readOptions(generator) {
  const read = {};
  for (const name of optionsOf(generator)) {
    const text = byId(`option-${name}`).value.trim();
    const value = valueOf(text, OPTIONS[name].kind);
    if (value !== undefined && value !== defaultOf(generator, name)) read[name] = value;
  }
  return read;
}

export function fillStages(generator, settings) {
  const stages = Object.entries(generator.sampling).map(([stage, own]) => {
    const names = Object.keys(own).filter((name) => !shortName(generator, stage, name));
    const fields = names.map((name) => {
      const value = settings.sampling?.[stage]?.[name] ?? own[name];
      return field(`stage-${stage}-${name}`, kindOf(name), Array.isArray(value) ? listed(name, value) : value);
    });
    const legend = element("legend", {}, words(stage));
    return fields.length ? [element("fieldset", {}, legend, element("div", { className: "grid" }, ...fields))] : [];
  });
  byId("stages").replaceChildren(...stages.flat());
  byId("all").hidden = !stages.flat().length;
}

/** {sampling}: what of the stages is set, and is not the model's own. */
export function readStages(generator) {
  const sampling = {};
  for (const [stage, own] of Object.entries(generator.sampling)) {
    for (const name of Object.keys(own).filter((each) => !shortName(generator, stage, each))) {
      const value = valueOf(byId(`stage-${stage}-${name}`).value.trim(), kindOf(name).kind);
      if (value === undefined || JSON.stringify(value) === JSON.stringify(own[name])) continue;
      sampling[stage] = { ...sampling[stage], [name]: value };
    }
  }
  return Object.keys(sampling).length ? { sampling } : {};
}

const kindOf = (name) => {
  const kind = CHOICES[name] ? "word" : LISTS.includes(name) ? "list" : name === "spacing" ? "spacing" : "number";
  return { text: NAMES[name] ?? words(name), kind, setting: name };
};

function field(id, { text, kind, setting, hint = "", min, max, step }, value) {
  const label = element("label", { htmlFor: id }, text);
  let input;
  if (CHOICES[setting]) {
    input = element("select", { id });
    fillSelect(input, choicesOf(setting, value ?? null), value ?? "");
  } else {
    input = element("input", { id, type: kind === "number" ? "number" : "text", value: value ?? "", autocomplete: "off" });
    if (kind === "number") {
      const limits = Object.entries({ min, max, step: step ?? "any" }).filter(([, limit]) => limit !== undefined);
      for (const [name, limit] of limits) input[name] = limit;
    }
    input.placeholder = hint.startsWith("empty: ") ? hint.slice(7) : kind === "size" ? hint : "own";
  }
  const shown = hint && !hint.startsWith("empty: ") && kind !== "size";
  return element("div", { className: "field" }, label, input, ...(shown ? [note(id, input, hint)] : []));
}

/** The choices of a setting as [value, text]; a value that the page does not know is one too, never another in its place. */
function choicesOf(setting, value) {
  const choices = CHOICES[setting];
  const shown = value === null || choices.some(([word]) => word === value);
  return shown ? choices : [...choices, [value, value]];
}

const listed = (name, value) => (name === "spacing" ? JSON.stringify(value) : value.join(", "));

function note(id, input, hint) {
  input.setAttribute("aria-describedby", `${id}-hint`);
  return element("p", { className: "hint", id: `${id}-hint` }, hint);
}

/** What a field says; undefined: nothing. */
function valueOf(text, kind) {
  if (text === "") return undefined;
  if (kind === "number") return Number(text);
  if (kind === "list") return text.split(/[\s,]+/).map(Number);
  if (kind === "spacing" && /^\[\d+(, ?\d+)*\]$/.test(text)) return JSON.parse(text); // steps; else a name, or counts
  return text;
}

function words(name) {
  const plain = name.replaceAll("_", " ");
  return plain[0].toUpperCase() + plain.slice(1);
}
