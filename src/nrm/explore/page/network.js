// The columns of the network with their most relevant channels, and the flows between them.

import { FONT, draw, fitted, relevance, shortened, signColour } from "./marks.js";
import { isSelected } from "./state.js";

const ROOMY = { row: 25, bar: 17, font: 12 };
const DENSE = { row: 14, bar: 9, font: 10 }; // of many
const MANY = 64;
const AT_ONCE = 32; // rows
const LINKS = 48; // between two columns, as the server sends at most
const TOP = 58;
const OUT = 176; // for the outputs
const NARROWEST = 180;
const DIGIT = 7.2;
const LEFT = 34; // of numbers, and where the names of columns begin
const SEVERAL = "a walk may visit several of them, so that they have no sum; each is the relevance of the walks that visit it";
const INK = "#1d1d1f";
const MUTED = "#6a6a70";

// Draw an answer: {svg, add, more}. The first rows are there at once; `more()` draws the next ones, and
// says whether there are others, so that a page with many can do something else in between.
// `add(flows)` draws the flows of one more pair of columns, over columns that are drawn once, however
// many parts an answer comes in.
//   seen: {explained, columns, flows}, the parts that are there so far.
//   on: {node(column, node), flow(lower, upper, link), output(k), point(number or null)}.
export function drawNetwork(seen, state, width, on) {
  const columns = seen.columns?.columns ?? [];
  const outputs = seen.explained.outputs;
  const rows = Math.max(outputs.length, ...columns.map((column) => column.nodes.length + (column.others ? 1 : 0)), 4);
  const size = rows > MANY ? DENSE : ROOMY;
  const height = TOP + rows * size.row + 14;
  const step = Math.max(NARROWEST, (width - OUT) / Math.max(columns.length, 1));
  const full = columns.length * step + OUT;
  const svg = draw("svg", {
    width: full, height, viewBox: `0 0 ${full} ${height}`, class: "network", role: "group",
    "aria-label": "Columns of the network, from the input to the output", "font-family": FONT, "font-size": 12, fill: INK,
  });
  const flows = draw("g", { class: "flows" });
  svg.append(flows);
  const digits = Math.max(...columns.flatMap((column) => [`+${column.others}`, ...column.nodes.map((node) => String(node.index))]).map((text) => text.length), 1);
  const label = columns.some((column) => column.marks?.length) ? 72 : Math.max(LEFT, 10 + DIGIT * digits);
  const block = Math.min(step * 0.56, 116) + (label - LEFT);
  const scale = { ...size, ...barScale(columns, block, label) };
  const places = columns.map((column, c) => column.nodes.map((node, k) => ({
    node, x: c * step, y: TOP + (k + 0.5) * size.row, end: c * step + scale.zero + Math.max(0, node.value) * scale.unit + 5,
  })));
  const shown = columns.map((column, c) => drawColumn(svg, column, places[c].length, c * step, block, scale, on));
  let row = 0;
  const more = () => {
    columns.forEach((column, c) => shown[c].append(...places[c].slice(row, row + AT_ONCE).map((place) => drawNode(column, place, block, scale, state, on))));
    row += AT_ONCE;
    return row < rows;
  };
  more();
  const out = { x: columns.length * step + 14, y: TOP + ROOMY.row / 2 };
  drawOutputs(svg, seen.explained, out, outputs, on);
  const add = (found) => {
    const c = columns.findIndex((column, k) => column.layer === found.lower && columns[k + 1]?.layer === found.upper);
    if (c >= 0) drawFlows(flows, found, columns[c], columns[c + 1], places[c], places[c + 1], scale, on);
  };
  seen.flows.forEach(add);
  if (columns.length) drawLast(flows, columns.at(-1), places.at(-1), out);
  return { svg, add, more };
}

// Where zero lies in a column of bars, and how long a relevance is: one scale for all columns.
function barScale(columns, block, label) {
  const values = columns.flatMap((column) => [...column.nodes.map((node) => node.value), column.rest]);
  const up = Math.max(0, ...values);
  const down = Math.max(0, ...values.map((value) => -value));
  const unit = up + down > 0 ? (block - label - 4) / (up + down) : 0;
  return { zero: label + 2 + down * unit, unit, label };
}

