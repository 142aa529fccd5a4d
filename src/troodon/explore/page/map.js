// A map of points: drawn by WebGL, or without it into the pixels of a canvas. Pan, zoom, lasso, and what is under a place.

import { remove } from "./dom.js";

const VERTEX = `attribute vec2 place; attribute vec4 colour; uniform vec4 view; uniform mediump float size; varying vec4 shade;
void main() { gl_Position = vec4((place - view.xy) * view.zw, 0.0, 1.0); gl_PointSize = size; shade = colour; }`;
const FRAGMENT = `precision mediump float; varying vec4 shade; uniform mediump float size;
void main() {
  float far = length(gl_PointCoord - 0.5) * size;
  float alpha = shade.a * (size < 3.0 ? 1.0 : clamp(size * 0.5 - far + 0.5, 0.0, 1.0));
  if (alpha == 0.0) discard;
  gl_FragColor = vec4(shade.rgb * alpha, alpha);
}`;
const MAX_THUMBS = 220;
const TOOLS = 56; // pixels at the top that the tools take
const MARGIN = 56; // pixels that a map of all leaves free: half of a small picture on each side, and a little
const STILL = { mouse: 4, pen: 6, touch: 12 }; // pixels that a pointer may move, and yet has chosen

function shaded(gl, kind, source) {
  const shader = gl.createShader(kind);
  gl.shaderSource(shader, source);
  gl.compileShader(shader);
  return shader;
}

