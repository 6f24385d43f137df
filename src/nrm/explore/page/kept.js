// The page of a file that needs no server: its answers were worked out before.

import { explore } from "./page.js";

// A source that knows the answers to single clicks.
export function askKept(kept) {
  const more = "This file holds single channels of the columns shown. For anything else start `nrm explore`.";
  const keyOfRequest = (input, request) => {
    if (request.target !== null || request.against !== null) return null;
    if (!request.selection) return String(input);
    const parts = request.selection.parts;
    const [part] = parts;
    if (parts.length > 1 || part.channels?.length !== 1) return null;
    return `${input} ${request.mode} ${part.layer} ${part.channels[0]}`;
  };
  return {
    async open() {
      return kept.opened;
    },
    async look(what, input, request, take) {
      if (what !== "view") throw new Error(more);
      const key = keyOfRequest(input, request);
      const first = String(kept.opened.first) === String(request.columns) && request.top === kept.opened.top;
      const parts = first && key !== null ? kept.answers[key] : undefined;
      if (!parts) throw new Error(more);
      parts.forEach(take);
    },
    async script() {
      throw new Error(more);
    },
  };
}

const held = document.getElementById("kept");
if (held) explore(document.getElementById("explorer"), askKept(JSON.parse(held.textContent)));
