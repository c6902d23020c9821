// One answer on the page, from the first chunk of its stream to the last.

import { node } from "./dom.js";
import { show } from "./markdown.js";

const TOKEN = /"(?:[^"\\]|\\.)*"?|[{}[\],:]|[^\s"{}[\],:]+/gs;

export class Answer {
  message = { role: "assistant", content: "" };
  finish = null;
  #first = 0; // when the first and the last token came
  #last = 0;
  #thought = 0; // how long it thought, in seconds
  #usage = null;
  #seed = null;
  #unparsed = null;
  #frame = 0;

  constructor() {
    this.summary = node("summary", {}, "Thinking");
    this.reasoning = node("p", {});
    this.thinking = node("details", { className: "thinking", hidden: true }, this.summary, this.reasoning);
    this.text = node("div", { className: "text" });
    this.calls = node("div", { className: "calls" });
    this.figures = node("footer", {});
    this.element = node("article", { className: "answer", ariaLabel: "Answer", ariaBusy: "true" });
    this.element.append(this.thinking, this.text, this.calls, this.figures);
    this.summary.onclick = () => (this.touched = true); // from now on whoever reads decides whether it is folded
  }

  get empty() {
    const { content, reasoning_content, tool_calls } = this.message;
    return !content && !reasoning_content && !tool_calls;
  }

  push(chunk) {
    const [choice] = chunk.choices;
    if (choice) this.#take(choice);
    this.#usage = chunk.usage ?? this.#usage;
    this.#seed = chunk.seed ?? this.#seed;
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  #take({ delta, finish_reason, unparsed }) {
    const { message } = this;
    this.finish = finish_reason ?? this.finish;
    this.#unparsed = unparsed ?? this.#unparsed;
    if (!delta.reasoning_content && !delta.content && !delta.tool_calls) return;
    this.#last = performance.now();
    this.#first ||= this.#last;
    if (delta.reasoning_content) {
      message.reasoning_content = (message.reasoning_content ?? "") + delta.reasoning_content;
      this.#thought = (this.#last - this.#first) / 1000;
    }
    message.content += delta.content ?? "";
    for (const { index, function: part, ...rest } of delta.tool_calls ?? []) {
      message.tool_calls ??= [];
      const call = (message.tool_calls[index] ??= { ...rest, function: { name: part.name, arguments: "" } });
      call.function.arguments += part.arguments ?? "";
    }
  }

  // The last that is shown: `error` ended it early, if it did.
  end(error) {
    this.element.ariaBusy = "false";
    this.#draw();
    if (this.#unparsed) {
      const { problems, text } = this.#unparsed;
      this.element.append(remark(`The model broke its own format: ${problems.join("; ")}`, "alert", text));
    }
    if (error) this.element.append(why(error));
    else if (this.finish === "length") this.element.append(remark("Cut off: the limit of tokens was reached.", "status"));
    if (this.finish !== "tool_calls") delete this.message.tool_calls; // half a call is nothing to answer, nor to repeat
    else this.message.content ||= null;
  }

  #draw() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const { content, reasoning_content, tool_calls = [] } = this.message;
    const busy = this.element.ariaBusy === "true";
    const thinking = busy && !content && !tool_calls.length;
    if (reasoning_content) {
      if (!this.touched) this.thinking.open = thinking;
      this.thinking.hidden = false;
      this.reasoning.textContent = reasoning_content.trim();
      const tokens = this.#usage?.completion_tokens_details.reasoning_tokens;
      this.summary.textContent =
        `${thinking ? "Thinking" : "Thought"} for ${this.#thought.toFixed(1)} s` + (tokens ? ` · ${digits(tokens)} tokens` : "");
    }
    show(this.text, content);
    tool_calls.forEach((call, n) => {
      if (!this.calls.children[n]) this.calls.append(card(call));
      this.calls.children[n].querySelector("pre").textContent = pretty(call.function.arguments);
    });
    if (this.#usage) this.figures.replaceChildren(...this.#figures());
    this.onDraw?.();
  }

  #figures() {
    const { completion_tokens: out, prompt_tokens, prompt_tokens_details } = this.#usage;
    const seconds = (this.#last - this.#first) / 1000;
    const rate = seconds > 0 ? `${digits((out - 1) / seconds)} tokens/s` : null;
    const cached = prompt_tokens_details.cached_tokens;
    const before = `prompt ${digits(prompt_tokens)}${cached ? `, ${digits(cached)} cached` : ""}`;
    const shown = [`${digits(out)} tokens`, rate, before, `seed ${this.#seed}`].filter(Boolean);
    return shown.map((figure) => node("span", {}, figure));
  }
}

// Three digits, or all that stand before the point.
export function digits(number) {
  return number.toLocaleString("en", { maximumFractionDigits: number < 10 ? 2 : number < 100 ? 1 : 0 });
}

// Why there is no answer, or no more of it.
export function why(error) {
  return error.name === "AbortError" ? remark("Stopped.", "status") : remark(error.message, "alert");
}

function remark(text, role, code) {
  return node("div", { className: "remark", role }, text, ...(code ? [node("pre", { tabIndex: 0 }, code)] : []));
}

function card(call) {
  const title = node("h3", {}, "Call of ", node("code", {}, call.function.name));
  return node("section", { className: "call" }, title, node("pre", { tabIndex: 0 }));
}

// JSON with one entry a line, also while it is still coming. Numbers keep every digit, which parsing would not.
export function pretty(text) {
  let out = "";
  let depth = 0;
  let opened = false; // just now: an empty object stays on its line
  const line = () => `\n${"  ".repeat(Math.max(0, depth))}`;
  for (const [token] of text.matchAll(TOKEN)) {
    const closes = token === "}" || token === "]";
    if (closes) depth -= 1;
    if (opened !== closes) out += line();
    opened = token === "{" || token === "[";
    if (opened) depth += 1;
    out += token === ":" ? ": " : token;
    if (token === ",") out += line();
  }
  return out;
}
