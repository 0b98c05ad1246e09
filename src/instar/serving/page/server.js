// Asking the server: OpenAI's API, and what it answers when something is wrong.

/** Something went wrong, in words for the person who reads the page. */
class Trouble extends Error {
  constructor(words, code = "") {
    super(words);
    this.code = code;
  }
}

/** Fetch a path of this server, with the key if there is one; throws Trouble unless all is well. */
async function ask(path, body, signal) {
  const headers = {};
  const key = document.getElementById("key").value;
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble(say("unreachable"));
  }
  if (answer.ok) return answer;
  let problem = {};
  try {
    problem = (await answer.json()).error ?? {};
  } catch { /* not even JSON */ }
  throw trouble(answer.status, problem, answer.headers.get("Retry-After"));
}

/** Words for an error of the server's: ours where we know the kind, else the server's own. */
function trouble(status, { code, message }, wait) {
  if (status === 401) return new Trouble(say("needs_key"), "needs_key");
  if (status === 429 || status === 503) return new Trouble(say("busy", wait ?? 1), code);
  if (code === "content_filter") {
    const reason = message.split(": ").slice(1).join(": ");
    return new Trouble(say("stopped_by_filter", reason && `(${reason})`), code);
  }
  if (code === "context_length_exceeded") return new Trouble(say("too_long"), code);
  return new Trouble(message || say("failed", status), code);
}

/** The names of the models that are served. */
async function models() {
  const list = await (await ask("v1/models")).json();
  return list.data.map((model) => model.id);
}

/**
 * Ask for a reply and hand its pieces on as they come.
 *
 * @param {object} request  The body of /v1/chat/completions.
 * @param {AbortSignal} signal  Ends it early.
 * @yields {{text, thought, tokens, finish}}
 */
async function* stream(request, signal) {
  const answer = await ask("v1/chat/completions", { ...request, stream: true }, signal);
  let finished = false;
  for await (const event of events(answer.body)) {
    if (event === "[DONE]") break;
    const chunk = parsed(event);
    if (chunk.error) throw trouble(0, chunk.error);
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    finished ||= Boolean(choice.finish_reason);
    yield {
      text: choice.delta?.content ?? "",
      thought: choice.delta?.reasoning_content ?? "",
      tokens: choice.logprobs?.content ?? [],
      finish: choice.finish_reason,
    };
  }
  if (!finished) throw new Trouble(say("cut"));
}

/** What an event says; throws Trouble where none of the server's came, but a proxy's page. */
function parsed(event) {
  try {
    return JSON.parse(event);
  } catch {
    throw new Trouble(say("cut"));
  }
}

/** The data of server-sent events: lines that begin with "data:", an empty line after each event. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    while (true) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new Trouble(say("cut"));
      }
      text += part.value ?? "";
      const pieces = text.split(/\r?\n\r?\n/);
      text = pieces.pop();
      for (const piece of pieces) {
        const data = piece.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
      }
      if (part.done) return;
    }
  } finally {
    reader.cancel().catch(() => {}); // the server stops writing when nobody reads
  }
}
