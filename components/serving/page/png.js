// Settings that a PNG carries: JSON under the keyword `parameters`, in a tEXt, zTXt or iTXt chunk.

const KEYWORD = "parameters";
const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const MOST_BYTES = 2 ** 20; // of the text, unpacked: a kilobyte can claim more

/** The settings of a PNG's bytes; null where it has none. */
export async function readSettings(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (!SIGNATURE.every((byte, index) => bytes[index] === byte)) return null;
  for (const { type, data } of chunksOf(bytes)) {
    const text = await textOf(type, data).catch(() => null);
    const settings = text === null ? null : parsed(text);
    if (settings) return settings;
  }
  return null;
}

function* chunksOf(bytes) {
  const view = new DataView(bytes.buffer);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const type = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    yield { type, data: bytes.subarray(at + 8, at + 8 + length) };
    at += 12 + length;
  }
}

async function textOf(type, data) {
  if (!["tEXt", "zTXt", "iTXt"].includes(type)) return null;
  const end = data.indexOf(0);
  if (latin(data.subarray(0, end)) !== KEYWORD) return null;
  const rest = data.subarray(end + 1);
  if (type === "tEXt") return latin(rest);
  if (type === "zTXt") return latin(await inflated(rest.subarray(1)));
  const language = rest.indexOf(0, 2);
  const text = rest.subarray(rest.indexOf(0, language + 1) + 1);
  return new TextDecoder().decode(rest[0] ? await inflated(text) : text);
}

const latin = (bytes) => new TextDecoder("latin1").decode(bytes);

async function inflated(bytes) {
  const reader = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
  const parts = [];
  for (let size = 0; ; ) {
    const { done, value } = await reader.read();
    if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
    size += value.length;
    if (size > MOST_BYTES) throw new RangeError("more text than settings have");
    parts.push(value);
  }
}

function parsed(text) {
  try {
    const settings = JSON.parse(text);
    return settings && typeof settings === "object" && !Array.isArray(settings) ? settings : null;
  } catch {
    return null; // another program's parameters
  }
}
