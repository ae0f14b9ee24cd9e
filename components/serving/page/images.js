// Image files that one gives: decoded, cut and scaled to what a model takes.

/** A canvas of width x height with the file's image; one of that size keeps its pixels. Throws Error for no image. */
export async function fitted(file, width, height) {
  const bitmap = await decoded(file);
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { colorSpace: "srgb" });
  context.fillStyle = "#fff"; // under what is transparent
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  const side = Math.min(bitmap.width / width, bitmap.height / height); // the middle of it
  const [cutWidth, cutHeight] = [side * width, side * height];
  const [left, top] = [(bitmap.width - cutWidth) / 2, (bitmap.height - cutHeight) / 2];
  context.drawImage(bitmap, left, top, cutWidth, cutHeight, 0, 0, width, height);
  bitmap.close();
  return canvas;
}

/** The side that an image has to have for a task: smaller than the model's own where pixels are to be added. */
export async function sizeFor(file, task, { width, height }) {
  if (task !== "super_resolution") return [width, height];
  const bitmap = await decoded(file);
  const factor = width / bitmap.width;
  const fits = Number.isInteger(factor) && factor > 1 && factor === height / bitmap.height;
  bitmap.close();
  return fits ? [width / factor, height / factor] : [width / 4, height / 4];
}

export const pngOf = (canvas) => new Promise((resolve) => canvas.toBlob(resolve, "image/png"));

async function decoded(file) {
  try {
    return await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    throw new Error(`${file.name ?? "the file"} is no image that this browser can read`);
  }
}

export async function base64Of(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
}

export function blobOf(base64) {
  return new Blob([Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))], { type: "image/png" });
}
