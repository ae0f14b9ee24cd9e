// The key of the service: asked for where it is wanted, kept until the tab is closed.

import { byId } from "./dom.js";

const NAME = "image-cascade-key";

export function keyHeader() {
  const key = sessionStorage.getItem(NAME);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

export function forgetKey() {
  sessionStorage.removeItem(NAME);
}

let asking = null; // two requests under way share one dialog

/** Ask for a key. Resolves to whether one was given. */
export function askForKey(wrong, signal) {
  asking ??= ask(wrong, signal).finally(() => (asking = null));
  return asking;
}

function ask(wrong, signal) {
  const dialog = byId("key-dialog");
  const field = byId("key");
  byId("key-wrong").hidden = !wrong;
  field.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  field.focus();
  signal?.addEventListener("abort", () => dialog.close(), { once: true });
  return new Promise((resolve) => {
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      if (field.value.trim()) sessionStorage.setItem(NAME, field.value.trim());
      dialog.close("given");
    };
    byId("key-cancel").onclick = () => dialog.close();
    dialog.onclose = () => resolve(dialog.returnValue === "given" && NAME in sessionStorage);
  });
}
