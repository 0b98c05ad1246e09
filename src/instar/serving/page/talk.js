// A conversation with one stage, or with two side by side.

const SENTENCE = /[.!?。！？\n]/;
const RESERVED = 4; // at least one part in so many of the context is kept free for the reply
const NEAR = 80; // pixels from the end within which new text keeps the end in view

class Talk {
  constructor(panel, facts) {
    this.panel = panel;
    this.facts = facts;
    panel.append(document.getElementById("talk-inside").content.cloneNode(true));
    this.find = (name) => panel.querySelector(`.${name}`);
    [this.log, this.form, this.input] = [this.find("log"), this.find("composer"), panel.querySelector("textarea")];
    this.selects = [...panel.querySelectorAll(".model")];
    this.twofold = this.selects.length === 2;
    this.hello = this.find("hello");
    this.form.addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    this.input.addEventListener("keydown", (event) => {
      // While Chinese is being composed, Enter belongs to the input method.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    this.find("stop").addEventListener("click", () => this.abort?.abort());
    this.find("fresh").addEventListener("click", () => this.begin());
    this.find("download").addEventListener("click", () => this.download());
    this.find("newest").addEventListener("click", () => this.toEnd(true));
    this.log.addEventListener("scroll", () => { this.find("newest").hidden = this.atEnd(); });
    this.begin();
  }

  /** A new conversation. */
  begin() {
    this.abort?.abort();
    this.busy(null);
    this.messages = []; // user and assistant in turn
    this.forgotten = 0; // how many of them the model is no longer told
    this.choosing = null; // the turn that waits for a vote
    this.log.replaceChildren(this.hello);
    this.input.focus({ preventScroll: true });
  }

  /** Send what is written; the composer is empty then, and comes back filled if nothing came of it. */
  async send() {
    const text = this.input.value.trim();
    if (!text || this.abort) return;
    if (this.choosing) return void this.choosing.remind();
    this.input.value = "";
    await this.answer(text);
  }

  /** Put a message to the model, or to both, and take the reply into the conversation. */
  async answer(text) {
    this.hello.remove();
    const asked = make("div", "asked");
    asked.append(make("div", "words", text));
    const replies = make("div", "replies");
    const names = this.selects.map((select) => select.value);
    const blind = this.twofold && this.find("blind").checked;
    if (blind && Math.random() < 0.5) names.reverse();
    const lettered = blind || names[0] === names[1]; // the same stage may be asked twice
    const cards = names.map((name, i) => new Card(name, lettered ? "AB"[i] : name));
    replies.append(...cards.map((card) => card.element));
    this.log.append(asked, replies);
    this.toEnd(true);
    const mine = { role: "user", content: text };
    const abort = this.busy(new AbortController());
    const settings = sampling();
    const turn = { text, mine, asked, replies, cards, settings };
    try {
      turn.told = await this.makeRoom(names, mine, abort.signal);
      await Promise.all(cards.map((card) => card.fill(turn.told, settings, abort.signal, () => this.toEnd())));
      if (this.abort !== abort) return; // a new conversation was begun meanwhile
    } finally {
      if (this.abort === abort) this.busy(null);
    }
    if (cards.every((card) => !card.text.trim())) this.giveBack(turn);
    else if (this.twofold) this.toChoose(turn, blind);
    else this.take(turn, cards[0]);
    this.toEnd();
  }

  /** What the models are told: of what was said, as much as leaves room for a reply. */
  async makeRoom(names, mine, signal) {
    const told = () => [...instructions(), ...this.messages.slice(this.forgotten), mine];
    const tight = async () => (await Promise.all(names.map((name) => isTight(name, told(), signal)))).includes(true);
    while (this.forgotten < this.messages.length && await tight() && !signal.aborted) {
      this.forgotten += 2;
      this.log.lastElementChild.before(make("p", "note", say("forgot")));
    }
    return told();
  }

  /** Nothing came of a message: it may be mended and sent once more. */
  giveBack({ text }) {
    if (!this.input.value) this.input.value = text;
  }

  /** A reply becomes part of the conversation, and can be asked for once more while it is the last. */
  take({ text, mine, asked, replies }, card) {
    this.messages.push(mine, { role: "assistant", content: card.text });
    this.log.querySelectorAll(".again").forEach((old) => old.remove());
    const again = button("again", "again", () => {
      if (this.abort) return;
      this.messages.splice(-2);
      this.forgotten = Math.min(this.forgotten, this.messages.length);
      asked.remove();
      replies.remove();
      this.answer(text);
    });
    if (!this.twofold) card.tools.append(again);
  }

  /** Ask which of two replies is better; the better one is what the conversation goes on with. */
  toChoose(turn, blind) {
    const { cards, replies } = turn;
    const bar = make("div", "votes");
    bar.setAttribute("role", "group");
    const note = make("span", "note");
    note.setAttribute("role", "status");
    const whole = cards.every((card) => card.text.trim());
    const equal = whole && cards[0].text === cards[1].text;
    const settle = (card) => {
      this.choosing = null;
      if (blind) cards.forEach((each) => each.reveal());
      bar.replaceChildren(note);
      this.take(turn, card);
      this.input.focus({ preventScroll: true });
    };
    const vote = async (i) => {
      const [chosen, rejected] = [cards[i], cards[1 - i]];
      settle(chosen);
      chosen.element.classList.add("better");
      note.textContent = await this.keepVote(turn, chosen, rejected);
    };
    if (whole && !equal) {
      cards.forEach((card, i) => bar.append(button("better", "vote", () => vote(i), card.name)));
    } else {
      if (equal) note.textContent = say("equal");
      bar.append(button("go_on", "", () => settle(cards.find((card) => card.text.trim()))));
    }
    bar.append(button("neither", "", () => {
      this.choosing = null;
      [turn.asked, replies, bar].forEach((element) => element.remove());
      this.giveBack(turn);
      this.input.focus({ preventScroll: true });
    }), note);
    this.choosing = { remind: () => { note.textContent = say("choose_first"); this.toEnd(true); } };
    replies.after(bar);
  }

  /** Store a vote as a preference pair; returns what to tell. */
  async keepVote({ told, settings }, chosen, rejected) {
    if (!this.facts.votes) return say("not_kept");
    try {
      await ask("votes", {
        messages: told,
        chosen: chosen.text,
        rejected: rejected.text,
        chosen_model: chosen.model,
        rejected_model: rejected.model,
        sampling: settings,
      });
      return say("kept", `${chosen.model} > ${rejected.model}`);
    } catch (error) {
      return error.message;
    }
  }

  /** Show that something is being written, or that nothing is. */
  busy(abort) {
    this.abort = abort;
    this.find("send").hidden = Boolean(abort);
    this.find("stop").hidden = !abort;
    return abort;
  }

  atEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < NEAR;
  }

  /** Keep the newest text in view, unless somebody has scrolled up to read. */
  toEnd(anyhow = false) {
    if (anyhow || this.following) this.log.scrollTop = this.log.scrollHeight;
    this.find("newest").hidden = this.atEnd();
  }

  get following() {
    return this.find("newest").hidden;
  }

  /** The conversation as a file that `instar` reads: a list with one record. */
  download() {
    const record = {
      messages: [...instructions(), ...this.messages],
      models: this.selects.map((select) => select.value),
      sampling: sampling(),
    };
    const link = make("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify([record], null, 2)], { type: "application/json" }));
    link.download = "conversation.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
}

/** One reply: its words as they come, how it ended, its tokens. */
class Card {
  constructor(model, name) {
    this.model = model;
    this.name = name;
    this.element = make("article", "reply");
    this.who = make("div", "who", name);
    this.thought = make("details", "thought");
    this.thought.append(make("summary", "", say("thinking")), make("div", "words"));
    this.words = make("div", "words");
    this.end = make("div", "end");
    this.tools = make("div", "tools");
    const foot = make("div", "foot");
    foot.append(this.tools, this.end);
    this.element.append(this.who, this.words, foot);
    this.clear();
  }

  clear() {
    [this.text, this.tokens] = ["", []];
    this.words.textContent = this.end.textContent = "";
    this.growing = new Growing(this.words);
    this.end.classList.remove("wrong");
  }

  reveal() {
    this.who.textContent = this.name === this.model ? this.model : `${this.name} · ${this.model}`;
  }

  /** Write the reply to a conversation. */
  async fill(messages, settings, signal, grown) {
    this.clear();
    this.element.setAttribute("aria-busy", "true");
    const reader = new Reader(this.name);
    try {
      const recorded = document.getElementById("tokens").checked;
      const request = { model: this.model, messages, ...settings };
      if (recorded) Object.assign(request, { logprobs: true, top_logprobs: 5 });
      for await (const { text, thought, tokens, finish } of stream(request, signal)) {
        if (thought) this.think(thought);
        this.text += text;
        this.draw(grown);
        this.tokens.push(...tokens);
        reader.push(text);
        if (WORDS[finish] && finish !== "stop") this.end.textContent = say(finish);
      }
      if (!this.text.trim() && !this.end.textContent) this.end.textContent = say("silent");
    } catch (error) {
      if (error.name === "AbortError") this.end.textContent = say("stopped");
      else return this.failed(error);
    } finally {
      this.element.setAttribute("aria-busy", "false");
      this.growing.show(this.text);
      grown();
      reader.flush(this.end.textContent);
    }
    this.offer();
  }

  /** Show the words so far, once for each picture of the screen. */
  draw(grown) {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = null;
      this.growing.show(this.text);
      grown();
    });
  }

  failed(error) {
    if (!(error instanceof Trouble)) throw error;
    this.end.textContent = error.message;
    this.end.classList.add("wrong");
    if (error.code === "needs_key") openSettings(true, "key");
  }

  think(thought) {
    if (!this.thought.isConnected) this.words.before(this.thought);
    this.thought.lastElementChild.append(thought);
  }

  /** What can be done with a finished reply. */
  offer() {
    const copy = button("copy", "", async () => {
      await copyText(this.text);
      copy.textContent = say("copied");
      setTimeout(() => { copy.textContent = say("copy"); }, 1500);
    });
    const tokens = button("tokens", "", () => {
      const open = tokens.getAttribute("aria-pressed") === "true";
      tokens.setAttribute("aria-pressed", String(!open));
      if (open) this.view.replaceWith(this.words);
      else this.words.replaceWith(this.view = tokenView(this.tokens));
    });
    tokens.setAttribute("aria-pressed", "false");
    this.tools.replaceChildren(copy, ...(this.tokens.length ? [tokens] : []));
  }
}

/** Reads a reply out, sentence by sentence, to those who listen. */
class Reader {
  constructor(name) {
    this.place = document.getElementById("spoken");
    this.place.replaceChildren();
    this.held = `${name}: `;
  }

  push(text) {
    this.held += text;
    if (SENTENCE.test(text)) this.flush();
  }

  flush(more = "") {
    const words = `${this.held} ${more}`.trim();
    if (words) this.place.append(make("p", "", words));
    this.held = "";
  }
}

/** Whether a conversation leaves a model too little room for a reply. */
async function isTight(model, messages, signal) {
  try {
    const { count, max_model_len: context } = await (await ask("tokenize", { model, messages }, signal)).json();
    const reply = Math.min(sampling().max_tokens, Math.floor(context / RESERVED));
    return count + reply > context;
  } catch (error) {
    // The request itself will tell what is wrong; a proxy's page may stand for the count.
    if (error.name === "AbortError" || error instanceof Trouble || error instanceof SyntaxError) return false;
    throw error;
  }
}

/** Copy text; pages that are not served safely have no clipboard, and select instead. */
async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = make("textarea", "unseen");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
