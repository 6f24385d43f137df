// The input with its heatmap, where a patch is chosen by dragging, or by the arrow keys and Enter.

import { make, bytes, floats, shade, relevance } from "./marks.js";

const EDGE = 0.42;
const FEW = 64; // pixels a side, below which a line around the bright parts shows more than outlines
const ENLARGED = 14;

// The pixels of an input, as a canvas.
export function drawPixels(input) {
  const [height, width, colours] = [...input.shape, 1];
  const canvas = make("canvas", { width, height, class: "pixels", role: "img", "aria-label": input.name });
  const data = bytes(input.pixels);
  paint(canvas, (k) => (colours === 3 ? [data[3 * k], data[3 * k + 1], data[3 * k + 2]] : [data[k], data[k], data[k]]));
  return canvas;
}

// The heatmap of an answer over the outlines of the input; on.patch([y0, y1, x0, x1]) once chosen.
export function drawHeatmap(heatmap, input, chosen, on) {
  const [height, width] = heatmap.shape;
  const values = floats(heatmap.values);
  const canvas = drawStill(heatmap, input);
  canvas.classList.add("heatmap");
  const frame = make("div", { class: "patch", hidden: true });
  const held = make("div", {
    class: "picture", tabindex: 0, role: "application",
    "aria-label": "Heatmap of the input. Drag to choose a patch, or move with the arrow keys and press Enter.",
  }, canvas, frame);
  const cell = Math.max(1, Math.round(Math.min(height, width) / 20));
  const lay = ([y0, y1, x0, x1]) => {
    frame.hidden = false;
    frame.style.left = `${(100 * x0) / width}%`;
    frame.style.top = `${(100 * y0) / height}%`;
    frame.style.width = `${(100 * (x1 - x0)) / width}%`;
    frame.style.height = `${(100 * (y1 - y0)) / height}%`;
  };
  if (chosen) lay(chosen);
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    const place = (offset, size, most) => Math.min(most - 1, Math.max(0, Math.floor((offset / size) * most)));
    return [place(event.clientY - box.top, box.height, height), place(event.clientX - box.left, box.width, width)];
  };
  const between = ([y, x], [v, u]) => [Math.min(y, v), Math.max(y, v) + 1, Math.min(x, u), Math.max(x, u) + 1];
  let begin = null;
  held.addEventListener("pointerdown", (event) => {
    begin = at(event);
    held.setPointerCapture(event.pointerId);
    event.preventDefault();
    held.focus();
  });
  held.addEventListener("pointermove", (event) => {
    const [y, x] = at(event);
    on.pixel(y, x, values[y * width + x]);
    if (begin) lay(between(begin, [y, x]));
  });
  held.addEventListener("pointerup", (event) => {
    if (!begin) return;
    const [y0, y1, x0, x1] = between(begin, at(event));
    begin = null;
    // A click without dragging takes a small square around it.
    const small = y1 - y0 === 1 && x1 - x0 === 1 && cell > 1;
    on.patch(small ? around(y0, x0, cell, height, width) : [y0, y1, x0, x1]);
  });
  held.addEventListener("pointerleave", () => on.leave());
  const cursor = chosen ? [...chosen] : around(Math.floor(height / 2), Math.floor(width / 2), 4 * cell, height, width);
  held.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-cell, 0], ArrowDown: [cell, 0], ArrowLeft: [0, -cell], ArrowRight: [0, cell] };
    if (moves[event.key]) {
      event.preventDefault();
      const [down, right] = moves[event.key];
      const end = event.shiftKey ? 1 : 0; // with the shift key it grows or shrinks
      if (!end && (cursor[0] + down < 0 || cursor[1] + down > height || cursor[2] + right < 0 || cursor[3] + right > width)) return;
      if (!end) cursor[0] += down;
      cursor[1] = Math.min(height, Math.max(cursor[0] + 1, cursor[1] + down));
      if (!end) cursor[2] += right;
      cursor[3] = Math.min(width, Math.max(cursor[2] + 1, cursor[3] + right));
      lay(cursor);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      on.patch([...cursor]);
    }
  });
  return held;
}

// Where a cluster lies, as what is left of the picture; no longer, where there is none to show.
export function drawWhere(held, where) {
  held?.querySelector(".where")?.remove();
  if (!held || where?.shape.length !== 2) return;
  const [height, width] = where.shape;
  const canvas = make("canvas", { width, height, class: "where" });
  const numbers = bytes(where.numbers);
  const context = canvas.getContext("2d");
  context.fillStyle = "rgb(29 29 31 / 62%)";
  for (let k = 0; k < height * width; k += 1) if (numbers[k] !== where.chosen) context.fillRect(k % width, Math.floor(k / width), 1, 1);
  held.append(canvas);
}

