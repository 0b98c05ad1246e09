// The page itself: its tabs, its settings, and the report.

/** The knobs of sampling: name, default, least, most, step. What stays as it is is not sent. */
const KNOBS = [
  ["temperature", 0.7, 0, 2, 0.1],
  ["top_p", 1, 0, 1, 0.05],
  ["top_k", 0, 0, 1000, 1],
  ["min_p", 0, 0, 1, 0.05],
  ["repetition_penalty", 1, 0.5, 2, 0.05],
  ["presence_penalty", 0, -2, 2, 0.1],
  ["frequency_penalty", 0, -2, 2, 0.1],
  ["max_tokens", 256, 1, 8192, 1],
  ["seed", "", 0, 2 ** 31, 1],
];
const ALWAYS = ["temperature", "max_tokens"]; // here our defaults are not the server's

/** The sampling settings as the API calls them; what is empty or wrong stays as it is. */
function sampling() {
  const chosen = {};
  for (const [name, otherwise] of KNOBS) {
    const input = document.getElementById(name);
    const value = wrong(input) || input.value === "" ? otherwise : Number(input.value);
    if (ALWAYS.includes(name) || value !== otherwise) chosen[name] = value;
  }
  return chosen;
}

/** Whether a knob has no value that can be sent: steps bind the arrows, and whole numbers only. */
function wrong({ validity, step }) {
  const { badInput, rangeUnderflow, rangeOverflow, stepMismatch } = validity;
  return badInput || rangeUnderflow || rangeOverflow || (stepMismatch && step === "1");
}

/** Mark the knobs whose values are wrong. */
function markKnobs() {
  for (const [name] of KNOBS) {
    const input = document.getElementById(name);
    input.setAttribute("aria-invalid", String(wrong(input)));
  }
}

/** The system message, if there is one. */
function instructions() {
  const text = document.getElementById("system").value.trim();
  return text ? [{ role: "system", content: text }] : [];
}

function buildSettings() {
  const form = document.getElementById("settings");
  for (const [name, value, least, most, step] of KNOBS) {
    const knob = make("div", "knob");
    const label = make("label");
    label.htmlFor = name;
    label.dataset.say = name;
    const input = make("input");
    Object.assign(input, { type: "number", id: name, min: least, max: most, step });
    input.setAttribute("value", value); // what a reset goes back to
    const how = make("small");
    how.id = `${name}-how`;
    how.dataset.say = `${name}_how`;
    input.setAttribute("aria-describedby", how.id);
    knob.append(label, input, how);
    document.getElementById("knobs").append(knob);
  }
  const fields = [...form.elements].filter((field) => field.id && field.id !== "key");
  for (const [id, value] of Object.entries(recall("settings", {}))) {
    const field = fields.find((each) => each.id === id);
    if (field) field[field.type === "checkbox" ? "checked" : "value"] = value;
  }
  markKnobs();
  const remember = () => {
    markKnobs();
    keep("settings", Object.fromEntries(
      fields.map((field) => [field.id, field.type === "checkbox" ? field.checked : field.value])));
  };
  form.addEventListener("input", remember);
  form.addEventListener("reset", () => setTimeout(remember));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("keydown", (event) => { if (event.key === "Escape") openSettings(false); });
  document.getElementById("settings-button").addEventListener("click", () => openSettings(form.hidden));
  // A key is kept for as long as the tab is open, and no longer.
  const key = document.getElementById("key");
  key.value = sessionStorage.getItem("instar.key") ?? "";
  key.addEventListener("change", () => { sessionStorage.setItem("instar.key", key.value); fillModels(false); });
}

/** Show the settings or hide them; `field` gets the focus. */
function openSettings(open, field) {
  document.getElementById("settings").hidden = !open;
  const opener = document.getElementById("settings-button");
  opener.setAttribute("aria-expanded", String(open));
  if (open) document.getElementById(field ?? "system").focus();
  else opener.focus();
}

const tabs = [...document.querySelectorAll("[role=tab]")];

function showTab(chosen) {
  for (const tab of tabs) {
    tab.setAttribute("aria-selected", String(tab === chosen));
    tab.tabIndex = tab === chosen ? 0 : -1;
    document.getElementById(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
  }
  keep("tab", chosen.id);
  if (chosen.id === "tab-report") showReport();
}

function buildTabs() {
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => showTab(tab));
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowRight: i + 1, ArrowLeft: i - 1 }[event.key];
      if (to === undefined) return;
      const next = tabs.at(to % tabs.length);
      next.focus();
      showTab(next);
    });
  });
}

/**
 * Ask which models there are, and offer them wherever one is chosen.
 * If `leads`, where a key is wanted the cursor goes to it: not while somebody writes elsewhere.
 */
async function fillModels(leads = true) {
  let names = [];
  try {
    names = await models();
  } catch (error) {
    for (const talk of talks) talk.hello.textContent = error.message;
    if (leads && error.code === "needs_key") openSettings(true, "key");
    return;
  }
  for (const talk of talks) talk.hello.textContent = say("hello");
  for (const panel of document.querySelectorAll("[role=tabpanel]")) {
    panel.querySelectorAll(".model").forEach((select, i) => {
      const before = select.value || recall(`model.${panel.id}.${i}`, "");
      select.replaceChildren(...names.map((name) => new Option(name, name)));
      select.value = names.includes(before) ? before : names[Math.min(i, names.length - 1)];
      select.onchange = () => {
        keep(`model.${panel.id}.${i}`, select.value);
        if (panel.id === "report") showReport();
      };
    });
  }
}

/** Show the report of the chosen model's run, as a page of its own within this one. */
async function showReport() {
  const panel = document.getElementById("report");
  const [note, frame, link] = ["p", "iframe", "a"].map((tag) => panel.querySelector(tag));
  const model = panel.querySelector("select").value;
  note.hidden = false;
  frame.hidden = link.hidden = true;
  note.textContent = say("loading");
  try {
    if (!facts.reports.includes(model)) throw new Trouble(say("no_report"));
    const html = await (await ask(`report?model=${encodeURIComponent(model)}`)).blob();
    URL.revokeObjectURL(frame.src);
    frame.src = link.href = URL.createObjectURL(new Blob([html], { type: "text/html;charset=utf-8" }));
    note.hidden = true;
    frame.hidden = link.hidden = false;
  } catch (error) {
    note.textContent = error.message;
  }
}

const facts = JSON.parse(document.getElementById("facts").textContent);
buildSettings();
const talks = ["chat", "compare"].map((id) => new Talk(document.getElementById(id), facts));
buildTabs();
useLanguage(language);
document.getElementById("language").addEventListener("click", () => useLanguage(language === "zh" ? "en" : "zh"));
fillModels().then(() => showTab(tabs.find((tab) => tab.id === recall("tab")) ?? tabs[0]));
