// The page: what is open, what is asked, the input, the network, and what a number is.

import { make, notation, relevance, amount, shortened } from "./marks.js";
import { offerColumns } from "./chooser.js";
import { drawNetwork, named } from "./network.js";
import { offerOutputs, outputOf } from "./outputs.js";
import { drawPixels, drawHeatmap, drawScale, drawStill, drawWhere } from "./picture.js";
import { drawPlaces } from "./places.js";
import { asRequest, firstState, fromHash, setOf, toHash, toggled, withFlow, withPatch } from "./state.js";
import { offerFiles } from "./files.js";

let pages = 0; // each has a name for its own group of buttons
const WORDS = { heads: "head ", clusters: "cluster ", steps: "step " };
const PATIENCE = 250; // milliseconds until the page says that it waits

// Build the page in `root`.
//   source: {open, look, script, send}, as `askServer` makes it.
//   linked: whether what is chosen lies in the address.
//   again: makes another source, for a second view beside; none where there is no way to.
//   state: what is chosen at first.
export async function explore(root, source, linked = true, again = null, state = null) {
  root.classList.add("explorer");
  const parts = {
    head: make("header"), asked: make("section", { class: "asked", "aria-label": "What is asked" }),
    input: make("section", { class: "input", "aria-label": "Input" }),
    network: make("section", { class: "columns", "aria-label": "Network" }),
    samples: make("section", { class: "found", "aria-label": "Reference samples" }),
    found: make("section", { class: "found", "aria-label": "Most relevant flows" }),
    foot: make("footer", { "aria-live": "polite" }), note: make("p", { class: "note", role: "status" }),
    cautions: make("section", { class: "cautions", "aria-label": "What to know of these numbers", hidden: true }),
    wait: make("div", { class: "wait", hidden: true, role: "progressbar", "aria-label": "computing" }),
  };
  root.replaceChildren(parts.wait, make("div", { class: "sheet" }, parts.head, parts.asked, parts.cautions, parts.note,
    make("main", {}, parts.input, make("div", {}, parts.network, parts.samples, parts.found))), parts.foot);
  let opened;
  try {
    opened = await source.open();
  } catch (error) {
    parts.note.textContent = error.message;
    parts.note.classList.add("error");
    return null;
  }
  const page = new Page(root, parts, source, opened, linked);
  page.again = again;
  page.start(state);
  return page;
}

class Page {
  constructor(root, parts, source, opened, linked) {
    Object.assign(this, { root, parts, source, opened, linked });
    pages += 1;
    this.name = `mode-${pages}`;
    this.depth = 0;
    this.past = [];
    this.running = null;
    this.seen = null;
    this.point = this.point.bind(this);
  }

  start(state) {
    const first = state ?? firstState(this.opened);
    this.state = (this.linked && fromHash(location.hash, this.opened)) || first;
    if (this.linked) {
      window.addEventListener("popstate", () => {
        this.depth = Math.max(0, this.depth - 1);
        this.show(fromHash(location.hash, this.opened) ?? first);
      });
    }
    document.addEventListener("keydown", (event) => {
      if ((event.ctrlKey || event.metaKey) && event.key === "z" && this.root.isConnected && (this.linked || this.root.contains(document.activeElement))) {
        event.preventDefault();
        this.undo();
      }
    });
    let width = this.parts.network.clientWidth;
    new ResizeObserver(() => {
      if (Math.abs(this.parts.network.clientWidth - width) < 8) return;
      width = this.parts.network.clientWidth;
      this.drawNetwork();
    }).observe(this.parts.network);
    this.drawHead();
    this.show(this.state);
  }

  // A second view beside this one, of the same model: another target, input or selection.
  beside() {
    if (this.second) {
      this.second.remove();
      this.second = null;
    } else {
      this.second = make("div", { class: "within" });
      this.root.after(this.second);
      explore(this.second, this.again(), false, null, this.state);
    }
    this.root.classList.toggle("within", Boolean(this.second));
    this.drawHead();
  }

