// Elements of the page, found and made.

export const byId = (id) => document.getElementById(id);

/** An element with properties (or attributes, where it has no such property) and children. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** An option list with [value, text] pairs. */
export function fillSelect(select, pairs, chosen) {
  select.replaceChildren(...pairs.map(([value, text]) => element("option", { value }, text)));
  select.value = pairs.some(([value]) => value === chosen) ? chosen : (pairs[0]?.[0] ?? "");
}

/** What a screen reader says next. */
export function announce(text) {
  byId("status").textContent = text;
}

/** A sentence that went wrong, shown until the next one; "" takes it away. */
export const showTrouble = (message) => say("trouble", message);

/** A sentence that is good to know; "" takes it away. */
export const showNotice = (message) => say("notice", message);

function say(id, message) {
  const box = byId(id);
  box.textContent = message && sentence(message);
  box.hidden = !message;
}

/** Do something, and show what went wrong as a sentence. */
export async function tried(work) {
  showTrouble("");
  try {
    await work();
  } catch (error) {
    if (error.name === "AbortError") announce("stopped");
    else showTrouble(error.message);
  }
}

function sentence(text) {
  const whole = text.trim();
  return whole[0].toUpperCase() + whole.slice(1) + (/[.!?…]$/.test(whole) ? "" : ".");
}
