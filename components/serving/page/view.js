// The images of one call, as large as whole screen pixels a pixel let them be.

import { byId } from "./dom.js";

const GAP = 24;
const NARROW = 150; // screen pixels that a tile's words need, and the least height
const BELOW = { one: 226, many: 142 }; // screen pixels of what is below an image, and around all
const FILMS = 2; // with more images than that each is shown without its frames

const HISTORY = 132; // screen pixels that the history will take: no image shrinks when it appears
const NOTHING = { tiles: [], size: { width: 1, height: 1 }, side: 0 };

let shown = NOTHING; // side: least columns, of generators next to each other
let before = NOTHING;

/** Show these tiles in place of the ones before; their images are width x height pixels. */
export function showTiles(tiles, { width, height }, side = 1) {
  for (const tile of before.tiles) tile.forget();
  before = shown;
  show({ tiles, size: { width, height }, side });
}

/** Show nothing. */
export function clearTiles() {
  for (const tile of [...shown.tiles, ...before.tiles]) tile.forget();
  before = NOTHING;
  show(NOTHING);
}

function show(what) {
  shown = what;
  byId("empty").hidden = what.tiles.length > 0;
  byId("view").replaceChildren(...what.tiles.map((tile) => tile.node));
  arrange();
}

/** Take away tiles that show nothing; where none is left, those before come back. */
export function dropTiles(gone) {
  const tiles = shown.tiles.filter((tile) => !gone.includes(tile));
  if (!gone.length) return;
  [shown, before] = tiles.length ? [{ ...shown, tiles }, before] : [before, NOTHING];
  show(shown);
}

export function startView() {
  new ResizeObserver(arrange).observe(byId("work"));
}

function arrange() {
  const { tiles, size, side } = shown;
  if (!tiles.length) return;
  const least = Math.min(side, tiles.length);
  const [width, height] = [byId("view").clientWidth, heightNow()];
  const choices = Array.from({ length: tiles.length }, (_, index) => index + 1).filter((columns) => columns >= least);
  const scales = choices.map((columns) => ({ columns, scale: scaleFor(columns, width, height) }));
  const empty = ({ columns }) => (columns - (tiles.length % columns)) % columns;
  scales.sort((a, b) => b.scale - a.scale || empty(a) - empty(b) || b.columns - a.columns);
  const [{ columns, scale }] = scales;
  for (const tile of tiles) tile.resize(size.width * scale, size.height * scale);
  byId("view").style.setProperty("--columns", columns);
  byId("view").classList.toggle("many", tiles.length > FILMS);
}

/** Screen pixels from top to bottom of what is seen without scrolling. */
function heightNow() {
  const work = byId("work");
  if (getComputedStyle(work).overflowY !== "auto") return innerHeight;
  const above = ["trouble", "notice"].map((id) => byId(id).offsetHeight + (byId(id).offsetHeight && GAP));
  return work.clientHeight - above[0] - above[1] - (byId("history").hidden ? HISTORY : 0);
}

/** Screen pixels a pixel: whole ones of the device, unless the image is larger than its place. */
function scaleFor(columns, width, height) {
  const { tiles, size, side } = shown;
  const rows = Math.min(Math.ceil(tiles.length / columns), 2);
  const wide = Math.floor((width - (columns - 1) * GAP) / columns);
  if (columns > side && wide < NARROW) return 0;
  const tall = Math.max(height / rows - BELOW[tiles.length > FILMS ? "many" : "one"], NARROW);
  const room = Math.min(wide / size.width, tall / size.height);
  const device = window.devicePixelRatio || 1;
  return room * device >= 1 ? Math.floor(room * device) / device : wide / size.width;
}
