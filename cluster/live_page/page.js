
"use strict";
// Asks for live.json once a second and draws it. Text is only ever set as text: nothing that comes
// from the service is read as HTML.

const POLL_MS = 1000, STALE_S = 4, SPARK_S = 180, MAX_DOTS = 40, DENSE = 8, LINK_Y = 40, MAX_OUTAGES = 4;
const SVG = "http://www.w3.org/2000/svg";
const find = (id) => document.getElementById(id);
let drawn = "";          // which stages the cells were made for
let cells = [];          // by stage
let kept = sessionStorage.getItem("tightfit-token") || "";
let token = kept;

// -- making elements ----------------------------------------------------------------------------

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

function draw(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// -- numbers ------------------------------------------------------------------------------------

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (n >= 1024 && i < units.length - 1) { n /= 1024; i += 1; }
  return `${i === 0 || n >= 100 ? Math.round(n) : n.toFixed(1)} ${units[i]}`;
}

// "28.7 of 76.6 GiB"; the unit twice only where it differs.
function outOf(part, whole) {
  if (!whole) return bytes(part);
  const [value, unit] = bytes(part).split(" "), limit = bytes(whole);
  return limit.endsWith(` ${unit}`) ? `${value} of ${limit}` : `${value} ${unit} of ${limit}`;
}

const count = (n) => Math.round(n).toLocaleString("en");
const rate = (n) => n >= 100 ? count(n) : n.toFixed(1);
const many = (n, one, more) => `${count(n)} ${n === 1 ? one : more}`;
const span = (seconds) => seconds < 120 ? many(Math.max(1, seconds), "second", "seconds") : `${count(seconds / 60)} minutes`;
const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;

// -- tiles --------------------------------------------------------------------------------------

function tile(title, ...rest) {
  const big = make("div", "big");
  return { element: make("div", "tile", make("h2", "", title), big, ...rest), big };
}

function spark() {
  return draw("svg", { class: "spark", viewBox: `0 0 ${SPARK_S} 30`, preserveAspectRatio: "none" },
    draw("path", { class: "area" }), draw("path", {}), draw("path", { class: "second" }), draw("g"));
}

function curve(rows, column, top) {
  return rows.filter((row) => row[0] <= SPARK_S)
    .map((row) => `${(SPARK_S - row[0]).toFixed(1)},${(29 - 27 * row[column] / top).toFixed(2)}`);
}

function drawSpark(element, { history: rows, outages }, first, second) {
  const [area, line, other, lost] = element.children;
  const top = Math.max(1, ...rows.map((row) => Math.max(row[first], second ? row[second] : 0)));
  const points = curve(rows, first, top);
  const whole = points.length ? `M${points.join("L")}` : "";
  line.setAttribute("d", whole);
  if (points.length) {
    const from = points[0].split(",")[0], to = points[points.length - 1].split(",")[0];
    area.setAttribute("d", `${whole}L${to},30L${from},30Z`);
  }
  if (second) other.setAttribute("d", points.length ? `M${curve(rows, second, top).join("L")}` : "");
  const isShown = (outage) => outage.ago_s - outage.took_s < SPARK_S;
  lost.replaceChildren(...outages.filter(isShown).map((outage) => {
    const began = SPARK_S - outage.ago_s, from = Math.max(0, began);
    return draw("rect", { x: from, y: 0, width: began + Math.max(1, outage.took_s) - from, height: 30 });
  }));
}

const part = (kind) => make("i", kind);
const width = (element, share) => { element.style.width = `${100 * Math.max(0, Math.min(1, share))}%`; };

const generated = tile("Tokens generated", spark());
const prompts = tile("Prompt tokens", spark());
const sequences = tile("Sequences", spark());
const kvUsed = part("kv"), kvCached = part("kv-free"), kvNote = make("div", "note");
const kv = tile("KV cache in use", make("div", "bar", kvUsed, kvCached), kvNote);
const prefixShare = part("kv"), prefixNote = make("div", "note");
const prefix = tile("Prefix cache hits", make("div", "bar", prefixShare), prefixNote);

function per(big, value, unit) {
  big.replaceChildren(value, " ", make("small", "", unit));
}

