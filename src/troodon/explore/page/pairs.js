// Pairs of images that resemble one another: how many there are above a threshold, those next to it, and their groups.

import { count, fileName, fill, getBytes, h, picture, plural } from "./dom.js";
import { decide, decisions, describe, onDecision } from "./images.js";

const NEXT_TO = 6; // pairs shown on each side of the threshold
const GROUPS = 20; // groups that are shown at once
const MEMBERS = 23; // of a group
const WORDS = {
  similar: { above: "alike", would: "would be left out, if one of each group stays", below: "Just below: they stay apart" },
  copies: { above: "copies", would: "are left out", below: "Just below: they would stay" },
  leaks: { above: "leaks", would: "are left out for a benchmark image", below: "Just below: they would stay" },
};
const WHY = "; of that one, ";

export class PairsPanel {
  /** `tell` has open(id, ids) and select(ids, words). */
  constructor(element, tell) {
    Object.assign(this, { element, tell, loaded: new Map(), drawn: [] }); // `drawn`: groups that are shown, to be drawn again
    onDecision((ids) => {
      const decided = new Set(ids);
      for (const { order, draw } of this.drawn) if (order.some((image) => decided.has(image.id))) draw();
    });
  }

  async show(kind) {
    this.kind = kind;
    this.element.replaceChildren(h("p", { class: "empty" }, kind === "similar" ? "Comparing the images…" : "Reading the ledger…"));
    try {
      if (!this.loaded.has(kind)) this.loaded.set(kind, new Pairs(await getBytes(`api/pairs?of=${kind}`)));
    } catch (error) {
      this.element.replaceChildren(h("p", { class: "empty" }, error.message));
      return;
    }
    if (this.kind === kind) this.build(this.loaded.get(kind));
  }

  build(pairs) {
    this.pairs = pairs;
    if (!pairs.length) {
      this.element.replaceChildren(h("p", { class: "empty" }, "There is none."));
      return;
    }
    const { score } = pairs, low = score[pairs.length - 1], high = score[0];
    const start = this.kind === "similar" ? score[Math.min(pairs.length - 1, Math.floor(pairs.length / 20))] : low;
    this.slider = h("input", { type: "range", id: "threshold", min: 0, max: 1000, step: 1, "aria-label": "Threshold", oninput: () => this.recount() });
    Object.assign(this, { low, high });
    this.slider.value = String(high > low ? Math.floor(((start - low) / (high - low)) * 1000) : 0);
    this.says = h("output", { for: "threshold", id: "threshold-says" });
    this.above = h("div", { class: "pairs", id: "above" });
    this.below = h("div", { class: "pairs", id: "below" });
    this.groups = h("div", { id: "groups" });
    const button = (words, kind, id, work) => h("button", { type: "button", class: kind, id, onclick: work }, words);
    this.keepBelow = button("", "keep", "keep-below", () => decide(pairs.rowsFrom(this.first), { keep: true }));
    const members = () => this.found.flat(), inGroups = () => `${plural(members().length, "image")} in ${plural(this.found.length, "group")}`;
    this.selectThem = button("Select them", "", "select-groups", () => this.tell.select(members(), inGroups()));
    this.oneOfEach = button("Keep one of each group", "drop", "one-of-each", () => this.leaveOne(this.found));
    this.actions = h("div", { class: "actions" }, this.keepBelow, this.selectThem, this.oneOfEach);
    this.element.replaceChildren(
      h("div", { class: "threshold" }, h("label", { for: "threshold", class: "quiet" }, "Similarity of a pair"), this.slider, this.says, this.actions),
      h("h3", {}, "Just above the threshold"), this.above, h("h3", {}, WORDS[this.kind].below), this.below, h("h3", {}, "Groups"), this.groups,
    );
    this.recount();
  }

  get threshold() { return this.low + (Number(this.slider.value) / 1000) * (this.high - this.low); }

