// A mask painted over an image by mouse, pen, finger or keyboard.

import { announce, byId } from "./dom.js";

const TINT = [226, 0, 116, 165]; // over what is painted
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Brush {
  constructor(canvas) {
    Object.assign(this, { canvas, mask: null, image: null, cursor: [0, 0], down: false });
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.drag(event));
    for (const name of ["pointerup", "pointercancel", "blur"]) canvas.addEventListener(name, () => this.lift());
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("keyup", (event) => event.key === " " && this.lift());
    for (const name of ["focus", "pointerleave", "blur"]) canvas.addEventListener(name, () => this.draw());
  }

  /** Paint on a mask over an image (a canvas), with `scale` screen pixels a pixel; no mask: only show the image. */
  take(image, mask, scale) {
    Object.assign(this, { image, mask, down: false });
    this.cursor = [Math.floor(image.width / 2), Math.floor(image.height / 2)];
    this.resize(scale);
  }

  resize(scale) {
    this.scale = scale;
    this.canvas.width = this.image.width * scale;
    this.canvas.height = this.image.height * scale;
    this.draw();
  }

  get diameter() {
    return Number(byId("brush").value);
  }

  get value() {
    return byId("erase").ariaPressed === "true" ? 0 : 1;
  }

  /** Change the mask by a function of it. */
  change(work) {
    work(this.mask);
    this.draw();
    this.tell();
  }

  press(event) {
    if (!this.mask || event.button !== 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.start(this.place(event));
  }

  drag(event) {
    if (this.mask) this.moveTo(this.place(event));
  }

  start(place) {
    this.mask.remember();
    Object.assign(this, { down: true, cursor: place });
    this.mask.dab(place, this.diameter, this.value);
    this.draw();
  }

  moveTo(place) {
    if (this.down) this.mask.stroke(this.cursor, place, this.diameter, this.value);
    this.cursor = place;
    this.draw();
  }

  lift() {
    if (this.down) this.tell();
    this.down = false;
  }

  key(event) {
    if (!this.mask || event.ctrlKey || event.metaKey || event.altKey) return;
    const move = MOVES[event.key];
    const far = event.shiftKey ? 4 : 1;
    if (move) this.moveTo(this.cursor.map((at, axis) => this.within(at + far * move[axis], axis)));
    else if (event.key === " " && !event.repeat) this.start(this.cursor);
    else if (event.key.toLowerCase() === "z") this.change((mask) => mask.undo());
    else if (event.key.toLowerCase() === "e") byId("erase").click();
    else if (event.key !== " ") return;
    event.preventDefault();
  }

  within(at, axis) {
    return Math.max(0, Math.min((axis ? this.image.height : this.image.width) - 1, at));
  }

  /** The pixel of the image under the pointer. */
  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    return [this.within(Math.floor(x * this.image.width), 0), this.within(Math.floor(y * this.image.height), 1)];
  }

  tell() {
    announce(`${this.mask.share} percent of the image is painted`);
  }

  draw() {
    if (!this.image) return;
    const context = this.canvas.getContext("2d");
    const { width, height } = this.canvas;
    context.imageSmoothingEnabled = false;
    context.drawImage(this.image, 0, 0, width, height);
    if (!this.mask) return;
    context.drawImage(this.mask.layer(TINT, [0, 0, 0, 0]), 0, 0, width, height);
    if (this.canvas.matches(":hover, :focus")) this.drawCursor(context);
  }

  drawCursor(context) {
    const [x, y] = this.cursor.map((at) => (at + 0.5) * this.scale);
    for (const [color, width] of [["#000", 3.5], ["#fff", 1.5]]) {
      context.beginPath();
      context.arc(x, y, Math.max(this.diameter / 2, 0.5) * this.scale, 0, 2 * Math.PI);
      Object.assign(context, { strokeStyle: color, lineWidth: width }).stroke();
    }
  }
}
