// Starts the page: language and theme, the chat, and the live view.

import { loadModels, startChat } from "./chat.js";
import { describe } from "./http.js";
import { watchEngine } from "./live.js";
import { otherLanguage, translatePage } from "./texts.js";

const root = document.documentElement;
const prefersDark = window.matchMedia("(prefers-color-scheme: dark)").matches;
root.dataset.theme = localStorage.getItem("theme") || (prefersDark ? "dark" : "light");

document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
});
document.getElementById("language").addEventListener("click", otherLanguage);

async function tryModels() {
  const notice = document.getElementById("notice");
  try {
    await loadModels();
    notice.hidden = true;
  } catch (error) {
    notice.textContent = describe(error);
    notice.hidden = false;
  }
}

translatePage();
startChat();
document.getElementById("api_key").addEventListener("change", tryModels);
tryModels();
watchEngine();