  // A new choice, which can be undone.
  choose(state) {
    this.past.push(this.state);
    this.depth += 1;
    if (this.linked) history.pushState(null, "", toHash(state));
    this.show(state);
  }

  undo() {
    if (!this.depth) return;
    if (this.linked) {
      history.back();
      return;
    }
    this.depth -= 1;
    this.show(this.past.pop());
  }

  // Ask for a state and draw the answer part by part; whatever was asked before is forgotten.
  async show(state) {
    this.state = state;
    this.running?.abort();
    const running = new AbortController();
    this.running = running;
    const waiting = setTimeout(() => { this.parts.wait.hidden = false; }, PATIENCE);
    this.note("");
    this.parts.found.replaceChildren();
    this.drawHead();
    const seen = { explained: null, columns: null, flows: [], cost: null };
    try {
      await this.source.look("view", state.input, asRequest(state), (part) => {
        if (this.running === running) this.take(seen, part);
      }, running.signal);
    } catch (error) {
      if (error.name !== "AbortError" && this.running === running) this.note(error.message, true);
    } finally {
      clearTimeout(waiting);
      if (this.running === running) {
        this.parts.wait.hidden = true;
        this.drawReferences(state);
        this.root.dataset.ready = String(Number(this.root.dataset.ready ?? 0) + 1);
      }
    }
  }

  take(seen, part) {
    if (part.kind === "error") {
      this.note(part.error, true);
      return;
    }
    if (part.kind === "superseded") return;
    if (part.kind === "flows") seen.flows.push(part);
    else if (part.kind === "done") seen.cost = part.cost;
    else seen[part.kind] = part;
    if (!seen.columns) return; // the old view stays until there is more than a name
    this.seen = seen;
    if (part.kind === "columns") {
      this.drawAsked();
      this.drawInput();
      this.drawNetwork();
    } else if (part.kind === "flows") {
      this.drawn.add(part); // of many channels all else stays as it is
    }
    if (part.cautions) this.drawCautions();
    this.point(null);
  }

  // Search the most relevant flows through all columns; the gap closes as one watches.
  async search() {
    this.running?.abort();
    const running = new AbortController();
    this.running = running;
    const line = make("p", { class: "muted", role: "status" }, "searching the most relevant flows …");
    const stop = make("button", { type: "button", class: "plain", click: () => running.abort() }, "Stop");
    this.parts.found.replaceChildren(line, stop);
    try {
      await this.source.look("search", this.state.input, asRequest(this.state), (part) => {
        if (this.running !== running) return;
        if (part.kind === "searching") line.textContent = part.gap === null ? "searching the most relevant flows …" : `searching: nothing left is larger than what is found by more than ${relevance(part.gap)}`;
        else if (part.kind === "found") this.drawFound(part);
        else if (part.kind === "error") {
          this.parts.found.replaceChildren();
          this.note(part.error, true);
        }
      }, running.signal);
    } catch (error) {
      if (this.running !== running) return;
      this.parts.found.replaceChildren();
      if (error.name !== "AbortError") this.note(error.message, true);
    }
  }

