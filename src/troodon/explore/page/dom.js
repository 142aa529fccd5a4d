// Elements and requests. Text from data only ever becomes text: nothing here parses HTML.

export const $ = (id) => document.getElementById(id);

/** An element with attributes, listeners (as onclick) and children: elements, or text. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function say(text) {
  $("status").textContent = text;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { $("status").textContent = ""; }, 6000);
}

async function checked(response) {
  if (response.ok) return response;
  let reason = response.statusText;
  try { reason = (await response.json()).error; } catch { /* no words */ }
  throw new Error(reason);
}

async function request(path, options) {
  try {
    return await checked(await fetch(path, options));
  } catch (error) {
    throw error instanceof TypeError ? new Error("the explorer does not answer; is it still running?") : error;
  }
}

export const get = async (path) => (await request(path)).json();
export const getBytes = async (path) => (await request(path)).arrayBuffer();
export const post = async (path, value) => (await request(path, {
  method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(value),
})).json();
export const send = async (path, file) => (await request(path, {
  method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: file,
})).json();

export const thumbnail = (id, size = "small") => `api/thumbnail?id=${id}&size=${size}&missing=drawn`;
export const count = (number) => number.toLocaleString("en");
export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;
export const fileName = (path) => path.slice(path.lastIndexOf("/") + 1);

/** Take an element away. Its pictures that have not come are no longer asked for: those in view would wait for them. */
export function remove(element) {
  for (const image of [element, ...element.querySelectorAll("img")]) if (image.complete === false) image.removeAttribute("src");
  element.remove();
}

/** Put other children into an element. Pictures of the earlier ones are given up; `next` has the focus if one had it. */
export function fill(element, children, next = element) {
  const had = element.contains(document.activeElement);
  for (const child of [...element.children]) remove(child);
  element.replaceChildren(...children);
  if (had && !element.contains(document.activeElement)) next.focus();
}

export const picture = (id, size = "small", alt = "") => h("img", { src: thumbnail(id, size), alt, draggable: "false", decoding: "async" });
