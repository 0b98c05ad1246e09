// Replies as their writers mean them: the Markdown that chat models write, made elements.
// Text becomes text, whatever it holds; what is no Markdown stays as it is, line breaks included.

// No run of spaces may be matched in two ways: a model may write sixty thousand of them.
const FENCE = /^ {0,3}(`{3,}|~{3,}) *(?:([\w+#.-]+) *)?$/;
const HEADING = /^(#{1,6}) +/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +)(?=\S)/;
const UNDER_HEADER = /^ *(?:\| *)?:?-+:? *(?:\| *:?-+:? *)*(?:\| *)?$/;
const DEEPEST = 12; // lists in lists

// Of what stands within a line: code, a backslash before a sign, bold, struck, italic, a link with
// words, a bare one. A product such as 3*4*5 and a name such as a_b_c are not italic. Each is bounded
// in length: what is opened again and again, and never closed, must not take for ever to look through.
const INLINE = new RegExp([
  /(?<!`)(?<ticks>`+)(?<code>[^`](?:[^]{0,999}?[^`])?)\k<ticks>(?!`)/,
  /\\(?<sign>[\\`*_{}[\]()#+\-.!~|>])/,
  /\*\*(?=\S)(?<bold>[^]{0,999}?\S)\*\*(?!\*)/,
  /(?<!\w)__(?=\S)(?<bold2>[^]{0,999}?\S)__(?!\w)/,
  /~~(?=\S)(?<struck>[^]{0,999}?\S)~~/,
  /(?<![A-Za-z0-9*])\*(?=[^\s*])(?<italic>[^*]{0,999}[^\s*])\*(?![A-Za-z0-9*])/,
  /(?<!\w)_(?=[^\s_])(?<italic2>[^_]{0,999}[^\s_])_(?!\w)/,
  /\[(?<words>[^\]\n]{1,999})\]\((?<to>https?:\/\/[^\s()]{1,999})\)/,
  /(?<bare>https?:\/\/[^\s<>()[\]"'`，。；：！？、]*[\w/#=&%-])/,
].map((part) => part.source).join("|"), "g");

const SPOKEN = { bold: "strong", bold2: "strong", struck: "del", italic: "em", italic2: "em" };

/**
 * The parts that a text consists of, one below the other.
 *
 * @returns {{kind: string, source: string, lines: string[]}[]} In order; `source` holds all that
 *   the part is made of, so that parts of equal source look the same.
 */
function parts(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) { at++; continue; }
    const kind = kindOf(lines, at);
    const end = endOf(kind, lines, at);
    found.push({ kind, lines: lines.slice(at, end), source: `${kind}\n${lines.slice(at, end).join("\n")}` });
    at = end;
  }
  return found;
}

/** What begins at a line. */
function kindOf(lines, at) {
  const line = lines[at];
  if (FENCE.test(line)) return "code";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  if (ITEM.test(line)) return "list";
  if (line.includes("|") && at + 1 < lines.length && lines[at + 1].includes("|") && UNDER_HEADER.test(lines[at + 1])) return "table";
  return "paragraph";
}

/** The line behind what begins at a line. */
function endOf(kind, lines, at) {
  let end = at + 1;
  const more = (goes) => { while (end < lines.length && goes(lines[end], end)) end++; return end; };
  switch (kind) {
    case "heading": case "rule": return end;
    case "code": {
      const [, fence] = FENCE.exec(lines[at]);
      more((line) => !closes(line, fence));
      return Math.min(end + 1, lines.length);
    }
    case "quote": return more((line) => QUOTE.test(line));
    case "table": return more((line) => line.includes("|"));
    case "list": {
      const { indent, sort } = marker(lines[at]);
      // An empty line is within the list if something of the list follows it.
      const goes = (line) => (marker(line) ? marker(line).indent > indent || marker(line).sort === sort : /^ {2,}/.test(line));
      while (end < lines.length) {
        let next = end;
        while (next < lines.length && !lines[next].trim()) next++;
        if (next === lines.length || !(goes(lines[next]) || (next === end && kindOf(lines, next) === "paragraph"))) break;
        end = next + 1;
      }
      return end;
    }
    default:
      // Of lists with numbers, only one that begins with 1 ends a paragraph: a sentence may go on
      // with 1984.
      return more((line, i) => line.trim() && (kindOf(lines, i) === "paragraph" || marker(line)?.number > 1));
  }
}

/** Whether a line ends the code that a fence began. */
function closes(line, fence) {
  const [, other, word] = FENCE.exec(line) ?? [];
  return Boolean(other?.startsWith(fence)) && !word;
}