// All of a column but its nodes; the group that these belong to.
function drawColumn(svg, column, count, x, block, scale, on) {
  const head = draw("g", { class: "head", transform: `translate(${x},0)` },
    draw("text", { x: LEFT, y: 18, "font-weight": 600, "font-size": column.layer.length > 18 ? 11 : 12 }, shortened(column.layer, 24)),
    draw("text", { x: LEFT, y: 35, fill: MUTED, "font-size": 11, class: "total", "data-layer": column.layer, "data-value": column.total },
      column.total === null ? `${column.size} ${column.by} · walks visit several` : `${column.size} ${column.by} · total ${relevance(column.total)}`));
  head.append(draw("title", {}, column.total === null ? `${column.layer}: ${SEVERAL}` : column.layer));
  if (column.total !== null) pointed(head, { value: column.total, notation: column.notation, python: column.python }, on);
  svg.append(head);
  svg.append(draw("line", { x1: x + scale.zero, x2: x + scale.zero, y1: TOP, y2: TOP + (count + (column.others ? 1 : 0)) * scale.row, stroke: "#c9c9ce" }));
  const nodes = draw("g");
  svg.append(nodes);
  if (column.others) {
    const y = TOP + (count + 0.5) * scale.row;
    const rest = draw("g", { class: "rest", transform: `translate(${x},${y})` },
      draw("text", { x: scale.label - 6, y: scale.font / 3, "text-anchor": "end", fill: MUTED, "font-size": Math.min(11, scale.font) }, `+${column.others}`),
      ...(column.total === null ? [] : [draw("rect", { ...barAt(column.rest, scale), "fill-opacity": 0.26 })]));
    rest.append(draw("title", {}, column.total === null ? `${column.others} more; ${SEVERAL}` : `the other ${column.others} together: ${relevance(column.rest)}`));
    svg.append(rest);
  }
  return nodes;
}

function drawNode(column, place, block, scale, state, on) {
  const { node } = place;
  const chosen = isSelected(state, column, node.index);
  const mark = column.marks?.length ? fitted(column.marks[node.index], scale.label - 10 - 8 * String(node.index).length, scale.font) : null;
  const label = mark === null ? String(node.index) : `${mark} ${node.index}`;
  const group = draw("g", {
    class: chosen ? "node chosen" : "node", transform: `translate(${place.x},${place.y})`, tabindex: 0, role: "button", "aria-pressed": chosen,
    "aria-label": `${column.layer}, ${column.by.replace(/s$/, "")} ${label}, relevance ${relevance(node.value)}`,
    "data-layer": column.layer, "data-index": node.index, "data-value": node.value,
    click: (event) => on.node(column, node, event), keydown: (event) => pressed(event, () => on.node(column, node, event)),
  },
  draw("rect", { x: 0, y: -scale.row / 2 + 1, width: block, height: scale.row - 2, rx: 4, fill: chosen ? "#fdf0e4" : "transparent", stroke: chosen ? "#1d1d1f" : "none", class: "ground" }),
  draw("text", { x: scale.label - 6, y: scale.font / 3, "font-size": scale.font, "text-anchor": "end", "font-weight": chosen ? 700 : 400, fill: node.value === 0 ? MUTED : INK }, label),
  draw("rect", barAt(node.value, scale)));
  pointed(group, nodeNumber(column, node), on);
  return group;
}

function nodeNumber(column, node) {
  return {
    value: node.value,
    notation: named(column.notation, column, node.index),
    python: column.each.replace("#", () => node.python),
    where: column.where ? { layer: column.layer, numbers: column.where, shape: column.positions, chosen: node.index } : null,
  };
}

// The notation of a column with the number of one part in it.
export function named(text, column, index) {
  return text.replace(`S_{${column.layer}}`, () => `S_{${column.layer}:${column.word}${index}}`);
}

function barAt(value, scale) {
  const length = Math.max(Math.abs(value) * scale.unit, value === 0 ? 0 : 0.75);
  return { x: value < 0 ? scale.zero - length : scale.zero, y: -scale.bar / 2, width: length, height: scale.bar, rx: 1.5, fill: signColour(value) };
}

function drawOutputs(svg, explained, out, outputs, on) {
  svg.append(draw("text", { x: out.x + 8, y: 18, "font-weight": 600 }, explained.place.length ? `output at ${explained.place.join(", ")}` : "output"));
  svg.append(draw("text", { x: out.x + 8, y: 35, fill: MUTED, "font-size": 11 }, explained.what === "output" ? "values" : explained.what));
  outputs.forEach(([index, label, value], k) => {
    const y = TOP + (k + 0.5) * ROOMY.row;
    const chosen = index === explained.target;
    const other = index === explained.against;
    const amount = value.toFixed(2).replace("-", "−");
    const text = fitted(label, OUT - 38 - 7 * amount.length, 12, chosen ? 600 : 400);
    const group = draw("g", {
      class: "output", transform: `translate(${out.x},${y})`, tabindex: 0, role: "button", "aria-pressed": chosen,
      "aria-label": `explain ${label}, ${amount}`, "data-output": index,
      click: (event) => on.output(index, event), keydown: (event) => pressed(event, () => on.output(index, event)),
    },
    draw("rect", { x: 2, y: -ROOMY.row / 2 + 1, width: OUT - 20, height: ROOMY.row - 2, rx: 4, fill: chosen ? "#1d1d1f" : "transparent", stroke: other ? "#1d1d1f" : "none", "stroke-dasharray": "3 2", class: "ground" }),
    draw("text", { x: 8, y: 4, fill: chosen ? "#fff" : INK, "font-weight": chosen ? 600 : 400 }, text),
    draw("text", { x: OUT - 24, y: 4, "text-anchor": "end", fill: chosen ? "#fff" : MUTED, "font-size": 11 }, amount),
    draw("title", {}, label));
    if (chosen) out.y = y;
    svg.append(group);
  });
}