  drawFound(found) {
    const largest = Math.max(1e-30, ...found.flows.map(([, value]) => Math.abs(value)));
    const columns = found.layers.map((layer) => this.seen.columns.columns.find((column) => column.layer === layer));
    const rows = found.flows.map(([parts, value]) => {
      const number = {
        value,
        notation: columns.reduce((text, column, k) => named(text, column, parts[k]), found.notation),
        python: found.python,
      };
      const bar = make("span", { class: value < 0 ? "size less" : "size" });
      bar.style.width = `${(100 * Math.abs(value)) / largest}px`;
      const choose = () => this.choose({ ...this.state, op: "and", sets: columns.map((column, k) => setOf(column, parts[k])) });
      const row = make("tr", {}, ...parts.map((part, k) => make("td", {}, `${columns[k].word}${part}`)), make("td", {}, relevance(value)), make("td", {}, bar),
        make("td", {}, make("button", { type: "button", class: "plain", click: choose }, "select")));
      row.addEventListener("pointerenter", () => this.point(number));
      row.addEventListener("pointerleave", () => this.point(null));
      return row;
    });
    const exact = found.gap === 0 ? "no other is larger" : `others may be larger by ${found.gap === null ? "any amount" : relevance(found.gap)}: time was up`;
    this.parts.found.replaceChildren(
      make("h2", {}, "The most relevant flows", make("span", { class: "muted" }, ` ${exact} · ${found.cost.passes} messages, ${found.cost.milliseconds.toFixed(0)} ms`)),
      make("div", { class: "cautions", hidden: !found.cautions.length }, found.cautions.map((text) => make("p", {}, text))),
      make("table", {}, make("thead", {}, make("tr", {}, ...found.layers.map((layer) => make("th", { scope: "col" }, layer)), make("th", { scope: "col" }, "relevance"), make("td"), make("td"))), make("tbody", {}, rows)));
    this.root.dataset.found = String(found.flows.length);
  }

  // Where the one channel that is selected is most relevant in the data set, if that is known.
  async drawReferences(state) {
    const known = state.sets.filter((set) => !set.not && !set.by && set.channels?.length === 1 && (this.opened.referenced ?? []).includes(set.layer));
    if (!known.length || !this.source.references) {
      this.parts.samples.replaceChildren();
      return;
    }
    const { layer, channels: [channel] } = known.at(-1);
    let samples;
    try {
      samples = await this.source.references(layer, channel);
    } catch (error) {
      samples = [];
    }
    if (this.state !== state) return;
    const title = make("h2", {}, "In the data set ", notation(`S_{${layer}:${channel}}`), " is most relevant in");
    const figures = samples.map((one) => make("figure", {}, drawPixels(one), drawStill(one.heatmap, one), make("figcaption", {}, `${relevance(one.value)} ${one.name}`)));
    this.parts.samples.replaceChildren(...(samples.length ? [title, make("div", { class: "samples" }, figures)] : []));
  }

  // They stay as long as the numbers that they concern.
  drawCautions() {
    const said = [this.seen.columns, ...this.seen.flows].flatMap((part) => part.cautions);
    this.parts.cautions.replaceChildren(...said.map((text) => make("p", {}, text)));
    this.parts.cautions.hidden = !said.length;
  }

  note(text, wrong = false) {
    this.parts.note.textContent = text;
    this.parts.note.classList.toggle("error", wrong);
  }

  // -- what is open --------------------------------------------------------------------------------

  drawHead() {
    const { opened, state } = this;
    const thumbs = make("div", { class: "inputs", role: "group", "aria-label": "Inputs" }, opened.inputs.map((input, k) => make("button", {
      type: "button", class: k === state.input ? "thumb chosen" : "thumb", title: input.name, "aria-pressed": k === state.input, "data-input": k,
      click: () => this.choose({ ...this.state, input: k, target: null, against: null }),
    }, input.pixels ? drawPixels(input) : input.name)));
    const name = make("h1", {}, make("span", { class: "brand" }, "nrm"), ` ${opened.model}`);
    this.parts.head.replaceChildren(name, thumbs, ...(opened.sends ? [this.sender()] : []),
      make("span", { class: "gap" }),
      make("button", { type: "button", class: "plain", title: "the most relevant flows through all columns", click: () => this.search() }, "Find flows"),
      ...(this.again ? [make("button", { type: "button", class: "plain", "aria-pressed": Boolean(this.second), title: "a second view beside this one", click: () => this.beside() }, "Compare")] : []),
      offerColumns(opened, state, this.unfolded, (chosen) => { this.unfolded = true; this.choose(chosen); }, (open) => { this.unfolded = open; }), ...offerFiles(this),
      make("button", { type: "button", class: "plain undo", disabled: this.depth === 0, title: "Ctrl+Z", click: () => this.undo() }, "Undo"));
  }

  sender() {
    const field = make("input", { type: "file", accept: "image/*", class: "away", change: () => this.send(field.files[0]) });
    return make("label", { class: "plain button" }, "Open a picture", field);
  }

