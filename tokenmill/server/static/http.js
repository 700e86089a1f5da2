// Requests with the API key, readable failures, and server-sent events over fetch.

import { text } from "./texts.js";

const key = document.getElementById("api_key");
key.value = sessionStorage.getItem("api_key") || "";
key.addEventListener("change", () => sessionStorage.setItem("api_key", key.value));

export function authorized() {
  return key.value ? { Authorization: `Bearer ${key.value}` } : {};
}

export async function explainFailure(response) {
  if (response.status === 401) return text("needKey");
  try {
    const { error } = await response.json();
    return error.message;
  } catch {
    return `HTTP ${response.status}`;
  }
}

// What went wrong, in a sentence: fetch raises a TypeError where it got no answer at all.
export function describe(error) {
  return error instanceof TypeError ? text("unreachable", { why: error.message }) : error.message;
}

// Yields the data of each event. EventSource cannot send an API key.
export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const events = rest.split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
