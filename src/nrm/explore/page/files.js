// What can be taken away: a picture of the view, a script that gives its numbers, a link.

import { make, draw } from "./marks.js";
import { asRequest } from "./state.js";

// The buttons.
export function offerFiles(page) {
  const button = (text, act) => make("button", { type: "button", click: act }, text);
  const drawn = (act) => (page.drawn ? act(asSvg(page)) : page.note("There is no picture yet: wait for the first answer."));
  const menu = make("details", { class: "chooser" }, make("summary", { class: "plain button" }, "Export"), make("div", { class: "menu" },
    button("Script (Python)", async () => {
      try {
        save("explored.py", "text/x-python", await page.source.script(page.state.input, asRequest(page.state)));
      } catch (error) {
        page.note(error.message, true);
      }
    }),
    button("Picture (SVG)", () => drawn((picture) => save("explored.svg", "image/svg+xml", picture.text))),
    button("Picture (PNG)", () => drawn(savePng)),
    ...(page.linked ? [button("Copy the link", () => navigator.clipboard.writeText(location.href).then(() => page.note("The link is copied. It holds the token: who has it may use this explorer."), () => page.note(location.href)))] : [])));
  return [menu];
}

function save(name, kind, content) {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type: kind }));
  const link = make("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

// The view as one picture: the formula, the heatmap and the columns.
function asSvg(page) {
  while (page.drawn.more());
  const columns = page.parts.network.querySelector("svg").cloneNode(true);
  const heatmap = page.parts.input.querySelector("canvas.heatmap");
  const side = heatmap ? 280 : 0;
  const left = side ? side + 36 : 0;
  const width = left + Number(columns.getAttribute("width")) + 24;
  const height = Math.max(Number(columns.getAttribute("height")), side + 40) + 64;
  const { total } = page.seen.columns;
  const text = `${total.notation.replace(/_\{([^}]*)\}/g, "[$1]")} = ${total.value.toPrecision(6)}`;
  const svg = draw("svg", { xmlns: "http://www.w3.org/2000/svg", width, height, viewBox: `0 0 ${width} ${height}`, "font-family": "Helvetica, Arial, sans-serif" },
    draw("rect", { width, height, fill: "#fff" }),
    draw("text", { x: 16, y: 30, "font-size": 17, "font-style": "italic", "font-family": "STIX Two Text, Georgia, serif" }, text));
  if (heatmap) svg.append(draw("image", { x: 16, y: 56, width: side, height: (side * heatmap.height) / heatmap.width, href: heatmap.toDataURL(), "image-rendering": "pixelated" }));
  columns.setAttribute("x", String(left));
  columns.setAttribute("y", "48");
  svg.append(columns);
  return { text: new XMLSerializer().serializeToString(svg), width, height };
}

function savePng({ text, width, height }) {
  const image = new Image();
  image.onload = () => {
    const canvas = make("canvas", { width: 2 * width, height: 2 * height });
    canvas.getContext("2d").drawImage(image, 0, 0, 2 * width, 2 * height);
    canvas.toBlob((blob) => save("explored.png", "image/png", blob));
    URL.revokeObjectURL(image.src);
  };
  image.src = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
}