  async send(file) {
    if (!file) return;
    if (file.size > 2 ** 24) {
      this.note("At most 16 MB are taken: send a smaller file.", true);
      return;
    }
    try {
      const { input, ...opened } = await this.source.send(file);
      this.opened = opened;
      this.choose({ ...this.state, input, target: null, against: null });
    } catch (error) {
      this.note(error.message, true);
    }
  }

  // -- what is asked -------------------------------------------------------------------------------

  drawAsked() {
    const { seen, state } = this;
    const { total } = seen.columns;
    const share = `${relevance(total.value)}`;
    const line = make("p", { class: "formula", "data-value": total.value }, notation(total.notation), " = ", make("b", { class: "value" }, share));
    const units = make("p", { class: "muted" }, `${amount(total.value * seen.explained.scale)} of ${amount(seen.explained.scale)}, the ${seen.explained.what} ${seen.explained.label}`);
    const input = this.opened.inputs[state.input];
    this.parts.asked.replaceChildren(
      make("div", { class: "total" }, line, units),
      offerOutputs(seen.explained, this.opened, input, (target, against) => this.choose({ ...this.state, target, against })),
      this.chips());
  }

  // The selection, part by part: each may be negated or taken away, and how they are joined.
  chips() {
    const { state } = this;
    if (!state.sets.length) {
      const place = { picture: this.opened.cells ? "a part of the picture" : "drag over the picture", words: "a word", series: "a step", graph: "a node" }[this.opened.kind];
      return make("p", { class: "hint" }, `Click a channel, a flow, or ${place}: all numbers then are of the walks that pass there.`);
    }
    // What is drawn may be older than what is chosen: sets are told by what they are, not by place.
    const change = (old, set) => this.choose({ ...this.state, sets: this.state.sets.flatMap((one) => (one === old ? (set ? [set] : []) : [one])) });
    const joined = make("button", { type: "button", class: "join", title: "joined by and, or by or", "aria-label": `parts are joined by ${state.op}: change`, click: () => this.choose({ ...this.state, op: state.op === "and" ? "or" : "and" }) }, state.op === "and" ? "∧ and" : "∨ or");
    const chips = state.sets.map((set, k) => [
      ...(k === 1 ? [joined] : k ? [make("span", { class: "muted" }, state.op === "and" ? "∧" : "∨")] : []),
      make("span", { class: set.not ? "chip not" : "chip" },
        make("button", { type: "button", "aria-pressed": set.not, "aria-label": "not", title: "not", class: "negate", click: () => change(set, { ...set, not: !set.not }) }, "¬"),
        make("span", { title: set.layer }, set.patch ? `${shortened(set.layer, 30)} [${set.patch[0]}–${set.patch[1] - 1}, ${set.patch[2]}–${set.patch[3] - 1}]` : `${shortened(set.layer, 30)}: ${WORDS[set.by] ?? ""}${set.channels.join(", ")}`),
        make("button", { type: "button", "aria-label": "take away", title: "take away", class: "away-part", click: () => change(set, null) }, "×")),
    ]);
    const mode = (name, text) => make("label", {}, make("input", { type: "radio", name: this.name, value: name, checked: state.mode === name, change: () => this.choose({ ...this.state, mode: name }) }), text);
    return make("div", { class: "chips" }, ...chips.flat(),
      make("fieldset", { class: "mode" }, make("legend", { class: "away" }, "numbers are"), mode("joint", "jointly with it"), mode("given", "given it")),
      make("button", { type: "button", class: "plain", click: () => this.choose({ ...this.state, sets: [] }) }, "Clear"));
  }

  // -- the input and the network -------------------------------------------------------------------