function drawTiles(live) {
  const { load, now } = live;
  per(generated.big, rate(now.generated_per_s), "per second");
  drawSpark(generated.element.lastChild, live, 1);
  per(prompts.big, rate(now.prompt_per_s), "per second");
  drawSpark(prompts.element.lastChild, live, 2);
  sequences.big.replaceChildren(count(load.running), " ", make("small", "", "running"),
    make("small", "", ` ${count(load.waiting)} waiting`));
  drawSpark(sequences.element.lastChild, live, 3, 4);
  const blocks = Math.max(1, load.kv_blocks);
  per(kv.big, percent(load.kv_blocks_used / blocks), "");
  width(kvUsed, load.kv_blocks_used / blocks);
  width(kvCached, load.kv_blocks_cached / blocks);
  say(kvNote, `${count(load.kv_blocks_used)} of ${count(load.kv_blocks)} blocks · `
    + `${count(load.kv_blocks_cached)} cached`);
  const share = load.prompt_tokens ? load.cached_tokens / load.prompt_tokens : 0;
  per(prefix.big, percent(share), "of prompts");
  width(prefixShare, share);
  say(prefixNote, `${count(load.preemptions)} preemptions · ${count(load.generated_tokens)} tokens`);
}

// -- losses of the pipeline ---------------------------------------------------------------------

const BOUNDS = { "about": "", "at most": "less than ", "at least": "more than " };

function outageLine(outage) {
  const at = new Date(1000 * outage.lost_unix_s).toLocaleTimeString("en-GB");
  const took = `${BOUNDS[outage.bound]}${span(outage.took_s)}`;
  const line = make("li", outage.is_over ? "" : "open", make("b", "", at),
    outage.is_over ? `recovered after ${took}` : `lost for ${took}`);
  if (outage.reason) line.append(` · ${outage.reason}`);
  return line;
}

function drawOutages(live) {
  const latest = live.outages.slice(-MAX_OUTAGES).reverse();
  find("outages").hidden = !latest.length;
  find("outages").replaceChildren(...latest.map(outageLine));
}

// -- the pipeline -------------------------------------------------------------------------------

function ring() {
  const length = 2 * Math.PI * 23;
  const on = draw("circle", { class: "on", cx: 27, cy: 27, r: 23, "stroke-dasharray": length, "stroke-dashoffset": length });
  const text = draw("text", { x: 27, y: 24 });
  const element = draw("svg", { class: "ring", viewBox: "0 0 54 54" },
    draw("circle", { cx: 27, cy: 27, r: 23 }), on, text, draw("text", { class: "unit", x: 27, y: 36 }));
  element.lastChild.textContent = "% busy";
  return { element, show(share) {
    on.setAttribute("stroke-dashoffset", length * (1 - share));
    on.style.visibility = share > 0.004 ? "visible" : "hidden";
    say(text, `${Math.round(100 * share)}`);
    element.setAttribute("aria-label", `busy ${percent(share)}`);
  } };
}

function layerStrip(stage, isFirst, isLast) {
  const number = stage.end_layer - stage.first_layer;
  const cap = Math.max(1, number * 0.035), gap = Math.min(0.16, number * 0.006);
  const total = number + (isFirst ? cap : 0) + (isLast ? cap : 0);
  const strip = draw("svg", { class: "layers", viewBox: `0 0 ${total} 10`, preserveAspectRatio: "none", role: "img" });
  const title = draw("title");
  title.textContent = `layers ${stage.first_layer} to ${stage.end_layer - 1}`
    + (isFirst ? ", after the embedding" : "") + (isLast ? ", then the LM head" : "");
  strip.append(title);
  let x = 0;
  const add = (size, className) => {
    strip.append(draw("rect", { x: x + gap / 2, y: 0, width: size - gap, height: 10, class: className }));
    x += size;
  };
  if (isFirst) add(cap, "cap");
  for (let layer = stage.first_layer; layer < stage.end_layer; layer += 1) add(1, layer % 2 ? "odd" : "even");
  if (isLast) add(cap, "cap");
  return strip;
}

function stageCell(stage, number) {
  const isFirst = stage.index === 0, isLast = stage.index === number - 1;
  const busy = ring();
  const name = make("div", "name", make("h2", "", `Stage ${stage.index}`),
    make("span", "chip", stage.device), make("span", "chip", stage.node));
  const last = stage.end_layer - 1;
  const layers = stage.first_layer === last ? `layer ${last}` : `layers ${stage.first_layer}–${last}`;
  const ends = [isFirst && "embedding", layers, isLast && "LM head"].filter(Boolean).join(" · ");
  const bar = ["weights", "kv", "kv-free", "work"].map(part);
  const values = {};
  const list = make("dl", "parts");
  for (const [kind, title] of [["weights", "weights"], ["kv", "KV cache"], ["work", "workspace"],
    ["total", "in all"], ["process", stage.device === "cpu" ? "process" : "allocator"]]) {
    values[kind] = make("dd");
    const what = make("span", "what", title);
    list.append(make("dt", "", make("span", `dot ${kind}`), what), values[kind]);
    values[`${kind}-title`] = what;
  }
  const checked = make("div", "checked");
  const element = make("article", "cell stage", make("div", "top", name, busy.element),
    make("div", "", layerStrip(stage, isFirst, isLast), make("div", "note gap", `${ends} · ${stage.format}`)),
    make("div", "", make("div", "bar", ...bar), list), checked);
  return { element, busy, bar, values, checked };
}

