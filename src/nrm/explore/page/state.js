// What a person has chosen: input, target, columns, selection. It lies in the address behind the #,
// so that a link restores the view, and the browser's way back is undo.

const FIRST = { input: 0, target: null, against: null, columns: [], op: "and", sets: [], mode: "joint", top: 12 };

export function firstState(opened) {
  return { ...FIRST, columns: [...opened.first], top: opened.top ?? FIRST.top };
}

// One part of a column, as a set that is selected. Channels and places are told by their axis alone.
export function setOf(column, index) {
  const by = ["channels", "places"].includes(column.by ?? "channels") ? null : column.by;
  return { layer: column.layer, axis: column.axis ?? null, by, of: by ? column.of ?? null : null, channels: [index], not: false };
}

// Whether a set is of a column, divided as it is now.
function isOf(set, column) {
  const part = setOf(column, 0);
  return !set.patch && ["layer", "axis", "by", "of"].every((key) => (set[key] ?? null) === part[key]);
}

// The set with one more part of a column, or without it: one set for each layer and division.
export function toggled(state, column, index) {
  const at = state.sets.findIndex((set) => isOf(set, column));
  const sets = [...state.sets];
  if (at < 0) {
    sets.push(setOf(column, index));
  } else {
    const had = sets[at].channels;
    const channels = had.includes(index) ? had.filter((k) => k !== index) : [...had, index].sort((a, b) => a - b);
    if (channels.length) sets[at] = { ...sets[at], channels };
    else sets.splice(at, 1);
  }
  return { ...state, sets };
}

// Exactly one part of each of two layers.
export function withFlow(state, lower, i, upper, j) {
  const layers = [lower.layer, upper.layer];
  return { ...state, sets: [...state.sets.filter((set) => set.patch || !layers.includes(set.layer)), setOf(lower, i), setOf(upper, j)] };
}

export function withPatch(state, layer, patch) {
  return { ...state, sets: [...state.sets.filter((set) => !set.patch), { layer, patch, not: false }] };
}

export function isSelected(state, column, index) {
  return state.sets.some((set) => isOf(set, column) && set.channels.includes(index));
}

// The columns with another division of one of them, or with it and without it.
export function withColumn(state, order, layer, asked) {
  const held = new Map(state.columns.map((one) => [one.layer ?? one, one]));
  if (asked === null) held.delete(layer);
  else held.set(layer, asked);
  return { ...state, columns: order.filter((one) => held.has(one)).map((one) => held.get(one)) };
}

// As the server reads it.
export function asRequest(state) {
  const parts = state.sets.map((set) => {
    const part = set.patch ? { layer: set.layer, patch: set.patch } : { layer: set.layer, channels: set.channels, axis: set.axis ?? null, ...(set.by ? { by: set.by, of: set.of } : {}) };
    return set.not ? { not: part } : part;
  });
  return {
    target: state.target, against: state.against, columns: state.columns, mode: state.mode, top: state.top,
    selection: parts.length ? { op: state.op, parts } : null,
  };
}

export function toHash(state) {
  return "#" + btoa(unescape(encodeURIComponent(JSON.stringify(state)))).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");
}

// The state of a link; `null` where it says none. The server checks what is in it.
export function fromHash(hash, opened) {
  if (hash.length < 2) return null;
  try {
    const text = hash.slice(1).replace(/-/g, "+").replace(/_/g, "/");
    const found = JSON.parse(decodeURIComponent(escape(atob(text))));
    const sets = (Array.isArray(found.sets) ? found.sets : []).filter((set) => set && typeof set.layer === "string" && (Array.isArray(set.patch) || Array.isArray(set.channels)));
    const state = firstState(opened);
    for (const key of Object.keys(FIRST)) if (key in found) state[key] = found[key];
    if (!Array.isArray(state.columns)) state.columns = [...opened.first];
    state.columns = state.columns.filter((one) => typeof (one?.layer ?? one) === "string");
    return { ...state, sets };
  } catch {
    return null;
  }
}
