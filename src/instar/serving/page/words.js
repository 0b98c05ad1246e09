"use strict";
// Every word of the page, in English and Chinese. Elements name what they say: data-say="send".

const WORDS = {
  views: ["Views", "视图"],
  chat: ["Chat", "对话"],
  compare: ["Side by side", "并排比较"],
  report: ["Report", "报告"],
  settings: ["Settings", "设置"],
  stage: ["Stage", "阶段"],
  first: ["First", "第一个"],
  second: ["Second", "第二个"],
  blind: ["Hide which is which until the vote", "投票前不显示名字"],
  download: ["Download", "下载"],
  fresh: ["New", "新对话"],
  open: ["Open by itself", "单独打开"],
  conversation: ["Conversation", "对话内容"],
  hello: ["Say something. Enter sends, Shift+Enter begins a new line.", "说点什么吧。回车发送，Shift+回车换行。"],
  newest: ["↓ Newest", "↓ 最新"],
  message: ["Message", "消息"],
  placeholder: ["Write a message", "写一条消息"],
  send: ["Send", "发送"],
  stop: ["Stop", "停止"],
  system: ["Instructions before the conversation", "对话前的指示"],
  record: ["Record each token's probability", "记录每个词元的概率"],
  key: ["API key, if the server asks for one", "API 密钥（服务器要求时）"],
  reset: ["Back to the beginning", "恢复默认"],
  temperature: ["Temperature", "温度"],
  temperature_how: ["0 takes the likeliest token; more is bolder", "0 总取最可能的词元；越大越大胆"],
  top_p: ["Top p", "Top p"],
  top_p_how: ["Choose among the likeliest that together reach it", "只在累计概率达到它的词元里选"],
  top_k: ["Top k", "Top k"],
  top_k_how: ["Choose among so many; 0 is all", "只在最可能的几个里选；0 为全部"],
  min_p: ["Min p", "Min p"],
  min_p_how: ["Leave out what is so much less likely than the likeliest", "去掉相对太不可能的词元"],
  repetition_penalty: ["Repetition penalty", "重复惩罚"],
  repetition_penalty_how: ["Above 1, said words become less likely", "大于 1 时，说过的词更少出现"],
  presence_penalty: ["Presence penalty", "出现惩罚"],
  presence_penalty_how: ["Taken off whatever the reply holds already", "回答里出现过就扣"],
  frequency_penalty: ["Frequency penalty", "频率惩罚"],
  frequency_penalty_how: ["The same, for every time", "每出现一次扣一次"],
  max_tokens: ["Most tokens", "最多词元"],
  max_tokens_how: ["The longest reply", "回答的最大长度"],
  seed: ["Seed", "随机种子"],
  seed_how: ["The same seed, the same reply; empty for any", "种子相同，回答相同；空为随机"],
  you: ["You", "你"],
  copy: ["Copy", "复制"],
  copied: ["Copied", "已复制"],
  tokens: ["Tokens", "词元"],
  again: ["Again", "重答"],
  thinking: ["Thinking", "思考"],
  likely: ["certain", "确定"],
  unlikely: ["surprising", "意外"],
  choose: ["Choose a token, with the mouse or the arrow keys.", "用鼠标或方向键选一个词元。"],
  stopped: ["Stopped.", "已停止。"],
  length: ["Cut off: the reply is as long as it may be.", "已截断：达到了最大长度。"],
  content_filter: ["The safety filter ended this reply.", "安全过滤器中止了这个回答。"],
  silent: ["The model said nothing.", "模型什么也没说。"],
  forgot: ["The context is full: the oldest exchange is forgotten.", "上下文已满：最早的一轮被忘掉了。"],
  better: ["{} is better", "{}更好"],
  neither: ["Neither: take it back", "都不好：撤回"],
  equal: ["Both say the same; there is nothing to choose.", "两边说的一样，不用选。"],
  go_on: ["Go on", "继续"],
  kept: ["Vote kept: {}", "已记录投票：{}"],
  not_kept: ["This server keeps no votes (start it with --votes FILE).", "服务器没有保存投票（用 --votes 文件 启动）。"],
  choose_first: ["Vote first, then go on.", "请先投票，再继续。"],
  no_report: ["No report lies beside this model. `instar report` writes one.", "这个模型旁边没有报告。用 instar report 写一份。"],
  loading: ["Loading …", "载入中……"],
  unreachable: ["The server cannot be reached. Is it running?", "连不上服务器。它在运行吗？"],
  cut: ["The connection broke before the reply was finished.", "回答还没写完，连接就断了。"],
  needs_key: ["The server wants an API key: write it into the settings.", "服务器需要 API 密钥：请填在设置里。"],
  busy: ["The server is busy. Try again in {} s.", "服务器忙，请过 {} 秒再试。"],
  stopped_by_filter: ["The safety filter stopped this message. {}", "安全过滤器拦下了这条消息。{}"],
  too_long: ["The message is longer than the model's context.", "消息超过了模型的上下文长度。"],
  failed: ["The server answered with an error ({}).", "服务器返回错误（{}）。"],
};

const LANGUAGES = ["en", "zh"];
let language = recall("language", navigator.language.startsWith("zh") ? "zh" : "en");

/** The words called `name`, in the language of the page; `what` stands in the place of {}. */
function say(name, what = "") {
  return WORDS[name][LANGUAGES.indexOf(language)].replace("{}", what);
}

/** Give every element below `root` its words. */
function speak(root = document) {
  for (const [data, put] of [
    ["say", (e, words) => { e.textContent = words; }],
    ["label", (e, words) => e.setAttribute("aria-label", words)],
    ["title", (e, words) => { e.title = words; }],
    ["placeholder", (e, words) => { e.placeholder = words; }],
  ]) {
    for (const element of root.querySelectorAll(`[data-${data}]`)) {
      put(element, say(element.dataset[data], element.dataset.what));
    }
  }
}

/** Change to a language, and remember it. */
function useLanguage(chosen) {
  language = chosen;
  keep("language", chosen);
  document.documentElement.lang = chosen === "zh" ? "zh-CN" : "en";
  const button = document.getElementById("language");
  button.textContent = chosen === "zh" ? "English" : "中文";
  button.lang = chosen === "zh" ? "en" : "zh-CN";
  speak();
}

/** What this browser remembers under a name, or else `otherwise`. */
function recall(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`instar.${name}`)) ?? otherwise;
  } catch {
    return otherwise; // nothing may be stored here, or somebody stored something else
  }
}

function keep(name, value) {
  try {
    localStorage.setItem(`instar.${name}`, JSON.stringify(value));
  } catch { /* then it is forgotten with the page */ }
}

/** A new element: its name, its classes, its words. Words are only ever text, never HTML. */
function make(tag, classes = "", text = "") {
  const element = document.createElement(tag);
  element.className = classes;
  element.textContent = text;
  return element;
}

/** A button that says the words called `name`, with `what` in them. */
function button(name, classes, act, what = "") {
  const element = make("button", classes, say(name, what));
  element.type = "button";
  Object.assign(element.dataset, { say: name, what });
  element.addEventListener("click", act);
  return element;
}
