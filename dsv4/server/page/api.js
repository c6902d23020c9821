// The server: requests with the key if it wants one, answers as they come, and errors in its own words.

import { by } from "./dom.js";

const KEY = "dsv4-api-key"; // in sessionStorage: gone with the tab

export async function models() {
  return (await (await request("v1/models")).json()).data;
}

// The chunks of a streamed answer. Ends with the answer; an error if that did not come to its end.
export async function* stream(body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await request("v1/chat/completions", { method: "POST", body: JSON.stringify(body), headers, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ; ) {
    const { value, done } = await reader.read().catch(lost);
    if (done) lost();
    const lines = (text + value).split("\n");
    text = lines.pop();
    for (const line of lines.filter((line) => line.startsWith("data: "))) {
      const said = line.slice(6);
      if (said === "[DONE]") return;
      const chunk = JSON.parse(said);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

function lost(error) {
  if (error?.name === "AbortError") throw error;
  throw new Error("The connection was lost before the answer had ended.");
}

async function request(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(path, { ...options, headers }).catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Error("The server cannot be reached.");
    });
    if (response.ok) return response;
    const why = await reason(response);
    const given = response.status === 401 && (await askForKey(key && why));
    if (!given) throw new Error(why);
    sessionStorage.setItem(KEY, given);
  }
}

async function reason(response) {
  const said = await response.json().catch(() => null); // what stands between us and the server may speak otherwise
  const after = response.headers.get("Retry-After");
  const message = said?.error?.message ?? response.statusText;
  return `${response.status}: ${message}${after ? ` (try again in ${after} s)` : ""}`;
}

// What the user gives as the key, or null. `wrong` says why the one before did not do.
function askForKey(wrong) {
  const dialog = by("key");
  const field = dialog.querySelector("input");
  by("key-error").textContent = wrong ?? "";
  field.value = dialog.returnValue = "";
  dialog.querySelector("button").onclick = () => dialog.close("");
  dialog.querySelector("form").onsubmit = (event) => {
    event.preventDefault();
    dialog.close(field.value);
  };
  dialog.showModal();
  return new Promise((resolve) => (dialog.onclose = () => resolve(dialog.returnValue || null)));
}