/** How a list's item begins: how far in, with which sort of sign, and where its words begin. */
function marker(line) {
  const [whole, indent, sign] = ITEM.exec(line) ?? [];
  if (whole === undefined) return null;
  return { indent: indent.length, sort: /\d/.test(sign) ? sign.at(-1) : sign, number: parseInt(sign), width: whole.length };
}

/** The element of a part that lies so deep in others. */
function drawn({ kind, lines }, deep = 0) {
  switch (kind) {
    case "code": return codeBlock(lines);
    case "heading": {
      const [before, signs] = HEADING.exec(lines[0]);
      const words = unclosed(lines[0].slice(before.length).trimEnd());
      return filled(make(`h${Math.min(6, signs.length + 2)}`), inline(words)); // below the page's own
    }
    case "rule": return make("hr");
    case "quote": return filled(make("blockquote"), markdown(lines.map((line) => line.replace(QUOTE, "")).join("\n"), deep + 1));
    case "list": return list(lines, deep);
    case "table": return table(lines);
    default: return filled(make("p"), inline(lines.join("\n")));
  }
}

/** The words of a heading without the signs that may close it. */
function unclosed(words) {
  let end = words.length;
  while (words[end - 1] === "#") end--;
  return words[end - 1] === " " ? words.slice(0, end).trimEnd() : words;
}

/** The elements of a text; what lies too deep stays as it is. */
function markdown(text, deep = 0) {
  return deep > DEEPEST ? [make("p", "", text)] : parts(text).map((part) => drawn(part, deep));
}

function codeBlock(lines) {
  const [, fence] = FENCE.exec(lines[0]);
  const closed = lines.length > 1 && closes(lines.at(-1), fence);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const block = make("pre");
  block.tabIndex = 0; // it may be wider than the page, and then the arrow keys move it
  block.append(make("code", "", text));
  return block;
}

function list(lines, deep) {
  const first = marker(lines[0]);
  const element = make(first.number >= 0 ? "ol" : "ul");
  if (first.number >= 0) element.start = first.number;
  const items = [];
  let width = 0;
  for (const line of lines) {
    const begins = marker(line);
    if (begins && begins.indent <= first.indent + 1) {
      width = begins.width;
      items.push([line.slice(width)]);
    } else {
      items.at(-1).push(line.replace(new RegExp(`^ {0,${width}}`), ""));
    }
  }
  for (const item of items) {
    const inside = markdown(item.join("\n"), deep + 1);
    // A lone paragraph, or one before an inner list, is the item's own words.
    if (inside[0]?.tagName === "P") inside.splice(0, 1, ...inside[0].childNodes);
    element.append(filled(make("li"), inside));
  }
  return element;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  const sides = cells(lines[1]).map((mark) => (!mark.endsWith(":") ? "" : mark.startsWith(":") ? "center" : "end"));
  const element = make("table");
  lines.forEach((line, i) => {
    if (i === 1) return;
    const row = element.insertRow();
    cells(line).slice(0, sides.length).forEach((cell, column) => {
      const place = filled(make(i ? "td" : "th"), inline(cell));
      place.style.textAlign = sides[column];
      row.append(place);
    });
  });
  const frame = make("div", "wide");
  frame.append(element);
  return frame;
}

/** The nodes of words within a line or a paragraph. */
function inline(text) {
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > from) nodes.push(text.slice(from, match.index));
    nodes.push(piece(match.groups));
    from = match.index + match[0].length;
  }
  if (from < text.length) nodes.push(text.slice(from));
  return nodes;
}

function piece(groups) {
  if (groups.code !== undefined) return make("code", "", groups.code.replace(/^ (.*) $/, "$1"));
  if (groups.sign !== undefined) return groups.sign;
  const address = groups.to ?? groups.bare;
  if (address !== undefined) {
    const link = make("a", "", groups.words ?? address);
    Object.assign(link, { href: address, title: address, target: "_blank", rel: "noopener noreferrer" });
    return link;
  }
  const [name, words] = Object.entries(groups).find(([key, value]) => SPOKEN[key] && value !== undefined);
  return filled(make(SPOKEN[name]), inline(words));
}

function filled(element, nodes) {
  element.append(...nodes);
  return element;
}

/** An element that shows a text that grows: what stays the same is not drawn again. */
class Growing {
  constructor(element) {
    this.element = element;
    this.sources = [];
  }

  show(text) {
    const now = parts(text);
    const same = now.findIndex((part, i) => part.source !== this.sources[i]);
    const kept = same < 0 ? now.length : same;
    while (this.element.childNodes.length > kept) this.element.lastChild.remove();
    this.element.append(...now.slice(kept).map((part) => drawn(part)));
    this.sources = now.map((part) => part.source);
  }
}
