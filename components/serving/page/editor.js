// The image to work on, and the mask over it.

import { Brush } from "./brush.js";
import { byId } from "./dom.js";
import { fitted, pngOf, sizeFor } from "./images.js";
import { Mask } from "./mask.js";

const MASK_TASKS = ["inpainting", "uncropping"];
const BELOW = 226; // screen pixels of the tools below the image; as below one that is made

let brush;
let file = null; // as it was given
let image = null; // the canvas that the model takes
let mask = null;

export function startEditor() {
  brush = new Brush(byId("mask"));
  byId("erase").onclick = ({ currentTarget: button }) => (button.ariaPressed = String(button.ariaPressed !== "true"));
  byId("undo").onclick = () => brush.change((own) => own.undo());
  byId("clear").onclick = () => brush.change((own) => own.change(() => 0));
  byId("invert").onclick = () => brush.change((own) => own.change((value) => 1 - value));
  byId("brush").oninput = () => brush.draw();
  new ResizeObserver(() => image && brush.resize(scaleNow())).observe(byId("editor"));
}

/** Work on a file from now on. Throws Error for no image. */
export async function giveImage(given, generator, task) {
  const [width, height] = await sizeFor(given, task, generator);
  const fresh = given !== file || width !== image.width || height !== image.height;
  if (fresh) {
    image = await fitted(given, width, height);
    mask = new Mask(width, height);
    file = given;
    byId("brush").max = Math.ceil(width / 2);
    byId("brush").value = Math.ceil(width / 8);
  }
  byId("image-drop").hidden = true;
  byId("given").hidden = false;
  const painted = MASK_TASKS.includes(task);
  for (const id of ["brushes", "mask-hint"]) byId(id).hidden = !painted;
  brush.take(image, painted ? mask : null, scaleNow());
}

/** The same image for another task or generator. */
export async function refit(generator, task) {
  if (file) await giveImage(file, generator, task);
}

/** Paint what a mask file is white in. */
export async function giveMask(blob) {
  const canvas = await fitted(blob, image.width, image.height);
  const { data } = canvas.getContext("2d").getImageData(0, 0, image.width, image.height);
  brush.change((own) => own.change((_, index) => (data[4 * index] >= 128 ? 1 : 0)));
}

/** Files for a request: {image, mask}. Throws Error, a sentence, for what is missing. */
export async function editedFiles(task) {
  if (!image) throw new Error("choose an image to work on first");
  const files = { image: new File([await pngOf(image)], "image.png", { type: "image/png" }) };
  if (!MASK_TASKS.includes(task)) return files;
  if (mask.empty) throw new Error("paint over what is to be made first");
  return { ...files, mask: new File([await mask.file()], "mask.png", { type: "image/png" }) };
}

/** Whole screen pixels a pixel. */
function scaleNow() {
  const width = byId("editor").clientWidth || 320;
  const height = Math.max(byId("work").clientHeight - BELOW, 260);
  return Math.max(1, Math.floor(Math.min(width / image.width, Math.min(height, innerHeight - BELOW) / image.height)));
}
