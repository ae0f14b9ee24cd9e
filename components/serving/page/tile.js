// One image on its way: its frames as they come, how far it is, and what can be done with it.

import { byId, element } from "./dom.js";
import { describe, linkOf, stepsOf } from "./settings.js";

const ICONS = {
  save: "M10 3v9m-4-4 4 4 4-4M4 16h12",
  link: "M8.5 11.5l3-3M9 6l2-2a3.5 3.5 0 0 1 5 5l-2 2M11 14l-2 2a3.5 3.5 0 0 1-5-5l2-2",
  edit: "M4 16l.8-3.2L13 4.6l2.4 2.4-8.2 8.2zM11.4 6.2l2.4 2.4",
};

export class Tile {
  /** `generator` is null for an image of the history; `onEdit` for a model that can't edit. */
  constructor(settings, generator, { onCopy, onEdit, title }) {
    Object.assign(this, { settings, title, onCopy, onEdit, frames: [], stage: 0, last: 0 });
    this.stages = generator?.shows_steps ? stepsOf(generator, settings) : [];
    this.image = element("img", { alt: "", hidden: true, draggable: true });
    this.frame = element("div", { className: "frame waiting" }, this.image);
    this.bar = element("progress", { ariaLabel: `Progress of ${describe(settings)}` });
    this.text = element("span", {}, generator?.shows_steps ? "waiting" : "being made");
    this.progress = element("div", { className: "progress" }, this.bar, this.text);
    this.film = element("div", { className: "film", role: "group", ariaLabel: "How it came out of noise" });
    this.caption = element("figcaption", {}, element("p", {}, describe(settings)), element("p", { className: "hint" }, title));
    this.node = element("figure", { className: "tile" }, this.frame, this.progress, this.film, this.caption);
  }

  resize(width, height) {
    this.frame.style.width = `${width}px`;
    this.frame.style.height = `${height}px`;
    this.node.style.setProperty("--width", `${width}px`);
  }

  /** A frame of the denoising. Returns where it stands, as text. */
  preview(blob, step, stage) {
    const named = this.stages.findIndex(([name]) => name === stage);
    if (named >= 0) this.stage = named;
    else if (step <= this.last) this.stage = Math.min(this.stage + 1, Math.max(this.stages.length - 1, 0));
    this.last = step;
    const total = this.stages.reduce((sum, [, steps]) => sum + steps, 0);
    const done = this.stages.slice(0, this.stage).reduce((sum, [, steps]) => sum + steps, 0) + step;
    if (total) Object.assign(this.bar, { max: total, value: done });
    this.text.textContent = total ? `step ${done} of ${total}` : `step ${step}`;
    this.add(blob, this.text.textContent);
    return this.text.textContent;
  }

  finish(blob, settings) {
    this.settings = settings;
    this.blob = blob;
    this.progress.remove();
    this.add(blob, "finished");
    this.image.alt = `${describe(settings)}, by ${this.title}`;
    this.caption.firstChild.textContent = describe(settings);
    this.caption.append(this.actions());
  }

  stop() {
    if (this.blob) return;
    this.bar.remove();
    this.text.textContent = `stopped at ${this.text.textContent}`;
  }

  add(blob, text) {
    const url = URL.createObjectURL(blob);
    const index = this.frames.push({ url, text }) - 1;
    const thumb = element("img", { src: url, alt: text });
    this.film.append(element("button", { type: "button", onclick: () => this.show(index), title: text }, thumb));
    this.show(index);
  }

  show(index) {
    this.image.src = this.frames[index].url;
    this.image.hidden = false;
    this.image.dataset.frame = this.frames[index].text;
    if (!this.blob) this.image.alt = `${describe(this.settings)}, ${this.frames[index].text}`;
    this.frame.classList.remove("waiting");
    [...this.film.children].forEach((button, each) => (button.ariaPressed = String(each === index)));
  }

  actions() {
    const name = `${describe(this.settings)} ${this.settings.generator ?? ""}`.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 80);
    const subject = describe(this.settings);
    const save = { href: this.frames.at(-1).url, download: `${name}.png`, className: "button quiet" };
    const made = [element("a", { ...save, ariaLabel: `Download ${subject}` }, icon("save"), "Download")];
    if (!this.settings.task) {
      const link = { href: linkOf(this.settings), className: "button quiet", onclick: (event) => this.onCopy(event) };
      made.push(element("a", { ...link, ariaLabel: `Link to ${subject}` }, icon("link"), "Link"));
    }
    if (this.onEdit) {
      const onclick = () => this.onEdit(this.blob);
      made.push(element("button", { type: "button", className: "quiet", onclick, ariaLabel: `Edit ${subject}` }, icon("edit"), "Edit"));
    }
    return element("div", { className: "tools" }, ...made);
  }

  forget() {
    for (const { url } of this.frames) URL.revokeObjectURL(url);
  }
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(svg.namespaceURI, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}
