// The models of the service, and the one that is chosen.

import { fetchModels } from "./api.js";
import { byId, fillSelect } from "./dom.js";

let models = []; // [{id, card}]

export const isLoaded = () => models.length > 0;

/** Throws Error before the models are known. */
export function model() {
  if (!isLoaded()) throw new Error("the service has not answered yet: press Make to ask again");
  return models.find(({ id }) => id === byId("model").value) ?? models[0];
}

export const card = () => model().card;

/** Throws Error where none answers. */
export async function loadModels() {
  models = await fetchModels();
  if (!isLoaded()) throw new Error("no model answers now: try again in a moment");
  fillSelect(byId("model"), models.map(({ id }) => [id, id]), byId("model").value);
  byId("model-field").hidden = models.length < 2;
}

/** Choose a model by the name that clients or the registry know it by. Returns whether it is served. */
export function chooseModel(name) {
  const registered = ({ card: own }) => own.source.replace("models:/", "").split(/[@/]/)[0];
  const named = models.find(({ id }) => id === name) ?? models.find((each) => registered(each) === name);
  if (named) byId("model").value = named.id;
  return named !== undefined;
}

/** The model in a line. */
export function modelLine() {
  const { source, version, refused } = card();
  const instead = refused ? ` (version ${refused} was refused: the service's log says why)` : "";
  const registered = source.startsWith("models:/");
  const name = registered && models.length === 1 ? source.slice("models:/".length) : model().id;
  return registered ? `${name}, version ${version}${instead}` : name; // a folder's version says nothing to a person
}
