// One image, large: what is known about it, what is decided, and the images nearest to it.

import { $, fileName, get, h, picture, say } from "./dom.js";
import { decide, decisions, describe, onDecision } from "./images.js";

const FIELDS = [
  ["path", "Path"], ["label", "Label"], ["split", "Split"], ["pool", "Pool"], ["status", "Status"], ["stage", "Stage"],
  ["reason", "Reason"], ["score", "Score"], ["marks", "Marks"],
];
const NEIGHBOURS = 24;

export class One {
  /** `tell` has near(id), which shows its neighbours in the grid, and moved(id). */
  constructor(tell) {
    Object.assign(this, { tell, dialog: $("one"), id: null, ids: [] });
    this.dialog.addEventListener("click", (event) => { if (event.target === this.dialog) this.dialog.close(); });
    this.dialog.addEventListener("keydown", (event) => this.key(event));
    onDecision((ids) => { if (this.dialog.open && ids.includes(this.id)) this.drawDecision(); });
  }
  /** Open an image; arrows go through `ids`. */
  async open(id, ids = [id]) {
    Object.assign(this, { id, ids });
    let image;
    try { [image] = await describe([id]); } catch (error) { return say(error.message); }
    if (this.id !== id) return;
    this.image = image;
    const facts = FIELDS.filter(([name]) => image[name] !== undefined).map(([name, word]) => [word, image[name]]);
    if (image.width) facts.push(["Size", `${image.width} × ${image.height} pixels`]);
    for (const [name, value] of Object.entries(image)) if (name.startsWith("score_")) facts.push([name.slice(6), value]);
    this.choice = h("div", { class: "actions" });
    this.tags = h("div", { class: "tags" });
    const cause = image.cause === undefined ? null : h("button", { type: "button", onclick: () => this.open(image.cause, [id, image.cause]) }, "Show the image that is the cause");
    const strip = h("div", { class: "strip", "aria-label": "Nearest images" });
    const tag = h("input", { type: "text", maxlength: 100, placeholder: "Add a tag", "aria-label": "Add a tag" });
    this.dialog.replaceChildren(
      h("div", { class: "bar" }, h("button", { type: "button", class: "close", "aria-label": "Close", onclick: () => this.dialog.close() }, "✕")),
      h("div", { class: "one" },
        h("div", { class: "large" }, picture(id, "large", "")),
        h("div", { class: "text" }, h("h2", { dir: "auto" }, fileName(image.path)),
          h("dl", {}, facts.map(([word, value]) => [h("dt", {}, word), h("dd", { dir: "auto" }, String(typeof value === "number" ? Number(value.toFixed(4)) : value))])),
          this.choice, this.tags,
          h("form", { class: "actions", onsubmit: (event) => { event.preventDefault(); if (tag.value.trim()) decide([id], { add_tag: tag.value }); tag.value = ""; } }, tag, h("button", {}, "Tag")),
          h("div", { class: "actions" }, h("button", { type: "button", onclick: () => { this.dialog.close(); this.tell.near(id); } }, "Show its neighbours"), cause)),
        strip));
    this.drawDecision();
    if (!this.dialog.open) this.dialog.showModal();
    this.dialog.scrollTop = 0;
    this.tell.moved(id);
    try {
      const near = await get(`api/neighbours?id=${id}&k=${NEIGHBOURS}`);
      if (this.id !== id) return;
      const all = near.map((one) => one.id);
      strip.replaceChildren(...near.map((one) => h("button", { type: "button", onclick: () => this.open(one.id, all) }, picture(one.id), one.similarity.toFixed(3))));
      if (!near.length) strip.append(h("p", { class: "quiet" }, "It has no vector, and so no neighbours."));
    } catch (error) { strip.replaceChildren(error.message); }
  }
  drawDecision() {
    const { id } = this, made = decisions.get(id), keep = made?.keep ?? null;
    const button = (words, value, kind) => h("button", { type: "button", class: kind, "aria-pressed": String(keep === value), onclick: () => decide([id], { keep: keep === value ? null : value }) }, words);
    this.choice.replaceChildren(button("Keep (K)", true, "keep"), button("Leave out (X)", false, "drop"));
    this.tags.replaceChildren(...(made?.tags ?? []).map((tag) => h("button", { type: "button", dir: "auto", title: "Remove this tag", onclick: () => decide([id], { remove_tag: tag }) }, tag, " ✕")));
  }
  key(event) {
    if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = this.ids.indexOf(this.id);
    if (event.key === "ArrowRight" && at + 1 < this.ids.length) this.open(this.ids[at + 1], this.ids);
    else if (event.key === "ArrowLeft" && at > 0) this.open(this.ids[at - 1], this.ids);
    else if (event.key === "k") decide([this.id], { keep: true });
    else if (event.key === "x") decide([this.id], { keep: false });
    else return;
    event.preventDefault();
  }
}
