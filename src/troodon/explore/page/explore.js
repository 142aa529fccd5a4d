// The page: what is shown in the grid, what the map is coloured by, and what keys do.

import { decisionColour, legend, loadColour, paint } from "./colours.js";
import { $, count, fileName, fill, get, getBytes, h, picture, plural, say, send } from "./dom.js";
import { Grid } from "./grid.js";
import { decide, decisions, describe, loadDecisions, onDecision, takeBack, undo } from "./images.js";
import { PointMap } from "./map.js";
import { One } from "./one.js";
import { PairsPanel } from "./pairs.js";

history.replaceState(null, "", location.pathname); // the token is in a cookie now
const collection = await get("api/collection");
await loadDecisions();
const all = Array.from({ length: collection.images }, (_, i) => i);
const TABS = { images: "Images", similar: "Similar pairs", copies: "Copies", leaks: "Leaks" };
const NEAREST = 200;
let shown = all, colour = null, cardFor = -1;

const one = new One({ near, moved: (id) => map.mark([id, ...(shown === all ? [] : shown)]) });
const open = (id, ids = shown) => one.open(id, ids);
const grid = new Grid($("grid"), { open: (id) => open(id), key: gridKey });
const pairs = new PairsPanel($("panel-pairs"), { open, select: (ids, words) => { select(ids, words); tab("images"); } });
const map = new PointMap($("points"), $("thumbs"), $("overlay"), {
  hover, pick: (id) => { if (id >= 0) near(id); }, lasso: (ids) => { toggleLasso(false); chosen(ids, "in the lasso"); },
  thumb: (id) => picture(id),
});

$("name").textContent = collection.name;
document.title = `${collection.name} · Troodon`;
$("size").textContent = plural(collection.images, "image");
$("choose").hidden = $("file").disabled = !collection.takes_pictures;

// What the grid shows

/** Show these images in the grid and mark them on the map. */
function select(ids, words, badges = []) {
  shown = ids;
  $("shown").textContent = words;
  grid.show(ids, badges);
  $("grid").querySelector(".empty")?.remove();
  if (!ids.length) $("grid").append(h("p", { class: "empty" }, "No image."));
  map.mark(ids === all ? [] : ids);
  drawActions();
}
const chosen = (ids, where) => { select(ids, `${plural(ids.length, "image")} ${where}`); tab("images"); };
const showAll = () => select(all, `All ${plural(collection.images, "image")}`);

async function near(id) {
  try {
    const found = await get(`api/neighbours?id=${id}&k=${NEAREST}`), [image] = await describe([id]);
    select([id, ...found.map((one) => one.id)], `Nearest to ${fileName(image.path)}`, ["this one", ...found.map((one) => one.similarity.toFixed(3))]);
    tab("images");
  } catch (error) { say(error.message); }
}

async function searchBy(file) {
  if (!file) return;
  try {
    const found = await send(`api/search?k=${NEAREST}`, file);
    select(found.map((one) => one.id), `Nearest to ${file.name || "the picture"}`, found.map((one) => one.similarity.toFixed(3)));
    tab("images");
    if (found.length) map.centre(found[0].id);
  } catch (error) { say(error.message); }
}

async function find(text) {
  if (!text.trim()) return showAll();
  try {
    const found = await get(`api/find?text=${encodeURIComponent(text.trim())}`);
    const more = found.count > found.ids.length ? `, the first ${count(found.ids.length)} of which are shown` : "";
    select(found.ids, `${plural(found.count, "image")} with “${text.trim()}” in name, label or tags${more}`);
    tab("images");
  } catch (error) { say(error.message); }
}

// The buttons stay while their words and number change: one under a finger, or with the focus, is not replaced.
function makeActions() {
  const button = (id, words, kind, work, title = "") => h("button", { id, type: "button", class: kind, title, onclick: work }, words);
  const ids = () => [...shown], tag = h("input", { id: "tag", type: "text", maxlength: 100, placeholder: "Tag", "aria-label": "A tag for these images" });
  const add = (event) => {
    event.preventDefault();
    if (tag.value.trim()) decide(ids(), { add_tag: tag.value });
    tag.value = "";
  };
  $("actions").append(
    button("keep", "Keep", "keep", () => decide(ids(), { keep: true })),
    button("leave-out", "Leave out", "drop", () => decide(ids(), { keep: false })),
    button("undecide", "Undecided", "", () => decide(ids(), { keep: null })),
    button("undo", "Undo", "", takeBack, "Take the last decision back (U)"),
    h("form", { id: "tag-form", onsubmit: add }, tag, h("button", {}, "Tag")),
    button("show-all", "Show all", "", showAll),
    button("decided", "", "", () => select([...decisions.keys()].sort((a, b) => a - b), "Images with a decision or a tag")),
  );
}

