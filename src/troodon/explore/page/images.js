// What is known about images: fetched in batches, kept by id; and the decisions about them.

import { get, post, say } from "./dom.js";

const known = new Map();
const waiting = new Map();
let timer = null;
export const decisions = new Map();
const listeners = new Set();
export const undo = [];
let last = Promise.resolve();

export const onDecision = (listener) => listeners.add(listener);

/** The fields of these images, in order. */
export async function describe(ids) {
  return Promise.all(ids.map((id) => known.get(id) ?? later(id)));
}

function later(id) {
  if (!waiting.has(id)) {
    let resolve, reject;
    const promise = new Promise((yes, no) => { resolve = yes; reject = no; });
    waiting.set(id, { promise, resolve, reject });
    timer ??= setTimeout(fetchWaiting, 10);
  }
  return waiting.get(id).promise;
}

async function fetchWaiting() {
  timer = null;
  const batch = [...waiting].slice(0, 1000);
  for (const [id] of batch) waiting.delete(id);
  if (waiting.size) timer = setTimeout(fetchWaiting, 10);
  try {
    for (const image of await post("api/images", { ids: batch.map(([id]) => id) })) {
      if (known.size > 50000) known.clear();
      known.set(image.id, image);
    }
    for (const [id, { resolve }] of batch) resolve(known.get(id));
  } catch (error) {
    for (const [, { reject }] of batch) reject(error);
  }
}

export async function loadDecisions() {
  for (const [id, decision] of Object.entries(await get("api/decisions"))) decisions.set(Number(id), decision);
}

const wordOf = { true: "kept", false: "left out", null: "undecided" };

/** Keep, leave out or tag images, and save it: one decision after another. */
export function decide(ids, changes, remember = true) {
  return (last = last.then(() => decideNow(ids, changes, remember)));
}

async function decideNow(ids, changes, remember) {
  if (!ids.length) return;
  const touched = changes.instead_of === undefined ? ids : [...ids, changes.instead_of];
  const before = touched.map((id) => decisions.get(id) ?? null);
  try {
    const changed = await post("api/decide", { ids, ...changes });
    for (const [id, decision] of Object.entries(changed)) {
      if (decision) decisions.set(Number(id), decision);
      else decisions.delete(Number(id));
    }
    if (remember) undo.push({ ids: touched, changes, before });
    const what = "keep" in changes ? wordOf[changes.keep] : "add_tag" in changes ? `tagged ${changes.add_tag}` : `no longer tagged ${changes.remove_tag}`;
    say(`${ids.length.toLocaleString("en")} ${ids.length === 1 ? "image" : "images"} ${what}: saved`);
    for (const listener of listeners) listener(Object.keys(changed).map(Number));
  } catch (error) {
    say(`Not saved: ${error.message}`);
  }
}

/** Take the last decision back. */
export async function takeBack() {
  await last;
  const done = undo.pop();
  if (!done) return say("There is nothing to take back");
  if ("add_tag" in done.changes) {
    const had = done.changes.add_tag.trim();
    return decide(done.ids.filter((_, i) => !done.before[i]?.tags.includes(had)), { remove_tag: had }, false);
  }
  if ("remove_tag" in done.changes) {
    const had = done.changes.remove_tag;
    return decide(done.ids.filter((_, i) => done.before[i]?.tags.includes(had)), { add_tag: had }, false);
  }
  const back = new Map([[true, []], [false, []], [null, []]]);
  done.ids.forEach((id, i) => back.get(done.before[i]?.keep ?? null).push(id));
  for (const [keep, ids] of back) await decide(ids, { keep }, false);
}