  recount() {
    const { pairs } = this, at = this.threshold, words = WORDS[this.kind];
    const first = pairs.above(at);
    const out = this.kind === "leaks" ? new Set(pairs.row.subarray(0, first)).size : pairs.joined[first];
    this.says.textContent = `${plural(first, "pair")} of ${at.toFixed(3)} or more: ${plural(pairs.groupCount[first], "group")}, ${plural(out, "image")} ${words.would}`;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.details(first), 120);
  }

  details(first) {
    const { pairs } = this, side = (from, to) => Array.from({ length: Math.max(0, to - from) }, (_, i) => this.pair(from + i));
    fill(this.above, side(Math.max(0, first - NEXT_TO), first).reverse(), this.slider);
    fill(this.below, side(first, Math.min(pairs.length, first + NEXT_TO)), this.slider);
    if (!this.below.childElementCount) this.below.append(h("p", { class: "quiet" }, "There is none below."));
    if (!this.above.childElementCount) this.above.append(h("p", { class: "quiet" }, "There is none above."));
    const below = pairs.rowsFrom(first).length, found = pairs.groups(first, this.kind !== "similar");
    Object.assign(this, { first, found, drawn: [] });
    this.keepBelow.textContent = `Keep the ${count(below)} below`;
    this.keepBelow.hidden = this.kind === "similar" || !below;
    this.selectThem.hidden = !found.length;
    this.oneOfEach.hidden = this.kind !== "similar" || !found.length;
    fill(this.groups, [], this.slider);
    this.more(found, 0);
  }

  more(found, from) {
    for (const ids of found.slice(from, from + GROUPS)) {
      const element = h("div", { class: "group" });
      this.groups.append(element);
      this.group(element, ids);
    }
    const left = found.length - from - GROUPS;
    if (left > 0) {
      const button = h("button", { type: "button", onclick: () => { button.remove(); this.more(found, from + GROUPS); } }, `Show more of ${count(left)} groups`);
      this.groups.append(button);
    }
  }

  pair(index) {
    const { row, other, score } = this.pairs, ids = [row[index], other[index]];
    return h("button", { type: "button", class: "pair", onclick: () => this.tell.open(ids[0], ids) },
      ids.map((id) => picture(id, "small", `image ${id}`)), h("span", {}, score[index].toFixed(4)));
  }

  /** Fill in a group: the image that stays first, why it does, and a choice for each of the others. */
  async group(element, ids) {
    const images = await describe(ids.slice(0, MEMBERS + 1));
    const { stays, why } = representative(images, this.kind);
    const order = [stays, ...images.filter((image) => image !== stays)];
    const members = h("div", { class: "members" });
    const draw = () => {
      const at = [...members.children].findIndex((member) => member.contains(document.activeElement));
      fill(members, order.map((image) => this.member(image, stays, why, order)));
      members.children[at]?.querySelector("button").focus();
    };
    draw();
    fill(element, [members]);
    if (ids.length > MEMBERS + 1) element.append(h("p", { class: "quiet" }, `and ${count(ids.length - MEMBERS - 1)} more`));
    this.drawn.push({ order, draw });
  }

  member(image, stays, why, order) {
    const decided = decisions.get(image.id)?.keep, first = image === stays;
    const stands = decided ?? (first ? image.kept ?? true : image.kept ?? (this.kind === "similar" ? null : false));
    const act = (words, kind, work) => h("button", { type: "button", class: `do ${kind}`, onclick: work }, words);
    const buttons = [], leak = this.kind === "leaks";
    if (first && stands && this.kind === "similar" && order.length > 1) {
      buttons.push(act("Leave out the others", "drop", () => decide(order.filter((one) => one !== image).map((one) => one.id), { keep: false })));
    }
    if (first && stands === false && !leak) buttons.push(act("Keep it", "keep", () => decide([image.id], { keep: true })));
    if (!first && stands !== true && !leak) buttons.push(act("This one instead", "keep", () => decide([image.id], { keep: true, instead_of: stays.id })));
    if (!first && stands !== true) buttons.push(act(leak ? "Keep it all the same" : "Keep both", "keep", () => decide([image.id], { keep: true })));
    if (stands === true && !first) buttons.push(act("Leave out", "drop", () => decide([image.id], { keep: false })));
    if (decided !== undefined && decided !== null) buttons.push(act("Undecided", "", () => decide([image.id], { keep: null })));
    const reason = decided === true ? "You keep it" : decided === false ? "You leave it out" : first && (stands || leak) ? why : (image.reason ?? "").split(WHY)[0];
    const size = image.width ? `${image.width} × ${image.height}` : "";
    return h("div", { class: stands === true ? "member stays" : "member" },
      h("button", { type: "button", "aria-label": `Open ${fileName(image.path)}`, onclick: () => this.tell.open(image.id, order.map((one) => one.id)) }, picture(image.id, "medium", "")),
      h("p", { dir: "auto" }, fileName(image.path)), h("p", { class: "quiet" }, size), h("p", { class: "quiet", dir: "auto" }, reason), buttons);
  }

  /** Of every group the image with the most pixels stays. */
  async leaveOne(found) {
    const out = [], images = new Map((await describe(found.flat())).map((image) => [image.id, image]));
    for (const ids of found) {
      const { stays } = representative(ids.map((id) => images.get(id)), "similar");
      const others = ids.filter((id) => id !== stays.id && decisions.get(id)?.keep !== true);
      out.push(...others.filter((id) => images.get(id).kept !== false)); // those that the ledger leaves out are out
    }
    await decide(out, { keep: false });
  }
}