/** Draws points by WebGL. */
class Gl {
  constructor(canvas) {
    const gl = canvas.getContext("webgl", { antialias: false, alpha: true, powerPreference: "high-performance" });
    if (!gl) throw new Error("no WebGL");
    const program = gl.createProgram();
    gl.attachShader(program, shaded(gl, gl.VERTEX_SHADER, VERTEX));
    gl.attachShader(program, shaded(gl, gl.FRAGMENT_SHADER, FRAGMENT));
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error("WebGL takes no shader");
    gl.useProgram(program);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    this.gl = gl;
    this.count = 0;
    this.view = gl.getUniformLocation(program, "view");
    this.size = gl.getUniformLocation(program, "size");
    this.buffers = ["place", "colour"].map((name, i) => {
      const buffer = gl.createBuffer(), place = gl.getAttribLocation(program, name);
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      gl.enableVertexAttribArray(place);
      gl.vertexAttribPointer(place, i ? 4 : 2, i ? gl.UNSIGNED_BYTE : gl.FLOAT, Boolean(i), 0, 0);
      return buffer;
    });
  }
  setPoints(places, colours) {
    this.count = places.length / 2;
    this.fill(0, places);
    this.setColours(colours);
  }
  setColours(colours) { this.fill(1, colours); }
  fill(which, values) {
    this.gl.bindBuffer(this.gl.ARRAY_BUFFER, this.buffers[which]);
    this.gl.bufferData(this.gl.ARRAY_BUFFER, values, this.gl.STATIC_DRAW);
  }
  draw({ x, y, scale }, width, height, size) {
    const gl = this.gl;
    gl.viewport(0, 0, width, height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.uniform4f(this.view, x, y, (2 * scale) / width, (-2 * scale) / height);
    gl.uniform1f(this.size, size);
    gl.drawArrays(gl.POINTS, 0, this.count);
  }
}

/** Draws points into the pixels of a canvas. */
class Plain {
  constructor(canvas) { this.context = canvas.getContext("2d"); }
  setPoints(places, colours) { this.places = places; this.setColours(colours); }
  setColours(colours) { this.colours = new Uint32Array(colours.buffer); }
  draw({ x, y, scale }, width, height, size) {
    const image = this.context.createImageData(width, height), pixels = new Uint32Array(image.data.buffer);
    const side = Math.max(1, Math.round(size * 0.8)), half = side >> 1;
    for (let i = 0; i < this.colours.length; i++) {
      const left = Math.round((this.places[2 * i] - x) * scale + width / 2) - half;
      const top = Math.round((this.places[2 * i + 1] - y) * scale + height / 2) - half;
      if (!(left >= 0 && top >= 0 && left + side <= width && top + side <= height)) continue;
      for (let row = top; row < top + side; row++) pixels.fill(this.colours[i], row * width + left, row * width + left + side);
    }
    this.context.putImageData(image, 0, 0);
  }
}

/** Points by cells of a grid, to find those near a place. */
class Cells {
  constructor(places) {
    const count = places.length / 2;
    let [left, top, right, bottom] = [Infinity, Infinity, -Infinity, -Infinity];
    for (let i = 0; i < count; i++) {
      const x = places[2 * i], y = places[2 * i + 1];
      if (x < left) left = x;
      if (x > right) right = x;
      if (y < top) top = y;
      if (y > bottom) bottom = y;
    }
    if (!(right >= left)) [left, top, right, bottom] = [-1, -1, 1, 1];
    this.places = places;
    this.box = { left, top, right, bottom };
    this.side = Math.max(1, Math.min(1024, Math.round(Math.sqrt(count / 3))));
    this.width = Math.max(right - left, 1e-6) / this.side;
    this.height = Math.max(bottom - top, 1e-6) / this.side;
    this.starts = new Uint32Array(this.side * this.side + 2);
    const cells = new Int32Array(count).fill(-1);
    for (let i = 0; i < count; i++) {
      if (Number.isNaN(places[2 * i])) continue;
      cells[i] = this.row(places[2 * i + 1]) * this.side + this.column(places[2 * i]);
      this.starts[cells[i] + 2]++;
    }
    for (let c = 2; c < this.starts.length; c++) this.starts[c] += this.starts[c - 1];
    this.ids = new Uint32Array(this.starts[this.starts.length - 1]);
    for (let i = 0; i < count; i++) if (cells[i] >= 0) this.ids[this.starts[cells[i] + 1]++] = i;
  }
  column(x) { return Math.max(0, Math.min(this.side - 1, Math.floor((x - this.box.left) / this.width))); }
  row(y) { return Math.max(0, Math.min(this.side - 1, Math.floor((y - this.box.top) / this.height))); }
  /** Calls `each` with every point in a box; stops when it returns false. */
  inside(left, top, right, bottom, each) {
    for (let row = this.row(top); row <= this.row(bottom); row++) {
      for (let column = this.column(left); column <= this.column(right); column++) {
        const cell = row * this.side + column;
        for (let at = this.starts[cell]; at < this.starts[cell + 1]; at++) {
          const id = this.ids[at], x = this.places[2 * id], y = this.places[2 * id + 1];
          if (x >= left && x <= right && y >= top && y <= bottom && each(id, x, y) === false) return;
        }
      }
    }
  }
}

export class PointMap {
  /** `tell` has hover(id, x, y), pick(id), lasso(ids) and thumb(id), which makes a small picture. */
  constructor(points, thumbs, overlay, tell) {
    Object.assign(this, { points, thumbs, overlay, tell });
    try {
      this.painter = new Gl(points);
    } catch {
      this.points = points.cloneNode(); // a canvas that was asked for WebGL gives nothing else
      points.replaceWith(this.points);
      this.painter = new Plain(this.points);
    }
    points.addEventListener("webglcontextlost", (event) => event.preventDefault());
    points.addEventListener("webglcontextrestored", () => {
      this.painter = new Gl(points);
      this.painter.setPoints(this.places, this.colours);
      this.redraw();
    });
    this.context = overlay.getContext("2d");
    this.view = { x: 0, y: 0, scale: 1 };
    this.marked = [];
    this.pointers = new Map();
    this.path = null;
    this.drawing = false;
    this.shownThumbs = new Map();
    new ResizeObserver(() => this.resize()).observe(overlay);
    this.listen();
  }

  setPoints(places) {
    this.places = places;
    this.cells = new Cells(places);
    this.colours = new Uint8Array(2 * places.length).fill(128);
    this.painter.setPoints(places, this.colours);
    this.resize();
    this.fit();
  }
  setColours(colours) {
    this.colours = colours;
    this.painter.setColours(colours);
    this.redraw();
  }
  /** Draw rings around these images, the first of them stronger. */
  mark(ids) { this.marked = ids.slice(0, 5000); this.redraw(); }

