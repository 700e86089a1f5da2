// What the page says, in each of its languages.

export const TEXTS = {
  en: {
    chat: "Chat", send: "Send", stop: "Stop", clear: "Clear", settings: "Settings",
    system: "System prompt", temperature: "Temperature", repetition: "Repetition penalty",
    maxTokens: "Max tokens", seed: "Seed", random: "random", apiKey: "API key",
    promptHint: "Ask the model something. Enter sends, Shift+Enter starts a new line.",
    empty: "Nothing said yet. The answer appears here as it is computed.",
    engine: "Engine", rate: "Tokens/s", running: "Running", waiting: "Waiting",
    kvUse: "KV blocks in use", hitRate: "Prefix hits", preemptions: "Preemptions",
    blocks: "KV blocks", free: "free", cached: "cached, reusable", used: "in use",
    shared: "shared", evicted: "just given up", events: "What happened",
    noEvents: "Nothing yet.", model: "Model", theme: "Light or dark",
    chartLabel: "Tokens per second over the last minute",
    blocksLabel: "Map of the KV cache, one cell a block",
    cell: "One cell is {n} blocks of {size} tokens.", cellOne: "One cell is one block of {size} tokens.",
    needKey: "The server wants an API key: enter it under Settings.",
    unreachable: "The server does not answer: {why}",
    meta: "{n} tokens, {rate} tok/s, first after {first} ms", stopped: "stopped",
    cut: "cut at the limit of tokens",
    hits: "{n} prompt tokens came from the prefix cache",
    preempted: "{n} sequences were preempted", gaveUp: "{n} cached blocks were given up",
    offline: "no live view: {why}",
    compare: "Compare texts", compareSend: "Compare",
    compareHint: "A line to search with, then a text on each line that follows.",
    compareEmpty: "This model generates no text: it makes embeddings or scores of texts. "
      + "Enter some lines, and see how well each fits the first.",
    compareFew: "Enter at least two lines: one to search with, and a text.",
  },
  zh: {
    chat: "对话", send: "发送", stop: "停止", clear: "清空", settings: "设置",
    system: "系统提示", temperature: "温度", repetition: "重复惩罚",
    maxTokens: "最多 token 数", seed: "随机种子", random: "随机", apiKey: "API 密钥",
    promptHint: "向模型提问。回车发送，Shift+回车换行。",
    empty: "还没有内容。回答会边计算边显示在这里。",
    engine: "引擎", rate: "token/秒", running: "运行中", waiting: "排队",
    kvUse: "KV 块占用", hitRate: "前缀命中", preemptions: "抢占次数",
    blocks: "KV 块", free: "空闲", cached: "已缓存，可复用", used: "使用中",
    shared: "共享", evicted: "刚被淘汰", events: "发生了什么",
    noEvents: "暂无。", model: "模型", theme: "浅色或深色",
    chartLabel: "最近一分钟每秒 token 数", blocksLabel: "KV 缓存地图，每格一个块",
    cell: "每格代表 {n} 个块，每块 {size} 个 token。", cellOne: "每格代表一个块，含 {size} 个 token。",
    needKey: "服务器需要 API 密钥：请在“设置”中填写。",
    unreachable: "服务器没有响应：{why}",
    meta: "{n} 个 token，{rate} token/秒，首个 token {first} 毫秒", stopped: "已停止",
    cut: "达到 token 上限",
    hits: "{n} 个提示 token 来自前缀缓存",
    preempted: "{n} 个序列被抢占", gaveUp: "{n} 个缓存块被淘汰",
    offline: "无法获取实时数据：{why}",
    compare: "比较文本", compareSend: "比较",
    compareHint: "第一行是查询，之后每行一段文本。",
    compareEmpty: "这个模型不生成文本，只为文本计算嵌入或相关分数。请输入几行，看看每行与第一行的相关程度。",
    compareFew: "请至少输入两行：一行查询和一段文本。",
  },
};

let language = localStorage.getItem("language")
  || (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");

export function text(key, values = {}) {
  return TEXTS[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

export function otherLanguage() {
  language = language === "en" ? "zh" : "en";
  localStorage.setItem("language", language);
  translatePage();
}

export function translatePage() {
  document.documentElement.lang = language;
  for (const node of document.querySelectorAll("[data-i18n]")) node.textContent = text(node.dataset.i18n);
  for (const node of document.querySelectorAll("[data-i18n-placeholder]")) {
    node.placeholder = text(node.dataset.i18nPlaceholder);
  }
  for (const node of document.querySelectorAll("[data-i18n-label]")) {
    node.setAttribute("aria-label", text(node.dataset.i18nLabel));
    node.title = text(node.dataset.i18nLabel);
  }
  const button = document.getElementById("language");
  button.textContent = language === "en" ? "中文" : "English";
  button.lang = language === "en" ? "zh" : "en";
}
