// The layers that are shown, how each is divided, and how many parts of each.

import { make } from "./marks.js";
import { withColumn } from "./state.js";

const MOST = 512; // parts of a column

// The menu.
//   isOpen: whether it is unfolded.
//   choose(state); unfolded(whether), when somebody opens or closes it
export function offerColumns(opened, state, isOpen, choose, unfolded) {
  const count = make("input", { type: "number", min: 1, max: MOST, value: state.top, "aria-label": "channels of a column", change: (event) => {
    const top = Math.min(MOST, Math.max(1, Math.round(Number(event.target.value)) || 12));
    choose({ ...state, top });
  } });
  const order = opened.columns.map((column) => column.layer);
  const chosen = new Map(state.columns.map((one) => [one.layer ?? one, one]));
  const set = (layer, asked) => choose(withColumn(state, order, layer, asked));
  const row = (column) => make("div", { class: "row" }, make("label", {}, make("input", {
    type: "checkbox", value: column.layer, checked: chosen.has(column.layer),
    change: (event) => set(column.layer, event.target.checked ? column.layer : null),
  }), ` ${column.layer} `, make("span", { class: "muted" }, column.ways.length > 1 ? column.kind : `${column.kind}, ${column.size} ${column.ways[0].by}`)),
  ...divisions(column, chosen.get(column.layer), set));
  const single = opened.columns.filter((column) => column.group);
  const rows = opened.columns.filter((column) => !column.group).flatMap((column) => {
    const within = single.filter((one) => one.group === column.layer);
    const shown = within.some((one) => chosen.has(one.layer));
    return [row(column), ...(within.length ? [make("details", { class: "states", open: shown }, make("summary", { class: "muted" }, "single states"), ...within.map(row))] : [])];
  });
  const held = make("details", { class: "chooser", open: isOpen }, make("summary", { class: "plain button" }, "Columns"),
    make("div", { class: "menu" }, make("label", {}, "most relevant ", count), ...rows));
  held.addEventListener("toggle", (event) => { if (event.target === held) unfolded(held.open); });
  return held;
}

// Where a layer can be divided in several ways, which; of clusters, how many.
function divisions(column, asked, set) {
  if (column.ways.length < 2) return [];
  const way = column.ways.find((one) => one.by === asked?.by) ?? column.ways[0];
  const select = make("select", { "aria-label": `${column.layer} is divided into`, change: (event) => set(column.layer, { layer: column.layer, by: event.target.value }) },
    ...column.ways.map((one) => make("option", { value: one.by, selected: one === way }, one.by === "clusters" ? "clusters" : `${one.size} ${one.by}`)));
  if (way.by !== "clusters") return [select];
  const count = make("input", { type: "number", min: 1, max: 64, value: asked?.of ?? way.size, "aria-label": `clusters of ${column.layer}`, change: (event) => {
    const of = Math.min(64, Math.max(1, Math.round(Number(event.target.value)) || way.size));
    set(column.layer, { layer: column.layer, by: "clusters", of });
  } });
  return [count, select];
}
