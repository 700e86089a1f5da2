// For models that generate no text: how well texts fit the first line.

import { text } from "./texts.js";
import { authorized, explainFailure } from "./http.js";

const $ = (id) => document.getElementById(id);

// Says what the page is for with such a model; settings of sampling mean nothing to it.
export function showCompare() {
  $("chat-title").dataset.i18n = "compare";
  $("prompt").dataset.i18nPlaceholder = "compareHint";
  $("send").dataset.i18n = "compareSend";
  document.body.dataset.kind = "compare";
}

// The texts, best first, with their scores; throws an Error for the user.
export async function compare(model, input) {
  const [query, ...documents] = input.split("\n").map((line) => line.trim()).filter(Boolean);
  if (!documents.length) throw new Error(text("compareFew"));
  const response = await fetch("v1/rerank", {
    method: "POST", body: JSON.stringify({ model, query, documents }),
    headers: { "Content-Type": "application/json", ...authorized() },
  });
  if (!response.ok) throw new Error(await explainFailure(response));
  const { results } = await response.json();
  return results.map(({ relevance_score: score, document }) => `${score.toFixed(3)}  ${document.text}`);
}
