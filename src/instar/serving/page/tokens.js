// The view of tokens: how sure the model was of each, and what else it thought of.

/**
 * What a token adds to the text, given the bytes that wait for the rest of their character.
 *
 * A token may end within a character, which is in small vocabularies what Chinese is made of. Such
 * a piece adds nothing yet; the character appears with the token that completes it.
 *
 * @returns {{text, waiting}}
 */
function decoded(token, before = []) {
  if (!token.bytes) return { text: token.token, waiting: [] };
  const bytes = [...before, ...token.bytes];
  for (let cut = 0; cut <= Math.min(3, bytes.length); cut++) {
    try {
      const whole = new Uint8Array(bytes.slice(0, bytes.length - cut));
      const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(whole);
      return { text, waiting: bytes.slice(bytes.length - cut) };
    } catch { /* perhaps the last bytes begin a character */ }
  }
  return { text: "\ufffd", waiting: [] };
}

/** A token by its text, or where that is half a character, by its bytes. */
function named(token, before) {
  const { text, waiting } = decoded(token, before);
  if (!waiting.length) return text;
  return `${text}‹${waiting.map((byte) => byte.toString(16).padStart(2, "0")).join(" ")}›`;
}

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share >= 0.1 ? `${share.toFixed(1)} %` : share > 0 ? "< 0.1 %" : "0 %";
}

/** Tokens side by side, coloured by doubt; choosing one shows its alternatives below. */
function tokenView(tokens) {
  const view = make("div", "token-view");
  const list = make("div", "token-list");
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-label", say("tokens"));
  const choices = make("div", "choices");
  choices.append(make("p", "note", say("choose")));
  let waiting = [];
  const befores = tokens.map((token) => {
    const before = waiting;
    ({ waiting } = decoded(token, before));
    return before;
  });
  const boxes = tokens.map((token, i) => tokenBox(token, befores[i], () => choose(i)));
  list.append(...boxes);
  if (boxes.length) boxes[0].tabIndex = 0;

  function choose(i) {
    for (const box of list.querySelectorAll("[aria-selected=true]")) {
      box.setAttribute("aria-selected", "false");
      box.tabIndex = -1;
    }
    boxes[0].tabIndex = -1;
    boxes[i].setAttribute("aria-selected", "true");
    boxes[i].tabIndex = 0;
    boxes[i].focus({ preventScroll: true });
    choices.replaceChildren(alternatives(tokens[i], befores[i]));
  }

  list.addEventListener("keydown", (event) => {
    const at = boxes.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1,
      Home: 0, End: boxes.length - 1, Enter: at, " ": at }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    choose(Math.min(Math.max(to, 0), boxes.length - 1));
    boxes[Math.min(Math.max(to, 0), boxes.length - 1)].scrollIntoView({ block: "nearest" });
  });

  const legend = make("div", "legend");
  legend.append(make("span", "", say("likely")), make("i"), make("span", "", say("unlikely")));
  view.append(legend, list, choices);
  return view;
}

function tokenBox(token, before, choose) {
  const box = make("span", "token");
  box.setAttribute("role", "option");
  box.setAttribute("aria-selected", "false");
  box.setAttribute("aria-label", `${named(token, before)} ${percent(token.logprob)}`);
  box.tabIndex = -1;
  // A token of half the probability is hardly a surprise, one of a thousandth is: doubt is the
  // log-probability, full at 1 in 150.
  box.style.setProperty("--doubt", Math.min(1, -token.logprob / 5));
  const { text } = decoded(token, before);
  if (!text) box.append(make("span", "sign", "·"));
  for (const part of text.split(/(\n)/)) {
    if (part === "\n") box.append(make("span", "sign", "⏎"));
    box.append(part);
  }
  box.addEventListener("click", choose);
  return box;
}

/** The likeliest tokens at one place, the drawn one marked. */
function alternatives(token, before) {
  const others = (token.top_logprobs ?? []).slice();
  const drawn = others.findIndex((o) => o.token === token.token && o.logprob === token.logprob);
  if (drawn < 0) others.push(token);
  others.sort((a, b) => b.logprob - a.logprob);
  const table = make("table");
  for (const other of others) {
    const row = table.insertRow();
    const same = other.token === token.token && other.logprob === token.logprob;
    if (same) row.className = "drawn";
    const name = make("th", "", named(other, before).replaceAll("\n", "⏎").replaceAll(" ", "␣") || "∅");
    name.scope = "row";
    const bar = make("i");
    bar.style.setProperty("--share", Math.exp(other.logprob));
    const much = make("td", "much");
    much.append(bar);
    row.append(name, make("td", "percent", percent(other.logprob)), much);
  }
  return table;
}
