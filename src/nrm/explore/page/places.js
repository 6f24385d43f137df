// Inputs that are no pictures: words, steps of a series, nodes of a graph, each of which is clicked.

import { make, draw, floats, relevance, shade } from "./marks.js";
import { isSelected } from "./state.js";

export function drawPlaces(opened, input, heatmap, state, click, point) {
  const values = floats(heatmap.values);
  const limit = Math.max(1e-30, ...values.map(Math.abs));
  const number = (k) => ({
    value: values[k],
    notation: heatmap.notation.replace(`i_{${heatmap.layer}}`, `S_{${heatmap.layer}:${k}}`),
    python: heatmap.each.replace("#", String(k)),
  });
  const label = (k) => input.words?.[k] ?? input.marks?.[k] ?? String(k);
  const dressed = (element, k) => {
    const chosen = isSelected(state, { layer: heatmap.layer, axis: opened.axis }, k);
    element.classList.toggle("chosen", chosen);
    element.setAttribute("aria-pressed", String(chosen));
    element.setAttribute("aria-label", `${label(k)}, relevance ${relevance(values[k])}`);
    element.dataset.place = k;
    element.dataset.value = values[k];
    element.addEventListener("click", () => click(k));
    element.addEventListener("pointerenter", () => point(number(k)));
    element.addEventListener("focus", () => point(number(k)));
    element.addEventListener("pointerleave", () => point(null));
    return element;
  };
  const colour = (k) => shade(values[k], limit);
  const dark = (rgb) => rgb[0] + rgb[1] + rgb[2] < 330;
  if (opened.kind === "graph") return drawGraph(input, values, colour, dark, label, dressed, click);
  const cells = Array.from(values, (_, k) => {
    const rgb = colour(k);
    const cell = dressed(make("button", { type: "button", class: "place" }, label(k)), k);
    cell.style.background = `rgb(${rgb.join(",")})`;
    cell.style.color = dark(rgb) ? "#fff" : "#1d1d1f";
    return cell;
  });
  return make("div", { class: opened.kind === "series" ? "places series" : "places words" }, cells);
}

function drawGraph(input, values, colour, dark, label, dressed, click) {
  const places = laidOut(values.length, input.edges ?? []);
  const svg = draw("svg", { viewBox: "-10 -10 120 120", class: "nodes", role: "group", "aria-label": "Graph" });
  for (const [a, b] of input.edges ?? []) svg.append(draw("line", { x1: places[a][0], y1: places[a][1], x2: places[b][0], y2: places[b][1], stroke: "#9a9aa0", "stroke-width": 0.8 }));
  places.forEach(([x, y], k) => {
    const rgb = colour(k);
    const node = dressed(draw("g", { class: "place", tabindex: 0, role: "button", transform: `translate(${x},${y})`, keydown: (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        click(k);
      }
    } },
    draw("circle", { r: 4.4, fill: `rgb(${rgb.join(",")})`, stroke: "#1d1d1f", "stroke-width": 0.5 }),
    draw("text", { y: 1.5, "text-anchor": "middle", "font-size": 4.2, fill: dark(rgb) ? "#fff" : "#1d1d1f" }, label(k))), k);
    svg.append(node);
  });
  return svg;
}

// Places of nodes so that distances on the paper are those in the graph, as well as can be: stress
// majorisation, from a circle, so that it is the same every time.
function laidOut(count, edges) {
  const far = distances(count, edges);
  let at = Array.from({ length: count }, (_, k) => [Math.cos(2.4 * k), Math.sin(2.4 * k)].map((part) => part * (1 + k / count)));
  for (let round = 0; round < 300; round += 1) {
    at = at.map((own, k) => {
      let [x, y, sum] = [0, 0, 0];
      at.forEach((other, j) => {
        if (j === k) return;
        const [dx, dy] = [own[0] - other[0], own[1] - other[1]];
        const stretch = far[k][j] / (Math.hypot(dx, dy) || 1e-9);
        const weight = 1 / far[k][j] ** 2;
        x += weight * (other[0] + stretch * dx);
        y += weight * (other[1] + stretch * dy);
        sum += weight;
      });
      return sum ? [x / sum, y / sum] : own;
    });
  }
  const ends = [0, 1].map((axis) => [Math.min(...at.map((place) => place[axis])), Math.max(...at.map((place) => place[axis]))]);
  const size = Math.max(...ends.map(([low, high]) => high - low), 1e-6);
  return at.map((place) => place.map((part, axis) => (100 * (part - ends[axis][0])) / size));
}

// How many edges lie between any two nodes; one more than any of these, where there is no way.
function distances(count, edges) {
  const next = Array.from({ length: count }, () => []);
  for (const [a, b] of edges) {
    next[a].push(b);
    next[b].push(a);
  }
  const found = next.map((_, from) => {
    const steps = new Array(count).fill(Infinity);
    steps[from] = 0;
    const waiting = [from];
    while (waiting.length) {
      const node = waiting.shift();
      for (const other of next[node]) {
        if (steps[other] < Infinity) continue;
        steps[other] = steps[node] + 1;
        waiting.push(other);
      }
    }
    return steps;
  });
  const most = 1 + Math.max(...found.flat().filter((steps) => steps < Infinity));
  return found.map((steps) => steps.map((one) => Math.min(one, most)));
}
