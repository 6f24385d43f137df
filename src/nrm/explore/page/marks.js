// Small helpers: elements, numbers, colours, and the paper's notation. Texts from elsewhere become
// text nodes, never markup.

const POSITIVE = "#e66101";
const NEGATIVE = "#2166ac";
export const FONT = "ui-sans-serif, system-ui, 'Helvetica Neue', Arial, sans-serif";
const PEN = document.createElement("canvas").getContext("2d");
const SVG_SPACE = "http://www.w3.org/2000/svg";
const PLUS = [230, 97, 1];
const MINUS = [33, 102, 172];

// An element with attributes, listeners (functions) and children (texts or elements).
export function make(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

// The same of SVG.
export function draw(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG_SPACE, name), attributes, children);
}

function filled(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined) continue;
    if (key.startsWith("aria-")) element.setAttribute(key, String(value)); // false is said too
    else if (value === false) continue;
    else if (typeof value === "function") element.addEventListener(key, value);
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) element.append(child);
  }
  return element;
}

const PRECISE = d3.format(",.4f");
const SCIENTIFIC = d3.format(".2e");

// A relevance with its sign, to four digits behind the point; small ones by their exponent.
export function relevance(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size < 0.00005 ? SCIENTIFIC(size) : PRECISE(size);
  return (value < 0 ? "−" : "") + text;
}

// A number of the model's, as a logit.
export function amount(value) {
  return (value < 0 ? "−" : "") + d3.format(",.4r")(Math.abs(value)).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
}

export function signColour(value) {
  return value < 0 ? NEGATIVE : POSITIVE;
}

// Red, green and blue of a value: white for zero, the whole colour from the limit on.
export function shade(value, limit) {
  const part = Math.min(1, Math.abs(value) / limit);
  const end = value > 0 ? PLUS : MINUS;
  return end.map((channel) => Math.round(255 + part * (channel - 255)));
}

// "R(S_{relu2:3}, 3)" with what is below the line below it.
export function notation(text) {
  const pieces = text.split(/_\{([^}]*)\}/);
  return make("span", { class: "notation" },
    ...pieces.map((piece, k) => (k % 2 ? make("sub", {}, piece) : piece)).filter((piece) => piece !== ""));
}

// The name of a layer, or its last parts: networks begin all of theirs alike.
export function shortened(text, most) {
  if (text.length <= most) return text;
  const parts = text.split(".");
  while (parts.length > 1 && parts.join(".").length >= most) parts.shift();
  return `…${parts.join(".").slice(-most + 1)}`;
}

// As much of a text as has room in so many pixels.
export function fitted(text, width, size, weight = 400) {
  PEN.font = `${weight} ${size}px ${FONT}`;
  const long = (part) => PEN.measureText(part).width > width;
  if (!long(text)) return text;
  let most = text.length - 1;
  while (most > 1 && long(`${text.slice(0, most)}…`)) most -= 1;
  return `${text.slice(0, most)}…`;
}

// Bytes and floats of base64.
export function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

export function floats(text) {
  return text instanceof Float32Array ? text : new Float32Array(bytes(text).buffer);
}
