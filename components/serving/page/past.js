// The history, in this browser's own database, as a strip of small images: one press shows an image again, with its
// settings. An entry: {id, at, settings, title, png, image, mask}.

import { announce, byId, element } from "./dom.js";
import { describe } from "./settings.js";

const MOST = 120; // the oldest go first

let opened = null;
let urls = [];
let onPick;

export async function startPast(pick) {
  onPick = pick;
  byId("forget").onclick = askToForget;
  byId("forget-no").onclick = () => byId("forget-dialog").close();
  byId("forget-yes").onclick = async () => {
    byId("forget-dialog").close();
    await deleteHistory();
    await showPast();
    announce("the history is empty");
  };
  await showPast();
}

/** Keep an image; a browser that keeps nothing shows no history. */
export async function keep(entry) {
  await addToHistory(entry).catch(() => null);
  await showPast();
}

async function showPast() {
  const entries = await readHistory().catch(() => []);
  for (const url of urls) URL.revokeObjectURL(url);
  urls = entries.map((entry) => URL.createObjectURL(entry.png));
  byId("history").hidden = !entries.length;
  byId("past").replaceChildren(...entries.map((entry, index) => item(entry, urls[index])));
}

function item(entry, url) {
  const name = `${describe(entry.settings)}, by ${entry.title}`;
  const show = { type: "button", className: "again", onclick: () => onPick(entry), title: name };
  const thumb = element("img", { src: url, alt: name, loading: "lazy" });
  const remove = { type: "button", className: "remove", ariaLabel: `Delete ${name}`, onclick: () => take(entry) };
  return element("li", {}, element("button", show, thumb), element("button", remove, "×"));
}

async function take(entry) {
  const at = [...byId("past").children].findIndex((each) => each.contains(document.activeElement));
  await deleteEntry(entry.id);
  await showPast();
  announce("deleted from the history");
  const left = byId("past").children;
  left[Math.min(at, left.length - 1)]?.querySelector(".remove").focus();
}

function askToForget() {
  const count = byId("past").children.length;
  byId("forget-text").textContent = `${count} ${count === 1 ? "image goes" : "images go"}, from this browser only.`;
  byId("forget-dialog").showModal();
}

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("image-cascade", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("images", { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function inStore(mode, work) {
  const store = (await database()).transaction("images", mode).objectStore("images");
  const request = work(store);
  return new Promise((resolve, reject) => {
    store.transaction.oncomplete = () => resolve(request.result);
    store.transaction.onabort = store.transaction.onerror = () => reject(store.transaction.error);
  });
}

/** All entries, the newest first. */
async function readHistory() {
  return (await inStore("readonly", (store) => store.getAll())).reverse();
}

async function addToHistory(entry) {
  await inStore("readwrite", (store) => store.add({ at: Date.now(), ...entry }));
  const ids = await inStore("readonly", (store) => store.getAllKeys());
  for (const old of ids.slice(0, -MOST)) await deleteEntry(old);
}

const deleteEntry = (id) => inStore("readwrite", (store) => store.delete(id));

const deleteHistory = () => inStore("readwrite", (store) => store.clear());