  drawInput() {
    const { seen, state } = this;
    const heatmap = seen.columns.heatmap;
    const input = this.opened.inputs[state.input];
    const title = make("h2", {}, notation(heatmap.notation), make("span", { class: "muted" }, ` total ${relevance(heatmap.total)}`));
    title.addEventListener("pointerenter", () => this.point({ ...heatmap, value: heatmap.total }));
    title.addEventListener("pointerleave", () => this.point(null));
    if (this.opened.kind !== "picture") {
      this.parts.input.replaceChildren(title, drawPlaces(this.opened, input, heatmap, state, (k) => this.choose(toggled(this.state, { layer: heatmap.layer, axis: this.opened.axis }, k)), this.point));
      return;
    }
    const chosen = state.sets.find((set) => set.patch && set.layer === heatmap.layer)?.patch;
    const field = drawHeatmap(heatmap, input, chosen, {
      patch: (patch) => this.choosePatch(heatmap.layer, patch),
      pixel: (y, x, value) => this.point({ value, notation: heatmap.notation.replace(`i_{${heatmap.layer}}`, `i_{${heatmap.layer}:(${y}, ${x})}`), python: `${heatmap.python}[0, :, ${y}, ${x}].sum()` }),
      leave: () => this.point(null),
    });
    const drawn = drawPixels(input);
    drawn.classList.add("plainly");
    this.parts.input.replaceChildren(title, field, drawScale(heatmap), drawn);
  }

  // Of a picture whose answers were worked out before only some patches are known.
  choosePatch(layer, patch) {
    try {
      this.choose(withPatch(this.state, layer, this.source.snap?.(this.state.input, patch) ?? patch));
    } catch (error) {
      this.drawInput();
      this.note(error.message, true);
    }
  }

  drawNetwork() {
    if (!this.seen?.columns) return;
    const focus = this.root.contains(document.activeElement) ? keyOf(document.activeElement) : null;
    const { state } = this;
    const place = this.opened.inputs[state.input];
    for (const column of this.seen.columns.columns) if (column.axis !== null || column.by === "steps") column.marks = place.words ?? place.marks;
    this.drawn = drawNetwork(this.seen, state, this.parts.network.clientWidth, {
      node: (column, node) => this.choose(toggled(this.state, column, node.index)),
      flow: (lower, upper, link) => this.choose(withFlow(this.state, lower, link[0], upper, link[1])),
      output: (k, event) => {
        const of = (index) => outputOf(this.seen.explained, index);
        this.choose(event.shiftKey ? { ...this.state, target: of(this.seen.explained.target), against: of(k) } : { ...this.state, target: of(k), against: null });
      },
      point: this.point,
    });
    const { drawn } = this;
    this.parts.network.replaceChildren(drawn.svg);
    let lost = focus;
    const refocus = () => {
      const found = lost && drawn.svg.querySelector(lost);
      if (!found) return;
      lost = null;
      found.focus();
    };
    const go = () => {
      if (this.drawn !== drawn) return;
      const others = drawn.more();
      refocus();
      if (others) requestAnimationFrame(go);
    };
    refocus();
    requestAnimationFrame(go);
  }

  // -- what a number is ----------------------------------------------------------------------------

  point(number) {
    if (!this.seen?.columns) return;
    const { cost } = this.seen;
    const shown = number ?? this.seen.columns.total;
    drawWhere(this.parts.input.querySelector(".picture"), number?.where);
    const { columns } = this.seen.columns;
    const took = cost ? `${cost.passes} passes, ${cost.milliseconds.toFixed(0)} ms` : `flows: ${this.seen.flows.length} of ${columns.length - 1} …`;
    this.parts.foot.replaceChildren(
      make("span", { class: "which" }, notation(shown.notation), " = ", make("b", {}, relevance(shown.value))),
      make("code", {}, shown.python),
      make("span", { class: "took muted" }, took));
  }
}

// How to find again what had the focus, when all is drawn anew.
function keyOf(element) {
  const { layer, index, output } = element.dataset;
  if (layer !== undefined && index !== undefined) return `.node[data-layer="${CSS.escape(layer)}"][data-index="${CSS.escape(index)}"]`;
  return output === undefined ? null : `.output[data-output="${CSS.escape(output)}"]`;
}