function drawActions() {
  const some = shown.length > 0 && shown !== all, active = document.activeElement;
  for (const id of ["keep", "leave-out", "undecide", "tag-form"]) $(id).hidden = !some;
  $("show-all").hidden = shown === all;
  $("undo").hidden = !undo.length;
  $("decided").hidden = !decisions.size;
  $("decided").textContent = `Decided: ${count(decisions.size)}`;
  if ($("actions").contains(active) && active.closest("[hidden]")) $("grid").focus();
}

// Tabs

const tabs = ["images", ...collection.pairs];
$("tabs").append(...tabs.map((name) => h("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-selected": "false", onclick: () => tab(name) }, TABS[name])));
function tab(name) {
  for (const other of tabs) $(`tab-${other}`).setAttribute("aria-selected", String(other === name));
  $("panel-images").hidden = name !== "images";
  $("panel-pairs").hidden = name === "images";
  if (name !== "images" && pairs.kind !== name) pairs.show(name);
  else grid.redraw();
}

// The map

async function hover(id, x, y) {
  const card = $("card");
  if (id === cardFor && id < 0) return;
  cardFor = id;
  if (id < 0) { card.hidden = true; return; }
  const [image] = await describe([id]);
  if (cardFor !== id) return;
  const { clientWidth, clientHeight } = $("map"), right = x + 230 > clientWidth, low = y + 260 > clientHeight;
  const words = [image.label, image.stage && `${image.stage}: ${image.reason ?? ""}`].filter(Boolean).join(" · ");
  card.replaceChildren(picture(id, "medium"), h("p", { dir: "auto" }, fileName(image.path)), words ? h("p", { class: "quiet", dir: "auto" }, words) : "");
  card.style.transform = `translate(${right ? Math.max(4, x - 222) : x + 14}px, ${low ? Math.max(4, clientHeight - 262) : y + 14}px)`;
  card.hidden = false;
}

function toggleLasso(on = !map.drawing) {
  map.setLasso(on);
  $("lasso").setAttribute("aria-pressed", String(on));
}

async function recolour() {
  const name = $("colour").value;
  try {
    colour = name === "decision" ? decisionColour(collection.images) : name ? await loadColour(name) : { kind: "none", names: [], counts: [] };
  } catch (error) { return say(error.message); }
  map.setColours(paint(collection.images, colour));
  $("legend").hidden = colour.kind === "none";
  fill($("legend").querySelector("ul"), legend(colour, (number, words) => {
    const ids = [];
    for (let i = 0; i < collection.images; i++) if (colour.values[i] === number) ids.push(i);
    chosen(ids, `of ${words}`);
    map.setColours(paint(collection.images, colour, new Set(ids)));
  }), $("legend").querySelector("summary"));
}

const choices = [...collection.colours, "decision"];
$("colour").append(...choices.map((name) => h("option", { value: name }, name.replace(/^score_/, "score: "))), h("option", { value: "" }, "none"));
$("colour").addEventListener("change", recolour);
$("lasso").addEventListener("click", () => toggleLasso());
$("fit").addEventListener("click", () => map.fit());
$("visible").addEventListener("click", selectVisible);
function selectVisible() { chosen(map.visible(), "visible on the map"); }
$("find").addEventListener("submit", (event) => { event.preventDefault(); find($("find-text").value); });
$("find-text").addEventListener("search", () => { if (!$("find-text").value) showAll(); });
$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => { searchBy($("file").files[0]); });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => { event.preventDefault(); if (collection.takes_pictures) searchBy(event.dataTransfer.files[0]); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => map.redraw());
$("legend").open = matchMedia("(min-width: 52rem)").matches;

onDecision((ids) => {
  grid.refresh(ids);
  drawActions();
  if ($("colour").value === "decision") recolour();
});

// Keys

function gridKey(event, id) {
  if (event.key === "k") decide([id], { keep: decisions.get(id)?.keep === true ? null : true });
  else if (event.key === "x") decide([id], { keep: decisions.get(id)?.keep === false ? null : false });
}
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("one").open || /INPUT|SELECT/.test(event.target.tagName)) return;
  const act = { l: () => toggleLasso(), v: selectVisible, 0: () => map.fit(), u: takeBack, "/": () => $("find-text").focus(), g: () => { tab("images"); $("grid").focus(); }, Escape: () => { toggleLasso(false); showAll(); } }[event.key];
  if (act) { event.preventDefault(); act(); }
});

makeActions();
showAll();
tab("images");
try {
  map.setPoints(new Float32Array(await getBytes("api/points")));
  $("waiting").hidden = true;
  await recolour();
} catch (error) { $("waiting").textContent = error.message; }
document.body.dataset.ready = "yes";
