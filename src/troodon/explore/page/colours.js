// Colours of points: of classes, of numbers, and of what is decided.

import { count, getBytes, h } from "./dom.js";
import { decisions } from "./images.js";

// Twelve hues that stay apart on light and dark ground; further classes are lighter or darker ones, and then repeat.
const CLASSES = ["0072b2", "d55e00", "009e73", "cc79a7", "e69f00", "56b4e9", "8c564b", "7f5fc7", "b3b000", "d1495b", "3a7d44", "00a5a8"];
const RAMP = ["440154", "3b528b", "21918c", "5ec962", "fde725"];
const GREY = [140, 146, 152];
const parse = (hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
const towards = (end, share) => CLASSES.map(parse).map((rgb) => rgb.map((v) => Math.round(v + share * (end - v))));
const PALETTE = [...towards(0, 0), ...towards(255, 0.45), ...towards(0, 0.4)], STOPS = RAMP.map(parse);
const ofClass = (number) => (number === 65535 ? GREY : PALETTE[number % PALETTE.length]);
const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;

export async function loadColour(name) {
  const bytes = await getBytes(`api/colour?by=${encodeURIComponent(name)}`), length = new Uint32Array(bytes, 0, 1)[0];
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 4, length)));
  return { ...head, values: head.kind === "classes" ? new Uint16Array(bytes, 4 + length) : new Float32Array(bytes, 4 + length) };
}

/** Bytes of red, green, blue and alpha for each image. `shown` limits it to some of them: the others are faint. */
export function paint(images, colour, shown) {
  const out = new Uint8Array(4 * images);
  let [low, high] = [Infinity, -Infinity];
  if (colour.kind === "numbers") {
    for (const value of colour.values) if (Number.isFinite(value)) { low = Math.min(low, value); high = Math.max(high, value); }
    Object.assign(colour, { low, high });
  }
  for (let i = 0; i < images; i++) {
    let rgb = GREY;
    if (colour.kind === "classes") rgb = ofClass(colour.values[i]);
    else if (colour.kind === "numbers" && Number.isFinite(colour.values[i])) rgb = ramp(high > low ? (colour.values[i] - low) / (high - low) : 0.5);
    out[4 * i] = rgb[0]; out[4 * i + 1] = rgb[1]; out[4 * i + 2] = rgb[2];
    out[4 * i + 3] = shown && !shown.has(i) ? 40 : rgb === GREY ? 150 : 215;
  }
  return out;
}

function ramp(share) {
  const place = share * (STOPS.length - 1), first = Math.min(STOPS.length - 2, Math.floor(place)), rest = place - first;
  return STOPS[first].map((value, i) => Math.round(value + rest * (STOPS[first + 1][i] - value)));
}

export function decisionColour(images) {
  const values = new Uint16Array(images).fill(65535), names = ["kept", "left out", "tagged"], counts = [0, 0, 0];
  for (const [id, { keep, tags }] of decisions) {
    const place = keep === true ? 0 : keep === false ? 1 : tags.length ? 2 : -1;
    if (place >= 0) { values[id] = place; counts[place]++; }
  }
  return { kind: "classes", values, names, counts };
}

/** The lines of the legend; a click on a class calls `choose` with its number. */
export function legend(colour, choose) {
  if (colour.kind === "numbers") {
    const bar = h("canvas", { class: "ramp", width: 100, height: 1 }), context = bar.getContext("2d");
    for (let i = 0; i < 100; i++) { context.fillStyle = css(ramp(i / 99)); context.fillRect(i, 0, 1, 1); }
    const short = (value) => (Number.isFinite(value) ? value.toLocaleString("en", { maximumSignificantDigits: 3 }) : "none");
    return [h("li", {}, bar, h("span", { class: "ends" }, h("span", {}, short(colour.low)), h("span", {}, short(colour.high))))];
  }
  const items = colour.names.slice(0, 100).map((name, i) => {
    const swatch = h("span", { class: "swatch" });
    swatch.style.background = css(ofClass(i));
    return h("li", {}, h("button", { type: "button", onclick: () => choose(i, name) }, swatch, h("span", { class: "what", dir: "auto" }, name), h("span", { class: "number" }, count(colour.counts[i]))));
  });
  if (colour.names.length > 100) items.push(h("li", { class: "quiet" }, `and ${count(colour.names.length - 100)} more`));
  return items;
}
