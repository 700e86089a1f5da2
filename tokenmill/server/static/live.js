// The live view: figures, tokens per second, and the KV blocks as a map.

import { text } from "./texts.js";
import { authorized, explainFailure, readEvents } from "./http.js";

const $ = (id) => document.getElementById(id);
const WINDOW_S = 60;
const FADE_S = 1.5;
const rates = [];
let last = null;
let cells = [];
let evictedAt = [];

// Follows the engine for as long as the page is open.
export async function watchEngine() {
  for (;;) {
    try {
      const response = await fetch("engine/events", { headers: authorized() });
      if (!response.ok) throw new Error(await explainFailure(response));
      for await (const event of readEvents(response)) show(JSON.parse(event));
    } catch (error) {
      $("blocks-note").textContent = text("offline", { why: error.message });
    }
    await new Promise((wake) => setTimeout(wake, 2000));
  }
}

function show(now) {
  if (last && now.generation_tokens < last.generation_tokens) { last = null; evictedAt = []; } // the server is new
  const blocks = expand(now.blocks);
  if (last) {
    noteRate(now);
    noteEvents(now);
    noteEvictions(now, now.num_evictions - last.num_evictions);
  }
  cells = blocks;
  last = now;
  showFigures(now);
  drawChart(now.time_s);
  drawBlocks(now);
}

// "3f2u" becomes fffuu.
function expand(runs) {
  return runs.replace(/(\d+)([a-z])/g, (_, count, kind) => kind.repeat(Number(count)));
}

function noteRate(now) {
  const seconds = now.time_s - last.time_s;
  if (seconds <= 0) return;
  const tokens = now.generation_tokens - last.generation_tokens;
  rates.push({ time: now.time_s, rate: tokens / seconds });
  while (rates.length && rates[0].time < now.time_s - WINDOW_S) rates.shift();
}

function noteEvents(now) {
  for (const [field, message] of [
    ["prefix_cache_hits", "hits"], ["num_preemptions", "preempted"], ["num_evictions", "gaveUp"],
  ]) {
    const count = now[field] - last[field];
    if (count > 0) addEvent(text(message, { n: count }));
  }
}

function addEvent(message) {
  const list = $("events");
  if (list.dataset.empty !== "no") list.replaceChildren();
  list.dataset.empty = "no";
  const time = new Date().toLocaleTimeString();
  list.prepend(Object.assign(document.createElement("li"), { textContent: `${time}  ${message}` }));
  while (list.children.length > 40) list.lastChild.remove();
}

// Remembers when each block lost its content, for the map to show it for a while.
function noteEvictions(now, count) {
  if (count <= 0) return;
  for (const block of now.last_evicted.slice(-count)) evictedAt[block] = now.time_s;
}

function showFigures(now) {
  const recent = rates.slice(-5);
  const rate = recent.reduce((sum, { rate }) => sum + rate, 0) / Math.max(recent.length, 1);
  $("rate").textContent = rate < 10 ? rate.toFixed(1) : Math.round(rate).toLocaleString();
  $("running").textContent = now.num_running;
  $("waiting").textContent = now.num_waiting;
  const percent = (100 * now.num_used_blocks) / Math.max(now.num_blocks, 1);
  $("kv").textContent = `${percent.toFixed(percent < 10 ? 1 : 0)} %`;
  const share = (100 * now.prefix_cache_hits) / Math.max(now.prefix_cache_queries, 1);
  $("hits").textContent = `${share.toFixed(0)} %`;
  $("preemptions").textContent = now.num_preemptions;
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);
}

// Canvas coordinates are CSS pixels, whatever the screen's density.
function prepare(canvas, height) {
  const width = canvas.clientWidth;
  const density = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * density) || canvas.height !== Math.round(height * density)) {
    canvas.width = Math.round(width * density);
    canvas.height = Math.round(height * density);
  }
  const context = canvas.getContext("2d");
  context.setTransform(density, 0, 0, density, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

function drawChart(time) {
  const { context, width, height } = prepare($("chart"), 90);
  const top = Math.max(10, ...rates.map(({ rate }) => rate)) * 1.1;
  context.strokeStyle = color("line");
  context.strokeRect(0.5, 0.5, width - 1, height - 1);
  context.fillStyle = color("muted");
  context.font = "11px system-ui";
  context.fillText(Math.round(top).toLocaleString(), 6, 14);
  context.strokeStyle = color("accent");
  context.lineWidth = 1.5;
  context.beginPath();
  for (const { time: at, rate } of rates) {
    context.lineTo(width * (1 - (time - at) / WINDOW_S), height - 2 - (height - 6) * (rate / top));
  }
  context.stroke();
}

const RANK = { f: 0, c: 1, u: 2, s: 3 };
const NAMES = { f: "free", c: "cached", u: "used", s: "shared" };

// Cells are at least 6 pixels wide; where blocks are more than fit, a cell shows the busiest of a few.
function drawBlocks(now) {
  const { context, width, height } = prepare($("blocks"), 260);
  const fit = (pitch) => Math.max(1, Math.floor(width / pitch)) * Math.floor(height / pitch);
  let pitch = 28;
  while (pitch > 7 && fit(pitch) < cells.length) pitch -= 1;
  const columns = Math.max(1, Math.floor(width / pitch));
  const fitting = fit(pitch);
  const each = Math.max(1, Math.ceil(cells.length / fitting));
  const colors = Object.fromEntries(Object.entries(NAMES).map(([kind, name]) => [kind, color(name)]));
  const evicted = color("evicted");
  for (let cell = 0; cell * each < cells.length; cell += 1) {
    let kind = "f", fresh = 0;
    for (let i = cell * each; i < Math.min((cell + 1) * each, cells.length); i += 1) {
      if (RANK[cells[i]] > RANK[kind]) kind = cells[i];
      fresh = Math.max(fresh, 1 - (now.time_s - (evictedAt[i] ?? -Infinity)) / FADE_S);
    }
    const x = (cell % columns) * pitch, y = Math.floor(cell / columns) * pitch;
    context.fillStyle = colors[kind];
    context.fillRect(x, y, pitch - 1, pitch - 1);
    if (fresh > 0) {
      context.fillStyle = evicted;
      context.globalAlpha = Math.min(1, fresh);
      context.fillRect(x, y, pitch - 1, pitch - 1);
      context.globalAlpha = 1;
    }
  }
  const size = now.block_size;
  $("blocks-note").textContent = each === 1 ? text("cellOne", { size }) : text("cell", { n: each, size });
}