// A heatmap to look at alone.
export function drawStill(heatmap, input) {
  const values = floats(heatmap.values);
  const limit = limitOf(values);
  const few = Math.min(...heatmap.shape) < FEW;
  return few ? withContour(values, limit, input) : withOutlines(values, limit, input);
}

// The colours' meaning under a heatmap.
export function drawScale(heatmap) {
  const limit = limitOf(floats(heatmap.values));
  return make("div", { class: "scale" }, make("span", {}, relevance(-limit)), make("span", { class: "bar", "aria-hidden": true }), make("span", {}, `+${relevance(limit)}`));
}

function limitOf(values) {
  const sizes = Float32Array.from(values, Math.abs).sort();
  const at = 0.995 * (sizes.length - 1);
  const low = sizes[Math.floor(at)];
  const found = low + (at - Math.floor(at)) * (sizes[Math.ceil(at)] - low);
  return found || sizes.at(-1) || 1;
}

function around(y, x, cell, height, width) {
  const y0 = Math.max(0, Math.min(height - cell, y - Math.floor(cell / 2)));
  const x0 = Math.max(0, Math.min(width - cell, x - Math.floor(cell / 2)));
  return [y0, Math.min(height, y0 + cell), x0, Math.min(width, x0 + cell)];
}

function paint(canvas, colour) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  for (let k = 0; k < canvas.width * canvas.height; k += 1) image.data.set([...colour(k), 255], 4 * k);
  context.putImageData(image, 0, 0);
}

// Relevance as colours, darker where the input's brightness changes.
function withOutlines(values, limit, input) {
  const canvas = make("canvas", { width: input.shape[1], height: input.shape[0] });
  const lines = outlines(input);
  paint(canvas, (k) => shade(values[k], limit).map((part) => part * (1 - EDGE * lines[k])));
  return canvas;
}

// Relevance as colours, with a line between the bright and the dark pixels of the input.
function withContour(values, limit, input) {
  const [height, width] = input.shape;
  const canvas = make("canvas", { width: width * ENLARGED, height: height * ENLARGED });
  const context = canvas.getContext("2d");
  for (let k = 0; k < height * width; k += 1) {
    context.fillStyle = `rgb(${shade(values[k], limit).join(",")})`;
    context.fillRect((k % width) * ENLARGED, Math.floor(k / width) * ENLARGED, ENLARGED, ENLARGED);
  }
  const grey = greyOf(input);
  const middle = (Math.min(...grey) + Math.max(...grey)) / 2;
  context.strokeStyle = "rgb(60 60 66 / 75%)";
  context.lineWidth = 1.25;
  context.beginPath();
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      const bright = grey[y * width + x] > middle;
      if (x + 1 < width && grey[y * width + x + 1] > middle !== bright) {
        context.moveTo((x + 1) * ENLARGED, y * ENLARGED);
        context.lineTo((x + 1) * ENLARGED, (y + 1) * ENLARGED);
      }
      if (y + 1 < height && grey[(y + 1) * width + x] > middle !== bright) {
        context.moveTo(x * ENLARGED, (y + 1) * ENLARGED);
        context.lineTo((x + 1) * ENLARGED, (y + 1) * ENLARGED);
      }
    }
  }
  context.stroke();
  return canvas;
}

function greyOf(input) {
  const [height, width, colours] = [...input.shape, 1];
  const data = bytes(input.pixels);
  return Float32Array.from({ length: height * width }, (_, k) => (colours === 3 ? (data[3 * k] + data[3 * k + 1] + data[3 * k + 2]) / 3 : data[k]));
}

// How strongly brightness changes at each pixel, from 0 to 1.
function outlines(input) {
  const [height, width] = input.shape;
  const grey = greyOf(input);
  const at = (y, x) => grey[Math.min(height - 1, Math.max(0, y)) * width + Math.min(width - 1, Math.max(0, x))];
  const change = grey.map((_, k) => {
    const [y, x] = [Math.floor(k / width), k % width];
    return Math.hypot(at(y + 1, x) - at(y - 1, x), at(y, x + 1) - at(y, x - 1));
  });
  const most = Float32Array.from(change).sort()[Math.floor(0.98 * (change.length - 1))] || 1;
  return change.map((size) => Math.min(1, size / most));
}