  resize() {
    const ratio = Math.min(2, window.devicePixelRatio || 1);
    this.ratio = ratio;
    const { clientWidth, clientHeight } = this.overlay;
    if (!clientWidth) return;
    const isWhole = !this.width || this.view === this.fitted;
    for (const canvas of [this.points, this.overlay]) {
      canvas.width = Math.round(clientWidth * ratio);
      canvas.height = Math.round(clientHeight * ratio);
    }
    [this.width, this.height] = [clientWidth, clientHeight];
    if (this.places && isWhole) this.fit(); // also when a phone is turned
    this.redraw();
  }
  fit() {
    if (!this.cells || !this.width) return;
    const { left, top, right, bottom } = this.cells.box;
    this.view = {
      x: (left + right) / 2, y: (top + bottom) / 2,
      scale: Math.min(
        Math.max(MARGIN, this.width - MARGIN) / Math.max(right - left, 1e-6),
        Math.max(MARGIN, this.height - TOOLS - MARGIN) / Math.max(bottom - top, 1e-6),
      ),
    };
    this.view.y -= TOOLS / 2 / this.view.scale;
    this.whole = this.view.scale;
    this.fitted = this.view;
    this.redraw();
  }
  /** Move to an image, nearer if the map is far. */
  centre(id) {
    const x = this.places?.[2 * id];
    if (x === undefined || Number.isNaN(x)) return;
    this.view = { x, y: this.places[2 * id + 1], scale: Math.max(this.view.scale, this.whole * 3) };
    this.redraw();
  }
  zoom(by, x = this.width / 2, y = this.height / 2) {
    const [worldX, worldY] = this.toWorld(x, y);
    const scale = Math.max(this.whole * 0.5, Math.min(this.whole * 5000, this.view.scale * by));
    this.view = { x: worldX - (x - this.width / 2) / scale, y: worldY - (y - this.height / 2) / scale, scale };
    this.redraw();
  }
  pan(x, y) {
    this.view = { ...this.view, x: this.view.x - x / this.view.scale, y: this.view.y - y / this.view.scale };
    this.redraw();
  }
  toWorld(x, y) {
    return [this.view.x + (x - this.width / 2) / this.view.scale, this.view.y + (y - this.height / 2) / this.view.scale];
  }
  toScreen(id) {
    return [
      (this.places[2 * id] - this.view.x) * this.view.scale + this.width / 2,
      (this.places[2 * id + 1] - this.view.y) * this.view.scale + this.height / 2,
    ];
  }
  /** The nearest image within some pixels of a place; -1 for none. */
  at(x, y, reach = 14) {
    if (!this.cells) return -1;
    const [left, top] = this.toWorld(x - reach, y - reach), [right, bottom] = this.toWorld(x + reach, y + reach);
    const [worldX, worldY] = this.toWorld(x, y);
    let best = -1, nearest = (reach / this.view.scale) ** 2;
    this.cells.inside(left, top, right, bottom, (id, px, py) => {
      const far = (px - worldX) ** 2 + (py - worldY) ** 2;
      if (far <= nearest) [best, nearest] = [id, far];
    });
    return best;
  }
  /** All images that can be seen now. */
  visible(limit = Infinity) {
    const ids = [];
    if (this.cells) {
      this.cells.inside(...this.toWorld(0, 0), ...this.toWorld(this.width, this.height), (id) => ids.push(id) < limit);
    }
    return ids;
  }
  within(path) {
    const world = path.map(([x, y]) => this.toWorld(x, y)), xs = world.map((p) => p[0]), ys = world.map((p) => p[1]);
    const ids = [], low = (v) => v.reduce((a, b) => Math.min(a, b)), high = (v) => v.reduce((a, b) => Math.max(a, b));
    this.cells.inside(low(xs), low(ys), high(xs), high(ys), (id, x, y) => {
      let inside = false;
      for (let i = 0, j = world.length - 1; i < world.length; j = i++) {
        const [ax, ay] = world[i], [bx, by] = world[j];
        if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) inside = !inside;
      }
      if (inside) ids.push(id);
    });
    return ids;
  }

