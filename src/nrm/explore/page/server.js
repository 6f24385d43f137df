// The server that the page came from: its address holds the token, and is the only one asked.

class Refused extends Error {}

export function askServer(base = new URL(".", location.href)) {
  let session = null;
  const post = async (path, body, signal, type = "application/json") => {
    let answer;
    try {
      answer = await fetch(new URL(`api/${path}`, base), { method: "POST", body, signal, headers: { "Content-Type": type } });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("The server does not answer: is `nrm explore` still running?");
    }
    if (!answer.ok) throw new Refused((await answer.json().catch(() => ({}))).error ?? `error ${answer.status}`);
    return answer;
  };
  return {
    async open() {
      const found = await (await post("open", "{}")).json();
      session = found.session;
      return found;
    },
    // Calls `take` with each part of an answer as it comes; `what` is "view" or "search".
    async look(what, input, request, take, signal) {
      const answer = await post(what, JSON.stringify({ session, input, request }), signal);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { done, value } = await reader.read();
        const lines = (rest + (value ?? "")).split("\n");
        rest = lines.pop();
        for (const line of lines) if (line) take(JSON.parse(line));
        if (done) return;
      }
    },
    async script(input, request) {
      return (await (await post("script", JSON.stringify({ session, input, request }))).json()).script;
    },
    async references(layer, channel) {
      return (await (await post("references", JSON.stringify({ session, layer, channel }))).json()).samples;
    },
    async send(file) {
      const query = `send?session=${encodeURIComponent(session)}&name=${encodeURIComponent(file.name)}`;
      return (await post(query, file, undefined, "application/octet-stream")).json();
    },
  };
}