function drawStage(cell, stage, live, scale) {
  const { memory } = stage, { load } = live;
  const used = load.kv_blocks ? load.kv_blocks_used / load.kv_blocks : 0;
  cell.busy.show(stage.busy_share);
  const sizes = [memory.weight_bytes + memory.host_bytes, memory.kv_cache_bytes * used,
    memory.kv_cache_bytes * (1 - used), memory.workspace_bytes];
  sizes.forEach((size, i) => width(cell.bar[i], size / scale));
  say(cell.values.weights, bytes(memory.weight_bytes));
  say(cell.values["kv-title"], `KV, ${stage.kv_format}, ${percent(used)} used`);
  say(cell.values.kv, bytes(memory.kv_cache_bytes));
  say(cell.values.work, bytes(memory.workspace_bytes));
  const whole = outOf(memory.total_bytes, memory.budget_bytes);
  say(cell.values.total, whole);
  say(cell.values.process, bytes(memory.process_bytes));
  const off = memory.predicted_weight_bytes
    ? (memory.weight_bytes - memory.predicted_weight_bytes) / memory.predicted_weight_bytes : 0;
  const mark = make("b", memory.differences.length ? "off" : "",
    `${off >= 0 ? "+" : "−"}${(100 * Math.abs(off)).toFixed(2)} %`);
  cell.checked.title = memory.differences.join("; ");
  if (live.stages.length > DENSE) cell.checked.replaceChildren(whole, make("br"), "weights as planned ", mark);
  else cell.checked.replaceChildren(`predicted ${bytes(memory.predicted_weight_bytes)}, off `, mark);
}

function endCell(title) {
  const queue = draw("svg", { class: "queue" });
  const big = make("div", "big"), note = make("div", "note");
  const unit = make("div", "note");
  return { element: make("article", "cell end", make("h2", "", title), big, unit, queue, note), big, unit, queue, note };
}

const incoming = endCell("Gateway"), outgoing = endCell("Streams");

function dots(svg, kinds) {
  const per = 8, shown = kinds.slice(0, MAX_DOTS);
  svg.setAttribute("viewBox", `0 0 ${per * 10} ${Math.max(1, Math.ceil(shown.length / per)) * 10}`);
  svg.replaceChildren(...shown.map((kind, i) =>
    draw("circle", { cx: 5 + 10 * (i % per), cy: 5 + 10 * Math.floor(i / per), r: 3.4, class: kind })));
}

function drawEnds(live) {
  const { load, now } = live;
  say(incoming.big, count(load.waiting));
  say(incoming.unit, "waiting");
  dots(incoming.queue, Array(Math.min(load.waiting, MAX_DOTS + 1)).fill("wait"));
  say(incoming.note, `${count(load.queued_tokens)} prompt tokens queued`);
  say(outgoing.big, rate(now.generated_per_s));
  say(outgoing.unit, "tokens per second");
  dots(outgoing.queue, Array(Math.min(load.running, MAX_DOTS + 1)).fill("run"));
  say(outgoing.note, `${count(load.running)} running, in ${count(load.in_flight)} micro-batches`);
}

function drawLinks() {
  const frame = find("pipeline").getBoundingClientRect();
  const boxes = [incoming, ...cells, outgoing].map((cell) => cell.element.getBoundingClientRect());
  const lines = [];
  for (let i = 1; i < boxes.length; i += 1) {
    const a = boxes[i - 1], b = boxes[i];
    const x1 = a.right - frame.left, x2 = b.left - frame.left;
    // Gateway and streams are as high as all rows: a line meets them where it comes from.
    const y2 = (i === boxes.length - 1 ? a.top : b.top) - frame.top + LINK_Y;
    const y1 = (i === 1 ? b.top : a.top) - frame.top + LINK_Y;
    if (a.right <= b.left) {
      lines.push(`M${x1},${y1}H${x2}`);
    } else if (a.left === b.left) { // one column: straight down
      lines.push(`M${a.left - frame.left + 42},${a.bottom - frame.top}V${b.top - frame.top}`);
    } else { // on to the next row: out, down between the rows, back, and in
      const middle = (a.bottom + b.top) / 2 - frame.top;
      const out = x1 + 16, back = x2 - 16, r = 8;
      lines.push(`M${x1},${y1}H${out - r}q${r},0 ${r},${r}V${middle - r}q0,${r} ${-r},${r}`
        + `H${back + r}q${-r},0 ${-r},${r}V${y2 - r}q0,${r} ${r},${r}H${x2}`);
    }
  }
  find("links").replaceChildren(...lines.flatMap((d) => [draw("path", { d }), draw("path", { d, class: "dots" })]));
  setPace(pace, true);
}

