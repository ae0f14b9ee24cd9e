// Settings of an image: what a PNG carries, a link says and the controls show. Only what was set is there.

import { OPTIONS } from "./fields.js";

export const FIELDS = ["model", "version", "generator", "label", "prompt", "seed", "n", "task"];
const NUMBERS = ["seed", "n", ...Object.keys(OPTIONS).filter((name) => OPTIONS[name].kind === "number")];
const KNOWN = [...FIELDS, ...Object.keys(OPTIONS), "sampling"];
const MARK = "seed"; // every link has one; other addresses with # are none of ours

/** The settings of which the page knows something, numbers as numbers, `sampling` as an object. */
export function clean(given) {
  const settings = {};
  for (const name of KNOWN) {
    const value = given[name];
    if (value === undefined || value === null || value === "") continue;
    if (NUMBERS.includes(name)) {
      if (Number.isFinite(Number(value))) settings[name] = Number(value);
    } else settings[name] = name === "sampling" ? stagesOf(value) : String(value);
  }
  if (!Object.keys(settings.sampling ?? {}).length) delete settings.sampling;
  return settings;
}

function stagesOf(value) {
  try {
    const stages = typeof value === "string" ? JSON.parse(value) : value;
    return Object.fromEntries(Object.entries(stages).filter(([, own]) => own && typeof own === "object"));
  } catch {
    return {};
  }
}

/** The address of this page that makes the same image again. */
export function linkOf(settings) {
  const fields = new URLSearchParams();
  for (const [name, value] of Object.entries(clean({ ...settings, n: settings.n === 1 ? null : settings.n }))) {
    fields.set(name, typeof value === "object" ? JSON.stringify(value) : value);
  }
  return `${location.origin}${location.pathname}#${fields}`;
}

/** The settings of an address; null where it has none. */
export function settingsOfLink(address) {
  const fields = new URLSearchParams(new URL(address).hash.slice(1));
  return fields.has(MARK) ? clean(Object.fromEntries(fields)) : null;
}

/** The stage whose settings the short options of a generator change; its first. */
export const firstStage = (generator) => Object.keys(generator.sampling)[0];

/** The option by which a stage's setting has a control of its own, if it has. */
export function shortName(generator, stage, setting) {
  return optionsOf(generator).find(
    (name) => OPTIONS[name].setting === setting && (OPTIONS[name].stage ?? firstStage(generator)) === stage,
  );
}

/** The options that a generator's models leave to choose. */
export function optionsOf(generator) {
  return Object.keys(OPTIONS).filter((name) => {
    if (!generator.options.includes(name)) return false;
    const { stage, setting } = OPTIONS[name];
    if (name === "steps") return generator.steps !== null;
    if (!setting || name === "best_of") return true;
    return setting in (generator.sampling[stage ?? firstStage(generator)] ?? {});
  });
}

/** What an option is where nothing is set; null: nothing. */
export function defaultOf(generator, name) {
  const { stage, setting } = OPTIONS[name];
  if (name === "steps") return generator.steps;
  return generator.sampling[stage ?? firstStage(generator)]?.[setting] ?? null;
}

/** Denoising steps of each stage, in their order: [[stage, steps]]. */
export function stepsOf(generator, settings) {
  const shown = ([stage, own]) => "num_inference_steps" in own && stage !== "diffusion_prior"; // that one makes no images
  const stages = Object.entries(generator.sampling).filter(shown);
  return stages.map(([stage, own]) => {
    const short = stage === firstStage(generator) ? settings.steps : undefined;
    const { num_inference_steps, strength = own.strength ?? 1 } = settings.sampling?.[stage] ?? {};
    return [stage, Math.max(1, Math.round(strength * (num_inference_steps ?? short ?? own.num_inference_steps)))];
  });
}

/** As a person says it, for alternative texts and captions. */
export function describe(settings) {
  const subject = [settings.prompt && `“${settings.prompt}”`, settings.label].filter(Boolean).join(", ");
  return `${subject || settings.task?.replace("_", " ") || "image"}, seed ${settings.seed}`;
}
