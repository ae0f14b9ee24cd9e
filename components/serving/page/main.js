// The page starts here: what each control does.

import { newSeed, readControls } from "./controls.js";
import { announce, byId, showTrouble, tried } from "./dom.js";
import { takeDrops, takeFiles } from "./drop.js";
import { startEditor } from "./editor.js";
import { make, stop } from "./making.js";
import { change, changeAgain, giveCondition, openFile, restore, showAgain, workOn } from "./opening.js";
import { startPast } from "./past.js";
import { isLoaded, loadModels } from "./served.js";
import { settingsOfLink } from "./settings.js";
import { startView } from "./view.js";

startView();
startEditor();
wireControls();
wireFiles();
addEventListener("hashchange", () => {
  const settings = settingsOfLink(location.href);
  if (settings) tried(() => restore(settings));
});
await startPast((entry) => tried(() => showAgain(entry)));
await tried(begin);

async function begin() {
  await loadModels();
  restore(settingsOfLink(location.href) ?? {});
}

function wireControls() {
  byId("more").open = matchMedia("(min-width: 60rem)").matches;
  byId("controls").onchange = ({ target }) => {
    if (["mode", "generator"].includes(target.name) || target.id === "model") showTrouble("");
    if (target.id === "model") change(subject());
    else if (["mode", "generator"].includes(target.name) || target.id === "task") changeAgain();
  };
  byId("controls").onsubmit = (event) => {
    event.preventDefault();
    tried(isLoaded() ? make : begin);
  };
  byId("prompt").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("controls").requestSubmit();
  };
  byId("stop").onclick = stop;
  byId("new-seed").onclick = () => {
    byId("seed").value = newSeed();
    announce(`seed ${byId("seed").value}`);
  };
  byId("reset").onclick = () => change(subject());
}

/** What the controls say, but for the sampling. */
function subject() {
  const { generator, seed, n, task, prompt, label } = readControls();
  return { generator, seed, n, task, prompt, label };
}

function wireFiles() {
  takeFiles("image-file", "image-drop", (file) => tried(() => workOn(file)));
  takeFiles("other-file", "given", (file) => tried(() => workOn(file)));
  takeFiles("condition-file", "condition-drop", (file) => tried(() => giveCondition(file)));
  takeFiles("open-file", null, (file) => tried(() => openFile(file)));
  takeDrops((file) => tried(() => openFile(file)));
}
