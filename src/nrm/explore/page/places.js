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
    const chosen = isSelected(state, heatmap.layer, opened.axis, k);
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

// Places of nodes by springs along edges and repulsion between all, always the same.
function laidOut(count, edges) {
  const at = Array.from({ length: count }, (_, k) => [Math.cos((2 * Math.PI * k) / count), Math.sin((2 * Math.PI * k) / count)]);
  for (let round = 0; round < 400; round += 1) {
    const push = at.map(() => [0, 0]);
    const rate = 0.05 * (1 - round / 400);
    for (let a = 0; a < count; a += 1) {
      for (let b = 0; b < a; b += 1) {
        const [dx, dy] = [at[a][0] - at[b][0], at[a][1] - at[b][1]];
        const size = 0.12 / (dx * dx + dy * dy + 0.001);
        push[a][0] += size * dx; push[a][1] += size * dy; push[b][0] -= size * dx; push[b][1] -= size * dy;
      }
    }
    for (const [a, b] of edges) {
      const [dx, dy] = [at[a][0] - at[b][0], at[a][1] - at[b][1]];
      const size = 1.5 * (Math.hypot(dx, dy) - 0.35);
      push[a][0] -= size * dx; push[a][1] -= size * dy; push[b][0] += size * dx; push[b][1] += size * dy;
    }
    at.forEach((place, k) => { place[0] += rate * push[k][0]; place[1] += rate * push[k][1]; });
  }
  const [low, high] = [0, 1].map((axis) => at.map((place) => place[axis])).reduce(([l, h], line) => [[...l, Math.min(...line)], [...h, Math.max(...line)]], [[], []]);
  const size = Math.max(high[0] - low[0], high[1] - low[1], 1e-6);
  return at.map(([x, y]) => [(100 * (x - low[0])) / size, (100 * (y - low[1])) / size]);
}
