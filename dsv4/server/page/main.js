// A chat with the server that sent this page. No framework and no build step: what is read here is what runs.

import { Answer, digits, why } from "./answer.js";
import { models, stream } from "./api.js";
import { by, node } from "./dom.js";

const talk = by("talk");
const prompt = by("prompt");
const settings = by("settings");
const welcome = by("welcome");

let messages = []; // the conversation as it is sent: with reasoning, so that the server finds the tokens it sampled
let running = null; // what aborts the answer that is coming

// --- a turn ---------------------------------------------------------------------------------------------------------

// Send the conversation with `added` at its end, and show the answer. Whether there was one.
async function turn(added) {
  const answer = new Answer();
  const own = (running = new AbortController());
  const follow = (answer.onDraw = following());
  talk.append(answer.element);
  talk.scrollTop = talk.scrollHeight;
  busy(true);
  const error = await heard(answer, own.signal, [...messages, ...added]);
  if (running !== own) return true; // a new chat has begun
  running = null;
  busy(false);
  const heardNothing = error !== null && answer.empty;
  answer.end(error);
  if (heardNothing) answer.element.replaceWith(why(error));
  else messages.push(...added, answer.message);
  if (answer.message.tool_calls) talk.append(results(answer.message.tool_calls));
  if (!by("model").textContent) introduce(); // at the beginning it could not be asked
  follow();
  return !heardNothing;
}

// Take in all that comes. What ended it before its end, or null.
async function heard(answer, signal, conversation) {
  try {
    for await (const chunk of stream(body(conversation), signal)) answer.push(chunk);
    return null;
  } catch (error) {
    return error;
  }
}

function body(conversation) {
  const { system, thinking, temperature, seed, max_tokens, tools } = Object.fromEntries(new FormData(settings));
  const asked = { messages: conversation, stream: true, stream_options: { include_usage: true } };
  if (system.trim()) asked.messages = [{ role: "system", content: system }, ...conversation];
  if (thinking) asked.reasoning_effort = thinking;
  for (const [name, value] of Object.entries({ temperature, seed, max_tokens })) if (value) asked[name] = Number(value);
  if (tools.trim()) asked.tools = JSON.parse(tools);
  return asked;
}

function busy(is) {
  by("send").hidden = is;
  by("stop").hidden = !is;
}

// What keeps the end in sight, unless somebody has scrolled up to read.
function following() {
  let at = talk.scrollHeight;
  return () => {
    if (at - talk.scrollTop - talk.clientHeight < 60) talk.scrollTop = talk.scrollHeight;
    at = talk.scrollHeight;
  };
}

// --- what a user does -----------------------------------------------------------------------------------------------

async function ask() {
  const text = prompt.value.trim();
  if (!text || running || !settled()) return;
  const said = node("article", { className: "user", ariaLabel: "You" }, text);
  welcome.hidden = true;
  prompt.value = "";
  if (await send([{ role: "user", content: text }], said)) return;
  prompt.value ||= text;
  prompt.focus();
}

// Send `added`, behind what stands in the form for results if there is one: no call may stay without an answer. If
// nobody has heard it, all is as before, and can be sent again.
async function send(added, ...shown) {
  const form = talk.querySelector("form.results");
  const [given, seen] = form?.given() ?? [[], []];
  form?.remove();
  shown.unshift(...seen);
  talk.append(...shown);
  if (await turn([...given, ...added])) return true;
  shown.forEach((one) => one.remove());
  if (form) talk.append(form);
  return false;
}

// A form for what the called tools said, sent when it is submitted or something else is said. `given` has the messages,
// and how they are shown.
function results(calls) {
  const fields = calls.map(() => node("textarea", { rows: 2 }));
  const labels = calls.map((call, n) => node("label", {}, resultOf(call), fields[n]));
  const form = node("form", { className: "results" }, ...labels, node("button", { className: "main" }, "Send"));
  form.given = () => [
    calls.map((call, n) => ({ role: "tool", tool_call_id: call.id, content: fields[n].value })),
    calls.map((call, n) =>
      node("article", { className: "user", ariaLabel: "Result" }, resultOf(call), fields[n].value || "(empty)"),
    ),
  ];
  form.onsubmit = (event) => {
    event.preventDefault();
    if (!running && settled()) send([]);
  };
  fields.forEach(sendsOnEnter);
  return form;
}

const resultOf = (call) => node("span", { className: "of" }, "Result of ", node("code", {}, call.function.name));

function sendsOnEnter(field) {
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // composing: Enter chooses a character
    event.preventDefault();
    field.form.requestSubmit();
  });
}

// Whether the settings can be sent as they are; shows what is wrong if not.
function settled() {
  if (settings.checkValidity()) return true;
  settings.showPopover();
  return settings.reportValidity();
}

function checkTools() {
  const field = settings.elements.tools;
  const error = by("tools-error");
  const wrong = toolsError(field.value.trim());
  field.setCustomValidity(wrong);
  error.textContent = wrong;
  error.hidden = !wrong;
}

function toolsError(text) {
  if (!text) return "";
  try {
    const tools = JSON.parse(text);
    const named = Array.isArray(tools) && tools.every((tool) => typeof tool?.function?.name === "string");
    return named ? "" : 'A list is wanted, of {"type": "function", "function": {"name": …}}.';
  } catch (error) {
    return `This is no JSON: ${error.message}`;
  }
}

function startAgain() {
  running?.abort();
  running = null;
  messages = [];
  talk.replaceChildren(welcome);
  welcome.hidden = false;
  busy(false);
  prompt.focus();
}

// --- the beginning --------------------------------------------------------------------------------------------------

async function introduce() {
  try {
    const [model] = await models();
    by("model").replaceChildren(model.id, node("span", {}, ` · ${digits(model.max_model_len)} tokens`));
    document.title = `${model.id} – dsv4`;
    const [usual, ...others] = model.reasoning_efforts;
    const efforts = others.map((effort) => node("option", { value: effort }, `On, ${effort}`));
    const [on] = settings.elements.thinking.options;
    if (efforts.length) on.textContent = `On, ${usual}`;
    on.after(...efforts);
  } catch (error) {
    talk.append(why(error));
  }
}

by("ask").onsubmit = (event) => {
  event.preventDefault();
  ask();
};
settings.onsubmit = (event) => {
  event.preventDefault();
  settings.hidePopover();
};
settings.elements.tools.oninput = checkTools;
by("stop").onclick = () => running?.abort();
by("new").onclick = startAgain;
sendsOnEnter(prompt);
checkTools(); // a browser may have kept what was in the field
introduce();
