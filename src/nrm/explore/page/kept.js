// The page of a file that needs no server: its answers were worked out before.

import { explore } from "./page.js";
import { bytes, floats } from "./marks.js";

// A source that knows the answers to single clicks.
function askKept(kept) {
  const { cells, top, first } = kept.opened;
  const more = `This file holds single channels and places, the most relevant flows of the first view${cells ? ", and the parts of a coarse grid over the picture" : ""}. For anything else start \`nrm explore\`.`;
  const keyOfPart = (part) => JSON.stringify(part.patch ? [part.layer, part.patch] : [part.layer, part.axis ?? null, part.by ?? null, part.of ?? null, part.channels]);
  const keyOf = (input, { selection }) => {
    if (!selection) return String(input);
    if (selection.op !== "and" && selection.parts.length > 1) return null;
    return [input, ...selection.parts.map(keyOfPart).sort()].join(" ");
  };
  return {
    async open() {
      return kept.opened;
    },
    async look(what, input, request, take) {
      if (what !== "view") throw new Error(more);
      const asIs = JSON.stringify(first) === JSON.stringify(request.columns) && request.top === top && request.target === null && request.against === null;
      const parts = asIs ? kept.answers[keyOf(input, request)] : undefined;
      if (!parts) throw new Error(more);
      (request.mode === "given" && request.selection ? parts.map(givenIt(parts)) : parts).forEach(take);
    },
    // The part of the picture that a patch covers, if it is one of those that are known; one in which
    // it lies.
    snap(input, patch) {
      return [0, 1].flatMap((axis) => {
        const [begin, end] = patch.slice(2 * axis, 2 * axis + 2);
        const lines = cells[input][axis];
        const nearest = (place) => lines.reduce((best, line, k) => (Math.abs(line - place) < Math.abs(lines[best] - place) ? k : best), 0);
        const [from, to] = [nearest(begin), nearest(end)];
        if (to - from > 1) throw new Error(more);
        const at = to - from === 1 ? from : lines.findLastIndex((line) => line <= (begin + end - 1) / 2);
        return [lines[at], lines[at + 1]];
      });
    },
    async script() {
      throw new Error(more);
    },
  };
}

// A part of an answer jointly with a selection as one given it: divided by its relevance (eq. 11).
function givenIt(parts) {
  const { total } = parts.find((part) => part.kind === "columns");
  const divided = (value) => (total.value ? value / total.value : 0);
  const [selection, python] = [total.notation.slice(2), total.python.slice(2)]; // what is in R(...)
  const notation = (text) => `${text.slice(0, -selection.length - 2)} | ${selection}`;
  const line = (text) => `${text.slice(0, -python.length)}given=${python}`;
  const named = (one) => ({ ...one, notation: notation(one.notation), python: line(one.python), ...(one.each ? { each: line(one.each) } : {}) });
  const ways = {
    columns: (part) => ({
      ...part,
      columns: part.columns.map((one) => ({
        ...named(one), total: one.total === null ? null : divided(one.total), rest: divided(one.rest), nodes: one.nodes.map((node) => ({ ...node, value: divided(node.value) })),
      })),
      heatmap: { ...named(part.heatmap), total: divided(part.heatmap.total), values: floats(part.heatmap.values).map(divided) },
    }),
    flows: (part) => ({ ...named(part), links: part.links.map(([i, j, value]) => [i, j, divided(value)]) }),
  };
  return (part) => ways[part.kind]?.(part) ?? part;
}

async function unpacked(text) {
  const stream = new Blob([bytes(text.trim())]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

const held = document.getElementById("kept");
if (held) unpacked(held.textContent).then((kept) => explore(document.getElementById("explorer"), askKept(kept)));