// Flows of two columns: as wide as they are relevant, side by side at both ends.
function drawFlows(svg, found, lower, upper, from, to, scale, on) {
  const start = new Map(from.map((place) => [place.node.index, place]));
  const end = new Map(to.map((place) => [place.node.index, place]));
  const links = found.links.filter(([i, j]) => start.has(i) && end.has(j));
  const sums = (which) => links.reduce((held, link) => held.set(link[which], (held.get(link[which]) ?? 0) + Math.abs(link[2])), new Map());
  const [below, above] = [sums(0), sums(1)];
  const largest = Math.max(1e-30, ...below.values(), ...above.values());
  const unit = (scale.row - 4) / largest;
  const offset = (held, which, other, places) => {
    const at = new Map([...held].map(([k, sum]) => [k, -sum * unit / 2]));
    const order = [...links].sort((a, b) => places.get(a[other]).y - places.get(b[other]).y);
    return new Map(order.map((link) => {
      const size = Math.abs(link[2]) * unit;
      const y = at.get(link[which]);
      at.set(link[which], y + size);
      return [link, y + size / 2];
    }));
  };
  const left = offset(below, 0, 1, end);
  const right = offset(above, 1, 0, start);
  const path = d3.linkHorizontal();
  const most = Math.max(1e-30, ...links.map((link) => Math.abs(link[2])));
  for (const link of [...links].reverse()) {
    const [i, j, value] = link;
    const [a, b] = [start.get(i), end.get(j)];
    const line = path({ source: [a.end, a.y + left.get(link)], target: [b.x + 2, b.y + right.get(link)] });
    const number = {
      value,
      notation: named(named(found.notation, lower, i), upper, j),
      python: found.python.replace("#", () => a.node.python).replace("#", () => b.node.python),
    };
    const group = draw("g", {
      class: "flow", tabindex: 0, role: "button", "aria-label": `flow from ${found.lower} ${i} to ${found.upper} ${j}, relevance ${relevance(value)}`,
      "data-lower": found.lower, "data-from": i, "data-upper": found.upper, "data-to": j, "data-value": value,
      click: (event) => on.flow(lower, upper, link, event), keydown: (event) => pressed(event, () => on.flow(lower, upper, link, event)),
    },
    draw("path", { d: line, fill: "none", stroke: signColour(value), "stroke-width": Math.max(0.6, Math.abs(value) * unit), "stroke-opacity": 0.22 + 0.4 * Math.abs(value) / most, class: "ribbon" }),
    draw("path", { d: line, fill: "none", stroke: "transparent", "stroke-width": Math.max(7, Math.abs(value) * unit), class: "touch" }));
    pointed(group, number, on);
    svg.append(group);
  }
}

// From the last column all walks go to the explained output; those of its most relevant nodes.
function drawLast(svg, column, places, out) {
  const sum = Math.max(1e-30, ...column.nodes.map((node) => Math.abs(node.value)));
  const path = d3.linkHorizontal();
  const largest = [...places].sort((a, b) => Math.abs(b.node.value) - Math.abs(a.node.value));
  for (const { node, end, y } of largest.slice(0, LINKS)) {
    if (node.value === 0) continue;
    svg.append(draw("path", {
      d: path({ source: [end, y], target: [out.x, out.y] }), fill: "none", stroke: signColour(node.value),
      "stroke-width": Math.max(0.5, 7 * Math.abs(node.value) / sum), "stroke-opacity": 0.16, "pointer-events": "none",
    }));
  }
}

function pointed(element, number, on) {
  element.addEventListener("pointerenter", () => on.point(number));
  element.addEventListener("focus", () => on.point(number));
  element.addEventListener("pointerleave", () => on.point(null));
}

function pressed(event, act) {
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    act();
  } else if (["ArrowDown", "ArrowUp", "ArrowLeft", "ArrowRight"].includes(event.key)) {
    event.preventDefault();
    nextTo(event.currentTarget, event.key)?.focus();
  }
}

// The node that lies next to another in a direction.
function nextTo(element, key) {
  const here = element.getBoundingClientRect();
  const sideways = key === "ArrowLeft" || key === "ArrowRight";
  const sign = key === "ArrowRight" || key === "ArrowDown" ? 1 : -1;
  const near = [...element.ownerSVGElement.querySelectorAll(".node, .output")].map((other) => {
    const there = other.getBoundingClientRect();
    const along = sign * (sideways ? there.left - here.left : there.top - here.top);
    const aside = Math.abs(sideways ? there.top - here.top : there.left - here.left);
    return { other, cost: along > 2 && (sideways || aside < 20) ? along + 3 * aside : Infinity };
  });
  const best = near.reduce((a, b) => (b.cost < a.cost ? b : a), { cost: Infinity });
  return best.cost === Infinity ? null : best.other;
}