/** The image of a group that stays, and why. */
function representative(images, kind) {
  const decided = images.filter((image) => decisions.get(image.id)?.keep === true);
  if (kind !== "similar") {
    const kept = images.filter((image) => image.kept && decisions.get(image.id)?.keep !== false);
    const stays = decided[0] ?? (kind === "leaks" ? images.find((image) => image.pool === "benchmark") : kept[0]) ?? images[0];
    const reasons = images.map((image) => image.reason ?? "").filter((text) => text.includes(WHY)).map((text) => text.split(WHY)[1]);
    const why = [...new Set(reasons)].join("; ").replaceAll("which ", "");
    return { stays, why: kind === "leaks" ? "of the benchmark" : why ? `Stays: ${why}` : "Stays" };
  }
  const pixels = (image) => (image.width ?? 0) * (image.height ?? 0);
  const there = images.some((image) => image.kept !== false) ? images.filter((image) => image.kept !== false) : images;
  const best = there.reduce((a, b) => (pixels(b) > pixels(a) || (pixels(b) === pixels(a) && (b.length ?? 0) > (a.length ?? 0)) ? b : a));
  const same = there.every((image) => pixels(image) === pixels(best));
  return { stays: decided[0] ?? best, why: same ? "As large as the others; the most bytes" : "Most pixels of the group" };
}

class Pairs {
  constructor(bytes) {
    const length = new Uint32Array(bytes, 0, 1)[0];
    this.length = length;
    this.row = new Uint32Array(bytes, 4, length);
    this.other = new Uint32Array(bytes, 4 + 4 * length, length);
    this.score = new Float32Array(bytes, 4 + 8 * length, length);
    // After each pair: the images joined to another so far, and the groups of two and more.
    this.joined = new Uint32Array(length + 1);
    this.groupCount = new Uint32Array(length + 1);
    const union = new Union();
    for (let i = 0; i < length; i++) {
      const [a, b] = [union.root(this.row[i]), union.root(this.other[i])];
      this.joined[i + 1] = this.joined[i] + (a === b ? 0 : 1);
      const change = a === b ? 0 : 1 - (union.size(a) > 1 ? 1 : 0) - (union.size(b) > 1 ? 1 : 0);
      this.groupCount[i + 1] = this.groupCount[i] + change;
      union.join(a, b);
    }
  }
  /** How many pairs have at least this score. */
  above(threshold) {
    let [low, high] = [0, this.length];
    const least = Math.fround(threshold - 1e-7);
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.score[middle] >= least) low = middle + 1;
      else high = middle;
    }
    return low;
  }
  rowsFrom(first) { return [...new Set(this.row.subarray(first))]; }
  /** The groups of the first pairs; of a ledger, the most doubtful ones first. */
  groups(first, doubtful) {
    const union = new Union(), order = [];
    for (let i = 0; i < first; i++) union.join(union.root(this.row[i]), union.root(this.other[i]));
    const members = new Map();
    for (let at = 0; at < first; at++) {
      const i = doubtful ? first - 1 - at : at;
      for (const id of [this.other[i], this.row[i]]) {
        const root = union.root(id);
        if (!members.has(root)) { members.set(root, new Set()); order.push(root); }
        members.get(root).add(id);
      }
    }
    return order.map((root) => [...members.get(root)]);
  }
}

class Union {
  constructor() { this.up = new Map(); this.sizes = new Map(); }
  root(id) {
    let root = id;
    while (this.up.has(root)) root = this.up.get(root);
    while (id !== root) { const next = this.up.get(id); this.up.set(id, root); id = next; }
    return root;
  }
  size(root) { return this.sizes.get(root) ?? 1; }
  join(a, b) {
    if (a === b) return;
    if (this.size(a) < this.size(b)) [a, b] = [b, a];
    this.up.set(b, a);
    this.sizes.set(a, this.size(a) + this.size(b));
  }
}