let pace = 0;
function setPace(tokensPerS, again) {
  const step = tokensPerS > 0 ? Math.max(1, Math.round(2 * Math.log2(1 + tokensPerS))) : 0;
  if (step === pace && !again) return;
  if (!again) pace = step;
  find("links").classList.toggle("still", pace === 0);
  for (const line of find("links").querySelectorAll(".dots"))
    line.style.animationDuration = `${(1.6 / Math.max(1, pace) ** 0.75).toFixed(2)}s`;
}

function drawPipeline(live) {
  const key = JSON.stringify(live.stages.map((s) => [s.index, s.first_layer, s.end_layer, s.format, s.device, s.node]));
  if (key !== drawn) {
    cells = live.stages.map((stage) => stageCell(stage, live.stages.length));
    find("cells").replaceChildren(...cells.map((cell) => cell.element));
    find("cells").style.maxWidth = `${560 * cells.length}px`;
    find("cells").classList.toggle("dense", cells.length > DENSE);
    drawn = key;
  }
  const scale = Math.max(1, ...live.stages.map((s) => s.memory.budget_bytes || s.memory.total_bytes));
  live.stages.forEach((stage, i) => drawStage(cells[i], stage, live, scale));
  drawEnds(live);
  drawLinks();
  setPace(isLost(live) ? 0 : live.now.generated_per_s + live.now.prompt_per_s);
}

// -- the whole ----------------------------------------------------------------------------------

const MOODS = { ok: "ok", idle: "ok", draining: "warn", stalled: "bad", recovering: "busy", failed: "bad" };
const isLost = (live) => live.health === "failed" || live.health === "recovering";

function warn(text, mood) {
  find("banner").hidden = !text;
  find("banner").className = mood || "";
  say(find("banner"), text);
}

function warning(live, isStale) {
  if (live.health === "failed") return `The service has failed: ${live.reason}`;
  if (live.health === "recovering") return `The service is recovering, and requests wait: ${live.reason}`;
  return isStale ? `The stages have not answered for ${Math.round(live.age_s)} s.` : "";
}

function show(live) {
  find("ask").hidden = true;
  if (!live.is_known) return;
  const { model } = live;
  document.title = `${model.name} · Tightfit`;
  say(find("model"), model.name);
  say(find("facts"), `${model.family} · ${model.layers} layers on `
    + `${many(live.stages.length, "stage", "stages")} · ${model.format} · context of ${count(model.context)} tokens`);
  const isStale = live.age_s > STALE_S;
  find("health").className = `pill ${MOODS[live.health] || ""}`;
  say(find("health"), live.health);
  const recoveries = live.recoveries ? ` · ${many(live.recoveries, "recovery", "recoveries")}` : "";
  say(find("age"), `epoch ${live.epoch}${recoveries} · ${isStale ? `${Math.round(live.age_s)} s old` : "live"}`);
  find("main").classList.toggle("stale", isStale || isLost(live));
  find("main").hidden = false;
  warn(warning(live, isStale), MOODS[live.health]);
  drawTiles(live);
  drawOutages(live);
  drawPipeline(live);
}

async function poll() {
  try {
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    const answer = await fetch("live.json", { headers, cache: "no-store", signal: AbortSignal.timeout(5000) });
    if (answer.status === 401) {
      find("ask").hidden = false;
      find("main").hidden = true;
      find("health").className = "pill";
      say(find("health"), "locked");
      warn(token ? "This token is not known here, or was revoked." : "");
      if (token && token === kept) sessionStorage.removeItem("tightfit-token");
      token = kept = "";
      return;
    }
    if (!answer.ok) throw new Error(`it answered ${answer.status}`);
    // A refused token is of no use to the page that is loaded next.
    if (token !== kept) {
      sessionStorage.setItem("tightfit-token", token);
      kept = token;
    }
    show(await answer.json());
  } catch (error) {
    find("main").classList.add("stale");
    find("health").className = "pill bad";
    say(find("health"), "unreachable");
    warn(`The service does not answer: ${error.message}. Trying again.`);
  }
  setTimeout(poll, POLL_MS);
}

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  token = find("token").value.trim();
  find("token").value = "";
  poll();
});

find("in").append(incoming.element);
find("out").append(outgoing.element);
find("tiles").append(...[generated, prompts, sequences, kv, prefix].map((t) => t.element));
for (const [kind, text] of [["weights", "weights, one mark for each layer"], ["kv", "KV cache in use"],
  ["kv-free", "KV cache free or kept for reuse"], ["work", "workspace; embedding and LM head above"]]) {
  find("legend").append(make("span", "", make("span", `key ${kind}`), text));
}
addEventListener("resize", drawLinks);
poll();
