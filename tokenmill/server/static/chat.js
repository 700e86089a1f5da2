// The conversation: sends it whole with every turn, and shows the answer as it streams in.

import { compare, showCompare } from "./compare.js";
import { text, translatePage } from "./texts.js";
import { authorized, describe, explainFailure, readEvents } from "./http.js";

const $ = (id) => document.getElementById(id);
const history = [];
let abort = null;
let isChat = true;

export function startChat() {
  showEmpty();
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("prompt").addEventListener("keydown", (event) => {
    if (isChat && event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  $("stop").addEventListener("click", () => abort?.abort());
  $("clear").addEventListener("click", clear);
}

export async function loadModels() {
  const response = await fetch("v1/models", { headers: authorized() });
  if (!response.ok) throw new Error(await explainFailure(response));
  const { data } = await response.json();
  $("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
  isChat = data[0].capabilities.includes("completion");
  if (isChat) return;
  showCompare();
  translatePage();
  if (!history.length) showEmpty();
}

function clear() {
  abort?.abort();
  history.length = 0;
  showEmpty();
  $("speed").textContent = "";
}

function showEmpty() {
  const note = Object.assign(document.createElement("p"), { className: "empty" });
  note.dataset.i18n = isChat ? "empty" : "compareEmpty";
  note.textContent = text(note.dataset.i18n);
  $("messages").replaceChildren(note);
}

function addMessage(role, content) {
  if (!history.length) $("messages").replaceChildren();
  const node = Object.assign(document.createElement("div"), { className: `message ${role}` });
  const body = Object.assign(document.createElement("span"), { textContent: content });
  node.append(body);
  $("messages").append(node);
  node.scrollIntoView({ block: "end" });
  return { node, body };
}

function notice(message) {
  $("notice").textContent = message;
  $("notice").hidden = !message;
}

function requestBody() {
  const system = $("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...history] : [...history];
  const body = {
    model: $("model").value, messages, stream: true, stream_options: { include_usage: true },
  };
  for (const name of ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"]) {
    const value = $(name).value;
    if (value !== "" && $(name).checkValidity()) body[name] = Number(value);
  }
  return body;
}

async function send() {
  const prompt = $("prompt").value.trim();
  if (!prompt || abort) return;
  notice("");
  if (!isChat) return sendTexts(prompt);
  addMessage("user", prompt);
  history.push({ role: "user", content: prompt });
  $("prompt").value = "";
  const answer = addMessage("assistant", "");
  answer.node.classList.add("pending");
  abort = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  try {
    await stream(answer, abort.signal);
  } catch (error) {
    if (error.name !== "AbortError") notice(describe(error));
    else addMeta(answer.node, text("stopped"));
  } finally {
    answer.node.classList.remove("pending");
    const said = answer.body.textContent;
    if (said) history.push({ role: "assistant", content: said });
    else { history.pop(); answer.node.remove(); $("prompt").value = prompt; }
    abort = null;
    $("send").disabled = false;
    $("stop").disabled = true;
  }
}

async function sendTexts(input) {
  try {
    const lines = await compare($("model").value, input);
    addMessage("user", input);
    history.push({ role: "user", content: input });
    for (const line of lines) addMessage("assistant", line);
  } catch (error) {
    notice(describe(error));
  }
}

async function stream(answer, signal) {
  const started = performance.now();
  const response = await fetch("v1/chat/completions", {
    method: "POST", signal, body: JSON.stringify(requestBody()),
    headers: { "Content-Type": "application/json", ...authorized() },
  });
  if (!response.ok) throw new Error(await explainFailure(response));
  let first = 0, usage = null, reason = "";
  for await (const event of readEvents(response)) {
    if (event === "[DONE]") break;
    const chunk = JSON.parse(event);
    if (chunk.error) throw new Error(chunk.error.message);
    usage = chunk.usage || usage;
    const choice = chunk.choices[0];
    if (!choice) continue;
    reason = choice.finish_reason || reason;
    if (!choice.delta.content) continue;
    first ||= performance.now();
    const log = $("messages");
    const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    answer.body.append(choice.delta.content);
    if (isAtEnd) log.scrollTop = log.scrollHeight;
  }
  const seconds = (performance.now() - first) / 1000;
  const count = usage ? usage.completion_tokens : 0;
  const meta = text("meta", {
    n: count, rate: (Math.max(count - 1, 0) / Math.max(seconds, 1e-3)).toFixed(1),
    first: Math.round(first - started),
  });
  addMeta(answer.node, reason === "length" ? `${meta}, ${text("cut")}` : meta);
  $("speed").textContent = meta;
}

function addMeta(node, content) {
  node.append(Object.assign(document.createElement("small"), { className: "meta", textContent: content }));
}
