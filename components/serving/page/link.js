// Settings as the part of an address after #, and back.

import { clean } from "./settings.js";

const MARK = "seed"; // every link has one; other addresses with # are none of ours

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
