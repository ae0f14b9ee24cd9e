// Images of the past, in this browser's own database: {id, at, settings, title, png, image, mask}.

const MOST = 120; // the oldest go first

let opened = null;

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
export async function readHistory() {
  return (await inStore("readonly", (store) => store.getAll())).reverse();
}

export async function addToHistory(entry) {
  await inStore("readwrite", (store) => store.add({ at: Date.now(), ...entry }));
  const ids = await inStore("readonly", (store) => store.getAllKeys());
  for (const old of ids.slice(0, -MOST)) await deleteEntry(old);
}

export const deleteEntry = (id) => inStore("readwrite", (store) => store.delete(id));

export const deleteHistory = () => inStore("readwrite", (store) => store.clear());
