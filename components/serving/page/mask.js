// The pixels of a mask: 1 where the image is to be made. What was painted can be taken back.

import { pngOf } from "./images.js";

const UNDO = 50;

export class Mask {
  constructor(width, height) {
    Object.assign(this, { width, height, painted: new Uint8Array(width * height), before: [] });
  }

  get empty() {
    return !this.painted.includes(1);
  }

  /** In percent. */
  get share() {
    return Math.round((100 * this.painted.reduce((sum, each) => sum + each, 0)) / this.painted.length);
  }

  remember() {
    this.before = [...this.before.slice(1 - UNDO), this.painted.slice()];
  }

  undo() {
    this.painted = this.before.pop() ?? this.painted;
  }

  /** Set every pixel by a function of (its value, its index). */
  change(pixel) {
    this.remember();
    this.painted = this.painted.map(pixel);
  }

  /** A dot of a diameter in pixels. */
  dab([x, y], diameter, value) {
    const reach = diameter / 2;
    for (let row = Math.max(0, Math.ceil(y - reach)); row <= Math.min(this.height - 1, y + reach); row += 1) {
      for (let column = Math.max(0, Math.ceil(x - reach)); column <= Math.min(this.width - 1, x + reach); column += 1) {
        const near = (column - x) ** 2 + (row - y) ** 2 <= reach ** 2;
        if (near) this.painted[row * this.width + column] = value;
      }
    }
  }

  /** Dots from one pixel to another, without the first. */
  stroke(from, to, diameter, value) {
    const steps = Math.max(Math.abs(to[0] - from[0]), Math.abs(to[1] - from[1]), 1);
    for (let step = 1; step <= steps; step += 1) {
      const place = from.map((start, axis) => Math.round(start + ((to[axis] - start) * step) / steps));
      this.dab(place, diameter, value);
    }
  }

  /** A canvas with one color (RGBA) where it is painted and another where not. */
  layer(painted, other) {
    const canvas = Object.assign(document.createElement("canvas"), { width: this.width, height: this.height });
    const pixels = new ImageData(this.width, this.height);
    this.painted.forEach((each, index) => pixels.data.set(each ? painted : other, 4 * index));
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    return canvas;
  }

  /** A PNG: white is to be made. */
  file() {
    return pngOf(this.layer([255, 255, 255, 255], [0, 0, 0, 255]));
  }
}
