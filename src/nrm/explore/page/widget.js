// The page in a notebook: requests are messages to the kernel.

import { explore } from "./page.js";

function askKernel(model) {
  let last = 0;
  const waiting = new Map();
  model.on("msg:custom", (message) => waiting.get(message.id)?.(message));
  // Calls `take` with each message until the answer is over.
  const ask = (content, take, signal) => new Promise((done, fail) => {
    last += 1;
    const id = last;
    const end = (error) => {
      waiting.delete(id);
      if (error) fail(error);
      else done();
    };
    signal?.addEventListener("abort", () => end(new DOMException("given up", "AbortError")));
    waiting.set(id, (message) => {
      if (message.over) end();
      else if (message.error !== undefined) end(new Error(message.error));
      else take(message);
    });
    model.send({ id, ...content });
  });
  const single = async (content) => {
    let found;
    await ask(content, (message) => { found = message.found; });
    return found;
  };
  return {
    open: () => single({ what: "open" }),
    look: (what, input, request, take, signal) => ask({ what, input, request }, (message) => take(message.part), signal),
    script: (input, request) => single({ what: "script", input, request }),
  };
}

function render({ model, el }) {
  const root = document.createElement("div");
  root.classList.add("within");
  el.append(root);
  explore(root, askKernel(model), false);
}

export default { render };
