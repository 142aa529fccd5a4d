// A grid of thumbnails of which only those exist that can be seen, so that it may have any number.

import { h, picture, remove } from "./dom.js";
import { decisions } from "./images.js";

const WANTED = 104; // pixels of a cell
const TALLEST = 8e6; // pixels of what scrolls: browsers have a limit, of which Firefox's is the lowest, 17.9 million
const DELAY = 90; // milliseconds that a cell is there before its picture is asked for

export function markDecision(element, id) {
  const keep = decisions.get(id)?.keep;
  element.classList.toggle("is-kept", keep === true);
  element.classList.toggle("is-dropped", keep === false);
  const mark = element.querySelector(".mark");
  if (mark) mark.textContent = keep === true ? "✓" : keep === false ? "✕" : "";
}

export class Grid {
  /** `tell` has open(id) and key(event, id). */
  constructor(element, tell) {
    Object.assign(this, { element, tell, ids: [], badges: [], cells: new Map(), active: 0 });
    this.spacer = h("div", { class: "spacer" });
    element.append(this.spacer);
    element.addEventListener("scroll", () => this.redraw());
    element.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.redraw()).observe(element);
  }
  /** Show these images, with a short text on each if there are badges. */
  show(ids, badges = []) {
    Object.assign(this, { ids, badges, active: 0 });
    for (const cell of this.cells.values()) remove(cell);
    this.cells.clear();
    this.element.scrollTop = 0;
    this.redraw();
  }
  refresh(ids) {
    const changed = new Set(ids);
    for (const [index, cell] of this.cells) if (changed.has(this.ids[index])) markDecision(cell, this.ids[index]);
  }
  redraw() { this.frame ??= requestAnimationFrame(() => { this.frame = null; this.draw(); }); }
  draw() {
    const width = this.element.clientWidth - 12, height = this.element.clientHeight;
    if (width <= 0 || !height) return;
    this.columns = Math.max(2, Math.floor(width / WANTED));
    this.side = width / this.columns;
    const whole = Math.ceil(this.ids.length / this.columns) * this.side + 12, { scrollTop } = this.element;
    this.spacer.style.height = `${Math.min(whole, TALLEST)}px`;
    this.pace = whole > TALLEST ? (whole - height) / (TALLEST - height) : 1; // pixels of images for one of the scroll bar
    const top = scrollTop * this.pace;
    const first = Math.max(0, Math.floor(top / this.side) - 1) * this.columns;
    const last = Math.min(this.ids.length, Math.ceil((top + height) / this.side + 1) * this.columns);
    for (const [index, cell] of this.cells) if (index < first || index >= last) { remove(cell); this.cells.delete(index); }
    for (let index = first; index < last; index++) {
      let cell = this.cells.get(index);
      if (!cell) this.cells.set(index, cell = this.make(index));
      cell.style.transform = `translate(${6 + (index % this.columns) * this.side}px, ${6 + Math.floor(index / this.columns) * this.side - top + scrollTop}px)`;
      cell.style.width = cell.style.height = `${this.side}px`;
      cell.classList.toggle("active", index === this.active);
    }
    this.element.setAttribute("aria-activedescendant", `cell-${this.active}`);
  }
  make(index) {
    const id = this.ids[index], frame = h("span", { class: "frame" });
    const cell = h("div", { class: "cell", id: `cell-${index}`, role: "option", "data-id": id, "aria-label": `image ${id}`, onclick: () => {
      this.active = index;
      this.redraw();
      this.tell.open(id);
    } }, frame);
    if (this.badges[index] !== undefined) frame.append(h("span", { class: "badge", dir: "auto" }, this.badges[index]));
    frame.append(h("span", { class: "mark" }));
    markDecision(cell, id);
    setTimeout(() => { if (cell.isConnected || this.cells.get(index) === cell) frame.prepend(picture(id)); }, DELAY);
    cell.style.left = cell.style.top = "0";
    this.element.append(cell);
    return cell;
  }
  key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns,
      PageUp: -4 * this.columns, PageDown: 4 * this.columns, Home: -Infinity, End: Infinity }[event.key];
    if (step !== undefined && this.ids.length) {
      event.preventDefault();
      this.active = Math.max(0, Math.min(this.ids.length - 1, this.active + step));
      const top = Math.floor(this.active / this.columns) * this.side, { clientHeight } = this.element;
      const from = this.element.scrollTop * this.pace, to = top + this.side + 12 - clientHeight;
      if (top < from) this.element.scrollTop = Math.floor(top / this.pace);
      else if (to > from) this.element.scrollTop = Math.ceil(to / this.pace);
      this.redraw();
    } else if (event.key === "Enter" && this.ids.length) this.tell.open(this.ids[this.active]);
    else if (this.ids.length) this.tell.key(event, this.ids[this.active]);
  }
}
