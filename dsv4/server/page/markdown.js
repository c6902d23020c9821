// A little Markdown as elements: code, headings, lists, rules, bold, italic. No links and no pictures: what a model writes
// leads nowhere.

import { node } from "./dom.js";

const FENCE = /^\s*(```+|~~~+)\s*([\w+#.-]*)/;
const FENCE_END = /^\s*(```+|~~~+)\s*$/;
const RULE = /^\s*([-*_])(\s*\1){2,}\s*$/;
const HEADING = /^(#{1,6})\s+(.*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)/;
const MARKED = /`([^`]+)`|\*\*([^*]+)\*\*|\*([^*\s](?:[^*]*[^*\s])?)\*/g;

// `text` inside `element`. What is there already and has not changed stays, selections in it too.
export function show(element, text) {
  const wanted = blocks(text);
  wanted.forEach((block, n) => {
    const old = element.children[n];
    const written = JSON.stringify(block);
    if (old?.written === written) return;
    const made = Object.assign(drawn(block), { written });
    if (old) old.replaceWith(made);
    else element.append(made);
  });
  while (element.children.length > wanted.length) element.lastChild.remove();
}

function blocks(text) {
  const found = [];
  let apart = true; // an empty line came before
  for (const line of text.split("\n")) {
    const last = found.at(-1);
    if (last?.fence) {
      if (FENCE_END.exec(line)?.[1].startsWith(last.fence)) last.fence = "";
      else last.lines.push(line);
      continue;
    }
    const [, fence, language] = FENCE.exec(line) ?? [];
    const [, signs, title] = HEADING.exec(line) ?? [];
    const [, indent, mark, item] = ITEM.exec(line) ?? [];
    const goesOn = last && (!apart || /^\s{2}/.test(line));
    if (fence) found.push({ kind: "pre", fence, language, lines: [] });
    else if (RULE.test(line)) found.push({ kind: "hr", lines: [] });
    else if (signs) found.push({ kind: `h${Math.min(6, signs.length + 2)}`, lines: [title] });
    else if (mark) {
      const sameList = last?.kind === "ul" && (indent || numbered(mark) === numbered(last.items[0].mark));
      if (!sameList) found.push({ kind: "ul", items: [] });
      found.at(-1).items.push({ indent: indent.length, mark, lines: [item] });
    } else if (line.trim() && last?.kind === "ul" && goesOn) last.items.at(-1).lines.push(line.trim());
    else if (line.trim() && last?.kind === "p" && !apart) last.lines.push(line);
    else if (line.trim()) found.push({ kind: "p", lines: [line] });
    apart = !line.trim();
  }
  return found;
}

const numbered = (mark) => /\d/.test(mark);

function drawn(block) {
  if (block.kind === "pre") {
    const code = node("code", {}, block.lines.join("\n"));
    const label = block.language ? [node("span", { className: "language" }, block.language)] : [];
    return node("pre", { tabIndex: 0 }, ...label, code); // with a tab stop: it may have to be scrolled
  }
  if (block.kind === "ul") return node("ul", {}, ...block.items.map(listed));
  return node(block.kind, {}, ...inline(block.lines.join("\n")));
}

function listed({ indent, mark, lines }) {
  const made = node("li", {}, ...inline(lines.join("\n")));
  made.style.listStyleType = numbered(mark) ? `"${mark} "` : "disc";
  made.style.marginInlineStart = `${Math.min(8, indent) / 2}em`;
  return made;
}

function inline(text) {
  const out = [];
  let end = 0;
  for (const found of text.matchAll(MARKED)) {
    const [whole, code, bold, italic] = found;
    out.push(text.slice(end, found.index));
    if (code) out.push(node("code", {}, code));
    else out.push(node(bold ? "strong" : "em", {}, ...inline(bold ?? italic)));
    end = found.index + whole.length;
  }
  return [...out, text.slice(end)];
}
