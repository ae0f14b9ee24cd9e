// The service's API: models, images as a stream of events, and refusals as sentences.

import { askForKey, forgetKey, keyHeader } from "./key.js";

/** What the service would not do; its message is for the user. */
export class Refusal extends Error {
  constructor(message, param = null) {
    super(message);
    this.param = param;
  }
}

/** The served models: [{id, card}]. */
export async function fetchModels() {
  const response = await send("v1/models", { method: "GET" });
  return (await response.json()).data;
}

/** Events of images made from settings alone. */
export function generate(body, options) {
  return images("v1/images/generations", { body: JSON.stringify(body), headers: JSON_TYPE }, options);
}

/** Events of images made from an image; `fields` may hold files. */
export function edit(fields, options) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    body.append(name, typeof value === "object" && !(value instanceof Blob) ? JSON.stringify(value) : value);
  }
  return images("v1/images/edits", { body }, options);
}

const JSON_TYPE = { "Content-Type": "application/json" };

async function* images(path, request, { signal }) {
  const response = await send(path, { method: "POST", signal, ...request });
  for await (const event of readEvents(response.body)) {
    if (event.type === "error" || event.error) throw new Refusal(event.error?.message ?? "the service gave up");
    yield event;
  }
}

/** A fetch that asks for a key where the service wants one. Throws Refusal, or AbortError where it was stopped. */
async function send(path, init) {
  for (let wrong = false; ; wrong = true) {
    const response = await reach(path, { ...init, headers: { ...init.headers, ...keyHeader() } });
    if (response.ok) return response;
    if (response.status !== 401) throw await refusalOf(response);
    forgetKey();
    if (!(await askForKey(wrong, init.signal))) throw new Refusal("this service answers only with a key");
  }
}

async function reach(path, init) {
  try {
    return await fetch(path, { cache: "no-store", ...init });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("the service does not answer: see whether it still runs, and try again");
  }
}

async function refusalOf(response) {
  const { error } = await response.json().catch(() => ({}));
  const message = error?.message ?? `the service answered ${response.status} ${response.statusText}`;
  const seconds = response.headers.get("Retry-After");
  const later = seconds ? `. Try again in ${seconds} ${seconds === "1" ? "second" : "seconds"}` : "";
  return new Refusal(message.replace(later ? /\.$/ : "", "") + later, error?.param);
}

/** The data of each server-sent event, as JSON; `EventSource` can't send a request of its own. */
async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (waiting + value).split(/\r?\n\r?\n/);
      waiting = blocks.pop();
      for (const block of blocks) {
        const data = dataOf(block);
        if (data && data !== "[DONE]") yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops listening wants no more of it
  }
}

function dataOf(block) {
  const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).trimStart()).join("\n");
}
