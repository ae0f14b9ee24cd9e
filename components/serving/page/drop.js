// Files that are dropped or chosen, each to the place that it was meant for.

import { byId } from "./dom.js";

/** A field that takes one file, by choice or drop on its label. */
export function takeFiles(fieldId, dropId, onFile) {
  const field = byId(fieldId);
  field.onchange = () => {
    if (field.files[0]) onFile(field.files[0]);
    field.value = ""; // the same file may be chosen again
  };
  const place = dropId && byId(dropId);
  if (!place) return;
  place.addEventListener("dragover", () => place.classList.add("over"));
  for (const name of ["dragleave", "drop"]) place.addEventListener(name, () => place.classList.remove("over"));
  place.addEventListener("drop", (event) => {
    const [file] = event.dataTransfer.files;
    if (!file) return;
    event.preventDefault();
    event.stopPropagation(); // the page itself would read settings
    onFile(file);
  });
}

/** A file that is dropped anywhere else, or pasted. */
export function takeDrops(onFile) {
  const veil = byId("veil");
  let depth = 0;
  const hasFile = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragenter", (event) => {
    if (hasFile(event)) veil.hidden = (depth += 1) === 0;
  });
  addEventListener("dragleave", (event) => {
    if (hasFile(event)) veil.hidden = (depth = Math.max(0, depth - 1)) === 0;
  });
  addEventListener("dragover", (event) => hasFile(event) && event.preventDefault());
  const ended = () => {
    depth = 0;
    veil.hidden = true;
  };
  addEventListener("drop", ended, true); // wherever it falls
  addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    onFile(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) onFile(file);
  });
}