  redraw() {
    this.frame ??= requestAnimationFrame(() => { this.frame = null; this.draw(); });
  }
  draw() {
    if (!this.places || !this.width) return;
    const { ratio } = this, count = this.cells.ids.length || 1;
    const grown = Math.min(4, (this.view.scale / this.whole) ** 0.35);
    const size = Math.max(1.2, Math.min(9, (260 / Math.sqrt(count)) * grown)) * ratio;
    this.painter.draw({ ...this.view, scale: this.view.scale * ratio }, this.points.width, this.points.height, size);
    const context = this.context, style = getComputedStyle(document.body);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.width, this.height);
    const accent = style.getPropertyValue("--accent"), ink = style.getPropertyValue("--ink");
    const faint = Math.max(0.25, Math.min(1, Math.sqrt(150 / this.marked.length))); // many rings would hide what they mark
    this.marked.forEach((id, i) => {
      const [x, y] = this.toScreen(id);
      if (!(x > -9 && y > -9 && x < this.width + 9 && y < this.height + 9)) return;
      context.beginPath();
      context.arc(x, y, i ? 5 : 9, 0, 7);
      context.globalAlpha = i ? faint : 1;
      [context.strokeStyle, context.lineWidth] = i ? [accent, 1.5] : [ink, 2.5];
      context.stroke();
    });
    context.globalAlpha = 1;
    if (this.path?.length > 1) {
      context.beginPath();
      this.path.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
      context.closePath();
      [context.strokeStyle, context.fillStyle, context.lineWidth] = [accent, accent, 2];
      context.stroke();
      context.globalAlpha = 0.12;
      context.fill();
      context.globalAlpha = 1;
    }
    this.placeThumbs();
  }
  /** Small pictures on the map where it has room for them: one in each square of the screen. */
  placeThumbs() {
    const chosen = new Map(), cell = 54, ids = this.visible(3001);
    if (ids.length <= 3000 && this.pointers.size < 2) {
      for (const id of ids) {
        const [x, y] = this.toScreen(id), key = `${Math.floor(x / cell)} ${Math.floor(y / cell)}`;
        const far = Math.abs((x % cell) - cell / 2) + Math.abs((y % cell) - cell / 2) - (this.shownThumbs.has(id) ? 20 : 0);
        if (!chosen.has(key) || far < chosen.get(key).far) chosen.set(key, { id, x, y, far });
      }
    }
    const keep = new Set();
    for (const { id, x, y } of [...chosen.values()].slice(0, MAX_THUMBS)) {
      keep.add(id);
      let image = this.shownThumbs.get(id);
      if (!image) {
        image = this.tell.thumb(id);
        this.thumbs.append(image);
        this.shownThumbs.set(id, image);
      }
      image.style.transform = `translate(${x - 22}px, ${y - 22}px)`;
    }
    for (const [id, image] of this.shownThumbs) {
      if (!keep.has(id)) { remove(image); this.shownThumbs.delete(id); }
    }
  }

  setLasso(on) { this.drawing = on; this.overlay.classList.toggle("lasso", on); }
  listen() {
    const on = (name, act) => this.overlay.addEventListener(name, act, { passive: false });
    on("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)), event.offsetX, event.offsetY);
    });
    // A finger that leaves fast starts a scroll of the browser, also where nothing scrolls: it would take the next tap.
    on("touchmove", (event) => event.preventDefault());
    on("pointerdown", (event) => {
      if (event.button) return;
      this.overlay.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
      this.moved = this.pointers.size > 1;
      this.path = this.pointers.size === 1 && (this.drawing || event.shiftKey) ? [[event.offsetX, event.offsetY]] : null;
      this.tell.hover(-1);
    });
    on("pointermove", (event) => this.move(event));
    on("pointerup", (event) => this.lift(event));
    on("pointercancel", (event) => { this.pointers.delete(event.pointerId); this.path = null; this.redraw(); });
    on("pointerleave", () => this.tell.hover(-1));
    on("keydown", (event) => {
      const step = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] }[event.key];
      if (step) this.pan(...step);
      else if (event.key === "+" || event.key === "=") this.zoom(1.3);
      else if (event.key === "-") this.zoom(1 / 1.3);
      else if (event.key === "Enter") this.tell.pick(this.at(this.width / 2, this.height / 2, 60));
      else return;
      event.preventDefault();
    });
  }
  move(event) {
    const before = this.pointers.get(event.pointerId), now = [event.offsetX, event.offsetY];
    if (!before) {
      if (event.pointerType === "mouse") this.tell.hover(this.at(...now), ...now);
      return;
    }
    if (this.path) {
      this.path.push(now);
      this.redraw();
    } else if (this.pointers.size === 1) {
      if (!this.moved && Math.hypot(now[0] - before[0], now[1] - before[1]) < (STILL[event.pointerType] ?? 4)) return;
      this.pan(now[0] - before[0], now[1] - before[1]);
    } else {
      const other = [...this.pointers].find(([id]) => id !== event.pointerId)[1];
      const length = (a, b) => Math.max(10, Math.hypot(a[0] - b[0], a[1] - b[1]));
      this.zoom(length(now, other) / length(before, other), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    }
    this.moved = true;
    this.pointers.set(event.pointerId, now);
  }
  lift(event) {
    if (!this.pointers.delete(event.pointerId)) return;
    const path = this.path;
    this.path = null;
    if (path?.length > 2) this.tell.lasso(this.within(path));
    else if (!this.moved && !this.pointers.size) this.tell.pick(this.at(event.offsetX, event.offsetY, 18));
    this.redraw();
  }
}
