// The data blocks of the page, and how numbers and texts of them are shown.
"use strict";

const parsed = new Map();

// A block is parsed when it is first needed: the details of the rollouts are most of the page.
function block(name) {
  if (!parsed.has(name)) parsed.set(name, JSON.parse(document.getElementById(`${name}-data`).textContent));
  return parsed.get(name);
}

const byId = (id) => document.getElementById(id);

// A new element. Text is set as text: nothing that a model wrote is ever parsed as HTML.
function element(tag, { text, parent, ...properties } = {}, ...children) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  if (parent) parent.append(made);
  return made;
}

// A number with four significant digits, and "-" for none.
function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "-";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Number.isInteger(value) && Math.abs(value) < 1e9) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

const percent = (value) => (value === null || value === undefined ? "-" : `${(100 * value).toFixed(1)}%`);

// The numbers of a response: {number} of a constant, or float16 or float32 in base64. deploy/report/token_numbers.py
// packs them.
function unpack(packed, length) {
  if (packed === undefined) return null;
  if (typeof packed === "number") return new Float32Array(length).fill(packed);
  const bytes = Uint8Array.from(atob(packed), (char) => char.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const isHalf = bytes.length === 2 * length;
  const at = (i) => (isHalf ? fromHalf(view.getUint16(2 * i, true)) : view.getFloat32(4 * i, true));
  return Float32Array.from({ length }, (_, i) => at(i));
}

function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction / 1024) : sign * 2 ** -24 * fraction;
}

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
