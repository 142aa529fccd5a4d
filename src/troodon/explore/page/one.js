// One image, large: what is known about it, what is decided, and the images nearest to it.

import { $, fileName, fill, get, h, picture, say } from "./dom.js";
import { decide, decisions, describe, onDecision } from "./images.js";

const FIELDS = [
  ["path", "Path"], ["label", "Label"], ["split", "Split"], ["pool", "Pool"], ["status", "Status"], ["stage", "Stage"],
  ["reason", "Reason"], ["score", "Score"], ["marks", "Marks"],
];
const NEIGHBOURS = 24;

/** A window that stays as it is while images come and go: a control under a finger, or with the focus, is not replaced. */
export class One {
  /** `tell` has near(id), which shows its neighbours in the grid, and moved(id). */
  constructor(tell) {
    Object.assign(this, { tell, dialog: $("one"), id: null, ids: [] });
    const { dialog } = this, button = (words, kind, work) => h("button", { type: "button", class: kind, onclick: work }, words);
    const toggle = (keep) => decide([this.id], { keep: decisions.get(this.id)?.keep === keep ? null : keep });
    this.large = h("div", { class: "large" });
    this.title = h("h2", { dir: "auto" });
    this.facts = h("dl");
    this.keep = button("Keep (K)", "keep", () => toggle(true));
    this.drop = button("Leave out (X)", "drop", () => toggle(false));
    this.tags = h("div", { class: "tags" });
    this.tag = h("input", { type: "text", maxlength: 100, placeholder: "Add a tag", "aria-label": "Add a tag" });
    this.near = button("Show its neighbours", "", () => { dialog.close(); tell.near(this.id); });
    this.cause = button("Show the image that is the cause", "", () => this.open(this.image.cause, [this.id, this.image.cause]));
    this.strip = h("div", { class: "strip", "aria-label": "Nearest images" });
    const add = (event) => {
      event.preventDefault();
      if (this.tag.value.trim()) decide([this.id], { add_tag: this.tag.value });
      this.tag.value = "";
    };
    dialog.append(
      h("div", { class: "bar" }, h("button", { type: "button", class: "close", "aria-label": "Close", onclick: () => dialog.close() }, "✕")),
      h("div", { class: "one" }, this.large, h("div", { class: "text" }, this.title, this.facts,
        h("div", { class: "actions" }, this.keep, this.drop), this.tags, h("form", { class: "actions", onsubmit: add }, this.tag, h("button", {}, "Tag")),
        h("div", { class: "actions" }, this.near, this.cause)), this.strip));
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
    addEventListener("keydown", (event) => { if (dialog.open) this.key(event); });
    onDecision((ids) => { if (dialog.open && ids.includes(this.id)) this.drawDecision(); });
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
    const words = (value) => String(typeof value === "number" ? Number(value.toFixed(4)) : value);
    fill(this.large, [picture(id, "large", "")]);
    this.title.textContent = fileName(image.path);
    this.facts.replaceChildren(...facts.flatMap(([word, value]) => [h("dt", {}, word), h("dd", { dir: "auto" }, words(value))]));
    this.tag.value = "";
    this.cause.hidden = image.cause === undefined;
    this.drawDecision();
    if (!this.dialog.open) {
      fill(this.strip, []);
      this.dialog.showModal();
    }
    this.dialog.scrollTop = 0;
    this.tell.moved(id);
    try {
      const near = await get(`api/neighbours?id=${id}&k=${NEIGHBOURS}`);
      if (this.id !== id) return;
      const all = near.map((one) => one.id);
      const shown = near.map((one) => h("button", { type: "button", onclick: () => this.open(one.id, all) }, picture(one.id), one.similarity.toFixed(3)));
      fill(this.strip, shown.length ? shown : [h("p", { class: "quiet" }, "It has no vector, and so no neighbours.")], this.dialog);
      this.strip.scrollLeft = 0;
    } catch (error) { if (this.id === id) fill(this.strip, [error.message], this.dialog); }
  }
  drawDecision() {
    const { id } = this, made = decisions.get(id), keep = made?.keep ?? null;
    this.keep.setAttribute("aria-pressed", String(keep === true));
    this.drop.setAttribute("aria-pressed", String(keep === false));
    fill(this.tags, (made?.tags ?? []).map((tag) => h("button", { type: "button", dir: "auto", title: "Remove this tag", onclick: () => decide([id], { remove_tag: tag }) }, tag, " ✕")), this.tag);
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
