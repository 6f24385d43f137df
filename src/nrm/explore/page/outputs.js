// Which output is explained: by its name, and where outputs lie at several places, at one of these.

import { make } from "./marks.js";

const OPTIONS = 1000; // more outputs than these are searched by name
const MATCHES = 50;
let fields = 0;

// A class at the place that is explained, as the server names outputs.
export function outputOf(explained, index) {
  const { place, after } = explained;
  return place.length ? [...place.slice(0, after), index, ...place.slice(after)] : index;
}

// The fields.
//   choose(target, against)
export function offerOutputs(explained, opened, input, choose) {
  const { target, against } = explained;
  const all = explained.count <= OPTIONS && (opened.labels || explained.count <= explained.outputs.length);
  const named = all && opened.labels ? opened.labels.slice(0, explained.count).map((label, k) => [k, label])
    : explained.outputs.map(([k, label]) => [k, label]).sort((a, b) => a[0] - b[0]);
  const of = (k) => outputOf(explained, k);
  const rather = (k) => choose(of(target), k === null ? null : of(k));
  const why = select("explained output", named, target, (k) => choose(of(k), null));
  const other = select("rather than", [["", "—"], ...named.filter(([k]) => k !== target)], against ?? "", rather);
  const search = (what, pick) => (all ? [] : [searched(what, explained, opened, pick)]);
  const several = explained.count > 1;
  return make("div", { class: "why", hidden: !several && !explained.places.length },
    ...(several ? [make("label", {}, "Why ", why), ...search("another output by name or number", (k) => choose(of(k), null))] : []),
    ...(several ? [make("label", {}, " rather than ", other), ...search("rather than, by name or number", rather)] : []),
    ...placeFields(explained, input, (place) => choose(outputOf({ ...explained, place }, null), null)));
}

function select(label, options, chosen, pick) {
  return make("select", { "aria-label": label, change: (event) => pick(event.target.value === "" ? null : Number(event.target.value)) },
    ...options.map(([k, name]) => make("option", { value: k, selected: k === chosen }, name)));
}

// A field in which an output is found by a part of its name, or by its number.
function searched(label, explained, opened, pick) {
  fields += 1;
  const list = make("datalist", { id: `outputs-${fields}` });
  const names = opened.labels ?? [];
  const field = make("input", {
    type: "text", class: "search", list: list.id, placeholder: "search …", "aria-label": label,
    input: () => {
      const text = field.value.toLowerCase();
      const found = [];
      for (let k = 0; k < names.length && found.length < MATCHES; k += 1) if (names[k].toLowerCase().includes(text)) found.push(k);
      list.replaceChildren(...found.map((k) => make("option", { value: `${names[k]} · ${k}` })));
    },
    change: () => {
      const number = /(?:^|· )(\d+)$/.exec(field.value);
      const found = number ? Number(number[1]) : names.indexOf(field.value);
      const wrong = !(found >= 0 && found < explained.count);
      field.setCustomValidity(wrong ? "no output is called so" : "");
      if (wrong) field.reportValidity();
      else pick(found);
    },
  });
  return make("span", {}, field, list);
}

// Where outputs lie at several places: tokens, nodes, pixels. Another place is of its largest output.
function placeFields(explained, input, pick) {
  const { place, places } = explained;
  const moved = (axis, at) => pick(place.map((old, k) => (k === axis ? at : old)));
  const names = input.words ?? input.marks;
  return places.map((size, axis) => {
    const label = places.length === 1 ? "explained place" : `explained place, axis ${axis}`;
    const told = places.length === 1 ? " at " : axis ? ", " : " at ";
    if (places.length === 1 && size <= OPTIONS) {
      const options = Array.from({ length: size }, (_, k) => [k, names?.length === size ? `${names[k]} ${k}` : String(k)]);
      return make("label", {}, told, select(label, options, place[axis], (at) => moved(axis, at)));
    }
    return make("label", {}, told, make("input", {
      type: "number", min: 0, max: size - 1, value: place[axis], "aria-label": label,
      change: (event) => moved(axis, Math.min(size - 1, Math.max(0, Math.round(Number(event.target.value)) || 0))),
    }));
  });
}
