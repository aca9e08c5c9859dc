"use strict";
// Draws the page from the data beside it. Text from a model goes in as text nodes only.

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") node.className = value;
    else if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name === "width") node.style.width = value;
    else if (name === "left") node.style.left = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const whole = (value) => value.toLocaleString("en-US");
// With a decimal more where rounding would turn nearly all into all, or some into none.
const percent = (value, digits = 0) => {
  const rounds = (places) => value > 0 && value < 1 && [0, 100].includes(Number((100 * value).toFixed(places)));
  if (rounds(digits)) digits += 1;
  if (rounds(digits)) return value < 0.5 ? `< ${10 ** -digits} %` : `> ${(100 - 10 ** -digits).toFixed(digits)} %`;
  return `${(100 * value).toFixed(digits)} %`;
};
const signed = (value, digits = 2) => (value < 0 ? "−" : value > 0 ? "+" : "") + Math.abs(value).toFixed(digits);
const plural = (count, noun) => `${whole(count)} ${noun}${count === 1 ? "" : "s"}`;
const ROLE = { P: "perception", R: "reasoning", O: "other" };
const metrics = data.metrics;
// What nothing was recorded of is neither 0 nor 1.
const known = (name, show) => (name in metrics ? show(metrics[name]) : "-");
const share = (name, digits = 0) => known(name, (value) => percent(value, digits));

// Theme: the reader's, until the button says otherwise.
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
let chosenTheme = new URLSearchParams(location.search).get("theme");
function applyTheme() {
  const theme = chosenTheme || (prefersDark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = theme;
  at("theme").textContent = theme === "dark" ? "Light" : "Dark";
}
prefersDark.addEventListener("change", applyTheme);
at("theme").addEventListener("click", () => { chosenTheme = document.documentElement.dataset.theme === "dark" ? "light" : "dark"; applyTheme(); });
applyTheme();

// Overview

function drawHeader() {
  const { counts, files } = data;
  const parts = [files.join(", "), plural(counts.responses, "response"), counts.tokens === null ? "" : plural(counts.tokens, "token")];
  if (counts.groups) parts.push(plural(counts.groups, "group"));
  if (counts.steps) parts.push(plural(counts.steps, "step"));
  at("subtitle").textContent = parts.filter(Boolean).join(" · ");

  if (counts.malformed) {
    const list = el("ul", {}, data.errors.map((error) => el("li", {}, `${files.length > 1 ? `${error.file}, ` : ""}line ${error.line}: ${error.reason}`)));
    if (counts.malformed > data.errors.length) list.append(el("li", {}, `and ${whole(counts.malformed - data.errors.length)} more`));
    at("notices").append(el("div", { class: "notice bad" }, `${plural(counts.malformed, "line")} could not be read and ${counts.malformed === 1 ? "is" : "are"} left out:`, list));
  }
  const lack = (count, what) => { if (count) at("notices").append(el("div", { class: "notice" }, `${plural(count, "response")} of ${whole(counts.responses)} came without ${what}.`)); };
  lack(counts.withoutTokens, "tokens: figures of tokens, weights and scores are over the others");
  lack(counts.withoutWeights, "weights, scores or the log-probs of a second view, so their weights are not known");
}

function drawOverview() {
  const tile = (label, value, note) => el("div", { class: "tile" }, el("div", { class: "label" }, label), el("div", { class: "value" }, value), el("div", { class: "note" }, note));
  const tiles = [];
  tiles.push(tile("Right answers", share("right/fraction"), `${data.right}${data.reward === null ? "" : `; mean reward ${data.reward.toFixed(3)}`}`));
  tiles.push(tile("Well-formed", known("broken/fraction", (broken) => percent(1 - broken)), known("structured/fraction", (value) => `${percent(value)} have weighted tokens`)));
  tiles.push(tile("Credit on perception", share("weight/perception/mass", 1), `by ${share("tokens/perception/fraction", 1)} of the tokens; mean weight ${known("weight/perception/mean", (value) => value.toFixed(2))}`));
  tiles.push(tile("Effective tokens", share("tokens/effective_fraction"), "of the weighted ones; 100 % is GRPO"));
  if ("advantage/cosine" in metrics) tiles.push(tile("Cosine to GRPO", metrics["advantage/cosine"].toFixed(3), "of the token advantages"));
  if (data.counts.silent !== null) tiles.push(tile("Without a signal", percent(data.counts.silent), "of the responses: advantage 0"));
  if ("swap/coverage" in metrics) tiles.push(tile("Swap coverage", percent(metrics["swap/coverage"]), "found another perception"));
  if ("noise/perception/rms" in metrics) tiles.push(tile("Noise floor", `${metrics["noise/perception/rms"].toPrecision(2)}`, `nats; ${share("noise/perception/above")} of perception scores exceed twice that`));
  else tiles.push(tile("Scores clipped", share("score/perception/clipped", 1), `of perception, ${share("score/reasoning/clipped", 1)} of reasoning, at ${data.clip} nats`));
  const { figure, advice, responses } = data.interference;
  if (figure) tiles.push(tile("Interference", figure, responses < data.counts.responses ? `${advice}; on ${plural(responses, "response")}` : advice));
  at("overview").append(...tiles);
}

function drawShares() {
  const bar = (name, measured) => {
    if (measured === null) return el("div", { class: "share" }, el("span", {}, name), el("span", { class: "muted" }, "-"));
    const [perception, reasoning] = measured, shares = { perception, reasoning, other: Math.max(0, 1 - perception - reasoning) };
    return el("div", { class: "share" }, el("span", {}, name), el("div", { class: "bar" }, Object.entries(shares).map(([role, share]) =>
      el("span", { class: `bg-${role}`, width: `${100 * share}%`, title: `${role}: ${percent(share, 1)}` }, share > 0.09 ? percent(share, 1) : ""))));
  };
  at("shares").append(
    bar("Tokens", data.shares.tokens), bar("Weight", data.shares.weights),
    el("div", { class: "key" }, ["perception", "reasoning", "other"].map((role) => el("span", {}, el("i", { class: `bg-${role}` }), role))),
    el("p", { class: "explain" }, "Each response keeps its total credit. Where the lower bar differs from the upper one, the weights moved credit between the roles."));
  if (!data.interference.figure) at("shares").append(el("p", { class: "explain", id: "unmeasured" }, `Whether weights can matter was ${data.interference.advice}.`));
}

function drawFormat() {
  const total = data.counts.judged;
  const broken = data.broken.filter((entry) => entry.count);
  if (!broken.length) return at("format").append(el("p", { class: "muted" }, total ? "Every response is well-formed." : "There are no responses."));
  at("format").append(
    el("table", { class: "reasons" }, broken.sort((a, b) => b.count - a.count).map((entry) => el("tr", {},
      el("td", {}, el("button", { type: "button", class: "linklike", on: { click: () => filterBy({ format: entry.reason }) } }, entry.meaning)),
      el("td", { class: "number" }, whole(entry.count)),
      el("td", { class: "number muted" }, percent(entry.count / total, 1))))),
    el("p", { class: "explain" }, "In training a malformed response keeps weight 1 on every token: plain GRPO. Click a reason to see such responses."));
}

const QUADRANT = { "11": "Grounded", "10": "Bad thinking", "01": "Lucky", "00": "Both wrong" };

function drawQuadrants() {
  if (!data.quadrants) return;
  const total = data.quadrants.reduce((sum, cell) => sum + cell.count, 0);
  const grid = el("div", { class: "grid2" }, el("span", {}), el("span", { class: "head" }, "answer right"), el("span", { class: "head" }, "answer wrong"));
  for (const cell of data.quadrants) {
    if (cell.answer) grid.append(el("span", { class: "head" }, "perception", el("br"), cell.perception ? "right" : "wrong"));
    grid.append(el("button", { type: "button", class: "cell", on: { click: () => filterBy({ answer: cell.answer ? "right" : "wrong", perception: cell.perception ? "right" : "wrong" }) } },
      el("div", { class: "name" }, QUADRANT[`${cell.perception}${cell.answer}`]),
      el("div", { class: "value" }, percent(total ? cell.count / total : 0, 1)),
      el("div", { class: "muted" }, whole(cell.count)), cell.score === null ? null : el("div", { class: "muted" }, `score ${signed(cell.score)}`)));
  }
  at("quadrants").append(grid, el("p", { class: "explain" }, `Of ${plural(total, "response")} with a labeled perception. The score is the mean visual dependency, nats. Click a cell to see such responses.`));
  at("quadrants").hidden = false;
  at("quadrants").parentElement.classList.add("labeled");
}

// Plots

const TICKS = { 0.25: [-0.25, 0, 0.25], 0.5: [-0.5, 0, 0.5], 1: [-1, 0, 1], 1.5: [-1, 0, 1], 2: [-2, -1, 0, 1, 2], 3: [-3, -2, -1, 0, 1, 2, 3], 4: [-4, -2, 0, 2, 4], 6: [-6, -3, 0, 3, 6], 8: [-8, -4, 0, 4, 8] };
const FRACTIONS = { "-1": "½", "-2": "¼", "-3": "⅛" };
const asWeight = (power) => FRACTIONS[power] || (power < 0 ? (2 ** power).toFixed(2) : Number((2 ** power).toFixed(2)).toString());

function histogram(kind, role, noise) {
  const { reach, all, right, wrong } = data.histograms[kind][role];
  const width = 280, height = 104, bars = all.length;
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height + 18}`, role: "img", "aria-label": `distribution of ${role} ${kind}s` });
  const x = (value) => ((value + reach) / (2 * reach)) * width;
  if (noise) drawing.append(svg("rect", { class: "noise", x: x(-Math.min(noise, reach)), width: x(Math.min(noise, reach)) - x(-Math.min(noise, reach)), y: 0, height }));
  const top = Math.max(...all, ...right, ...wrong, 1e-9);
  const y = (share) => height - height * Math.sqrt(share / top);
  const steps = (shares) => shares.map((share, bar) => `${(bar * width / bars).toFixed(1)},${y(share).toFixed(1)} ${((bar + 1) * width / bars).toFixed(1)},${y(share).toFixed(1)}`).join(" ");
  if (all.length) drawing.append(svg("polygon", { class: `fill-${role}`, points: `0,${height} ${steps(all)} ${width},${height}` }));
  for (const [name, shares] of [["wrong", wrong], ["right", right]]) if (shares.length) drawing.append(svg("polyline", { class: `line line-${name}`, points: steps(shares) }));
  drawing.append(svg("line", { class: "axis", x1: 0, x2: width, y1: height, y2: height }), svg("line", { class: "center", x1: x(0), x2: x(0), y1: 0, y2: height }));
  for (const tick of TICKS[reach] || [-reach, 0, reach]) {
    drawing.append(svg("text", { x: x(tick), y: height + 14, "text-anchor": tick <= -reach ? "start" : tick >= reach ? "end" : "middle" }, kind === "weight" ? asWeight(tick) : signed(tick, Number.isInteger(tick) ? 0 : 2)));
  }
  return drawing;
}

function drawDistributions() {
  const card = at("distributions");
  const answers = ["perception", "reasoning"].some((role) => data.histograms.weight[role].right.length || data.histograms.weight[role].wrong.length);
  card.append(el("div", { class: "key" },
    el("span", {}, el("i", { class: "bg-perception" }), "perception"), el("span", {}, el("i", { class: "bg-reasoning" }), "reasoning"),
    answers ? el("span", {}, svgKey("line-right"), "right answers") : null, answers ? el("span", {}, svgKey("line-wrong"), "wrong answers") : null,
    "noise/perception/rms" in metrics ? el("span", {}, el("i", { class: "bg-other" }), "within twice the noise") : null,
    el("span", {}, "height: square root of the share of tokens")));
  const plots = el("div", { class: "plots" });
  const number = (value) => Number(value.toFixed(2)).toString().replace("-", "−");
  for (const kind of ["weight", "score"]) {
    for (const role of ["perception", "reasoning"]) {
      const [low, middle, high] = ["p05", "p50", "p95"].map((name) => known(`${kind}/${role}/${name}`, number));
      const name = kind === "weight" ? `Weights of ${role}` : role === "perception" ? "Visual dependency, nats" : "Perception consistency, nats";
      const noise = kind === "score" && metrics[`noise/${role}/rms`];
      plots.append(el("div", { class: "plot" }, el("h3", {}, name),
        el("div", { class: "caption" }, data.histograms[kind][role].count ? `median ${middle}; 90 % in ${low} to ${high}` : data.histograms[kind][role].tokens ? "not known" : "no such tokens"),
        histogram(kind, role, noise ? 2 * noise : 0)));
    }
  }
  card.append(plots);
}

function svgKey(line) {
  const key = svg("svg", { width: 20, height: 8 }, svg("line", { class: `line ${line}`, x1: 0, x2: 20, y1: 4, y2: 4 }));
  key.style.cssText = "display:inline-block;vertical-align:middle;margin-right:7px";
  return key;
}

function drawTraining() {
  if (!data.steps) return;
  const { step, ...series } = data.steps;
  const plots = el("div", { class: "plots small" });
  for (const [name, values] of Object.entries(series)) {
    const known = values.filter((value) => value !== null);
    if (known.length < 2) continue;
    const width = 260, height = 80;
    const low = Math.min(...known), high = Math.max(...known), span = high - low || 1;
    const x = (index) => ((step[index] - step[0]) / (step[step.length - 1] - step[0])) * width;
    const y = (value) => height - 4 - ((value - low) / span) * (height - 8);
    const drawing = svg("svg", { viewBox: `0 0 ${width} ${height + 18}`, role: "img", "aria-label": `${name} over training` },
      svg("line", { class: "axis", x1: 0, x2: width, y1: height, y2: height }),
      svg("polyline", { class: "line line-plain", points: values.map((value, index) => value === null ? "" : `${x(index).toFixed(1)},${y(value).toFixed(1)}`).join(" ") }),
      svg("text", { x: 0, y: height + 14 }, `step ${step[0]}`), svg("text", { x: width, y: height + 14, "text-anchor": "end" }, String(step[step.length - 1])));
    plots.append(el("div", { class: "plot" }, el("h3", {}, name[0].toUpperCase() + name.slice(1)), el("div", { class: "caption" }, `${known[0].toFixed(3)} → ${known[known.length - 1].toFixed(3)}`), drawing));
  }
  at("training").append(plots);
  at("training").hidden = !plots.childElementCount;
}

// Responses

const rows = data.rows;
rows.forEach((row) => {
  row.text = row.tokens.join("");
  row.lower = [row.text, row.prompt || "", row.id || ""].join("\n").toLowerCase();
  const scored = (row.weights || []).filter((_, token) => row.roles[token] !== "O");
  row.spread = scored.length ? Math.max(...scored) / Math.max(1, Math.min(...scored)) : 1;
});
const filters = { text: "", answer: "", perception: "", format: "", step: "", sort: "index" };
let selected = null;
let mode = "weight";

function drawFilters() {
  const form = at("filters");
  const add = (label, node) => { form.append(el("label", {}, label, node)); };
  const choice = (name, label, options) => add(label, el("select", { id: `filter-${name}`, on: { change: (event) => { filters[name] = event.target.value; drawList(); } } }, options.map(([value, text]) => el("option", { value }, text))));
  add("Search", el("input", { id: "filter-text", type: "search", placeholder: "text or prompt", on: { input: (event) => { filters.text = event.target.value.toLowerCase(); drawList(); } } }));
  if (rows.some((row) => row.right !== undefined)) choice("answer", "Answer", [["", "any"], ["right", "right"], ["wrong", "wrong"]]);
  if (rows.some((row) => row.perceptionRight !== undefined)) choice("perception", "Perception", [["", "any"], ["right", "right"], ["wrong", "wrong"]]);
  const reasons = data.broken.filter((entry) => entry.count).map((entry) => [entry.reason, entry.meaning]);
  if (reasons.length) choice("format", "Format", [["", "any"], ["none", "well-formed"], ...reasons]);
  const steps = [...new Set(rows.map((row) => row.step).filter((step) => step !== undefined))].sort((a, b) => a - b);
  if (steps.length > 1) choice("step", "Step", [["", "any"], ...steps.map((step) => [String(step), String(step)])]);
  choice("sort", "Order", [["index", "as recorded"], ["reward", "reward, highest first"], ["spread", "weights that differ most"], ["advantage", "advantage, largest first"], ["length", "longest first"]]);
  form.append(el("button", { type: "button", id: "filter-reset", on: { click: () => filterBy({}) } }, "Reset"));
  form.addEventListener("submit", (event) => event.preventDefault());
}

function filterBy(wanted) {
  Object.assign(filters, { text: "", answer: "", perception: "", format: "", step: "", sort: filters.sort }, wanted);
  for (const name of Object.keys(filters)) if (at(`filter-${name}`)) at(`filter-${name}`).value = filters[name];
  drawList();
  if (Object.keys(wanted).length) at("responses").scrollIntoView({ block: "start" });
}

const is = (wanted, value) => !wanted || value === (wanted === "right");
const ORDER = {
  index: (a, b) => a.index - b.index,
  reward: (a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity) || a.index - b.index,
  spread: (a, b) => b.spread - a.spread || a.index - b.index,
  advantage: (a, b) => Math.abs(b.advantage ?? 0) - Math.abs(a.advantage ?? 0) || a.index - b.index,
  length: (a, b) => (b.length ?? 0) - (a.length ?? 0) || b.text.length - a.text.length || a.index - b.index,
};

function visible() {
  return rows.filter((row) => (!filters.text || row.lower.includes(filters.text)) && is(filters.answer, row.right) && is(filters.perception, row.perceptionRight)
    && (!filters.format || row.broken === filters.format) && (!filters.step || String(row.step) === filters.step)).sort(ORDER[filters.sort]);
}

function badges(row) {
  const nodes = [];
  if (row.broken !== "none") nodes.push(el("span", { class: "badge broken" }, row.broken.replace("_", " ")));
  if (row.right !== undefined) nodes.push(el("span", { class: `badge ${row.right ? "right" : "wrong"}` }, row.right ? "✓ right" : "✗ wrong"));
  return nodes;
}

// The weights along a response in a few cells, each the strongest of its stretch.
function strip(row) {
  if (!row.weightShades) return null;
  const cells = Math.min(36, row.weightShades.length), middle = 20;
  return el("div", { class: "strip", "aria-hidden": "true" }, Array.from({ length: cells }, (_, cell) => {
    const stretch = row.weightShades.slice(Math.floor(cell * row.weightShades.length / cells), Math.max(1, Math.floor((cell + 1) * row.weightShades.length / cells)));
    return el("span", { class: `h${stretch.reduce((best, shade) => Math.abs(shade - middle) > Math.abs(best - middle) ? shade : best, middle)}` });
  }));
}

function drawList() {
  const shown = visible();
  at("matches").textContent = `${whole(shown.length)} of ${whole(rows.length)} shown`;
  at("list").replaceChildren(...shown.map((row) => el("div", { class: "item", role: "option", id: `item-${row.index}`, "data-index": row.index, "aria-selected": "false", on: { click: () => select(row) } },
    el("div", { class: "top" }, el("span", { class: "index" }, `#${row.index}`), ...badges(row), row.step === undefined ? null : el("span", { class: "muted" }, `step ${row.step}`)),
    el("div", { class: "preview" }, row.text.slice(0, 90)), strip(row))));
  if (!shown.length) at("list").append(el("p", { class: "empty" }, "No response matches."));
  if (shown.length && !shown.includes(selected)) select(shown[0], false);
  mark();
}

function mark() {
  for (const item of at("list").children) if (item.dataset.index) item.setAttribute("aria-selected", String(selected && Number(item.dataset.index) === selected.index));
  if (selected) at("list").setAttribute("aria-activedescendant", `item-${selected.index}`);
}

function select(row, remember = true) {
  selected = row;
  mark();
  drawDetail(row);
  if (remember) history.replaceState(null, "", `#response-${row.index}`);
}

at("list").addEventListener("keydown", (event) => {
  const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!move) return;
  event.preventDefault();
  const shown = visible();
  const next = shown[Math.min(shown.length - 1, Math.max(0, shown.indexOf(selected) + move))];
  if (next) { select(next); at(`item-${next.index}`).scrollIntoView({ block: "nearest" }); }
});

function legend() {
  const ticks = mode === "weight" ? [[0, "≤ ¼"], [0.18, "½"], [0.5, "1"], [0.82, "2"], [1, "≥ 4"]] : [[0, "≤ −5"], [0.28, "−1"], [0.5, "0"], [0.72, "+1"], [1, "≥ +5"]];
  return el("div", { class: "legend" },
    el("div", { class: "ramp" }, Array.from({ length: 41 }, (_, shade) => el("span", { class: `h${shade}` }))),
    el("div", { class: "ticks" }, ticks.map(([place, text]) => el("span", { left: `${100 * place}%` }, text))));
}

function heatMap(row) {
  const shades = (mode === "score" ? row.scoreShades : row.weightShades) || [];
  const map = el("div", { class: "heat", id: "heat", tabindex: "0", "aria-label": "response, colored by " + mode });
  row.tokens.forEach((token, index) => {
    const text = token === "" ? "◌" : token.replace(/\n/g, "↵\n");
    const classes = ["t", `h${shades[index] ?? 20}`, row.roles[index]];
    if (token === "") classes.push("unseen");
    if (row.brokenToken === index) classes.push("fault");
    // A word keeps its box in one piece: the line breaks before its space, not after.
    const word = /^ \S{1,30}$/.test(text);
    if (word) classes.push("word");
    map.append(word ? el("wbr") : "", el("span", { class: classes.join(" "), "data-token": index }, text));
  });
  map.addEventListener("mouseover", (event) => { if (event.target.dataset.token) explain(row, event.target); });
  map.addEventListener("mouseleave", hush);
  map.addEventListener("blur", hush);
  map.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const active = map.querySelector(".active");
    const next = map.querySelectorAll(".t")[Math.min(row.tokens.length - 1, Math.max(0, (active ? Number(active.dataset.token) : -1) + move))];
    if (next) explain(row, next);
  });
  return map;
}

function hush() {
  at("tooltip").hidden = true;
  for (const node of document.querySelectorAll(".t.active")) node.classList.remove("active");
}

const nats = (hundredths) => `${signed(hundredths / 100)} nats`;

function explain(row, node) {
  hush();
  if (row.length === undefined) return;
  const token = Number(node.dataset.token), role = row.roles[token], weight = row.weights && row.weights[token] / 1000;
  const facts = [["role", ROLE[role]], ["weight", row.weights ? `× ${weight.toFixed(3)}` : "-"]];
  const has = (values) => values && role !== "O" && values[token] !== null;
  if (has(row.scores)) facts.push([role === "P" ? "visual dependency" : "perception consistency", nats(row.scores[token])]);
  if (row.logProbs) facts.push(["log-prob", nats(row.logProbs[token])]);
  if (has(row.otherLogProbs)) facts.push([role === "P" ? "with the image corrupted" : "with another perception", nats(row.otherLogProbs[token])]);
  if (row.advantage !== undefined && row.weights) facts.push(["advantage", signed(weight * row.advantage, 3)]);
  const tip = at("tooltip");
  tip.replaceChildren(el("div", { class: "token" }, JSON.stringify(row.tokens[token])), el("dl", {}, facts.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
  tip.hidden = false;
  node.classList.add("active");
  const box = node.getClientRects()[0] || node.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left), innerWidth - tip.offsetWidth - 8);
  const below = box.bottom + 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${below + tip.offsetHeight > innerHeight - 8 ? Math.max(8, box.top - tip.offsetHeight - 8) : below}px`;
}

function drawDetail(row) {
  hush();
  const top = el("div", { class: "top" }, el("h3", {}, row.id ? `#${row.index} · ${row.id}` : `#${row.index}`), ...badges(row));
  if (row.perceptionRight !== undefined && row.right !== undefined) top.append(el("span", { class: "badge" }, QUADRANT[`${Number(row.perceptionRight)}${Number(row.right)}`].toLowerCase()));
  if (row.reward !== undefined) top.append(el("span", { class: "badge number" }, `reward ${Number(row.reward.toFixed(3))}`));
  if (row.advantage !== undefined) top.append(el("span", { class: "badge number" }, `advantage ${signed(row.advantage)}`));

  const places = [];
  if (row.line !== undefined) places.push(`${data.files[row.file]}, line ${row.line}`);
  if (row.step !== undefined) places.push(`step ${row.step}`);
  if (row.group !== undefined) places.push(`group ${row.group}`);
  const meta = el("div", { class: "meta" }, places.join(" · "));
  const mates = row.group === undefined ? [] : rows.filter((other) => other !== row && other.group === row.group && other.step === row.step);
  if (mates.length) meta.append(" · same prompt: ", el("span", { class: "mates" }, mates.map((mate) => el("button", { type: "button", class: "linklike", on: { click: () => select(mate) } }, `#${mate.index}${mate.right === undefined ? "" : mate.right ? " ✓" : " ✗"}`))));

  const parts = [top, meta];
  if (row.prompt) parts.push(el("div", { class: "ask" }, el("b", {}, "Prompt"), row.prompt, row.reference === undefined ? null : el("span", { class: "muted" }, `   (right answer: ${row.reference})`)));
  else if (row.reference !== undefined) parts.push(el("div", { class: "ask" }, el("b", {}, "Right answer"), row.reference));
  if (row.broken !== "none") {
    const entry = data.broken.find((candidate) => candidate.reason === row.broken);
    parts.push(el("p", { class: "verdict" }, `Malformed: ${entry.meaning}${row.brokenToken === undefined ? "" : ", framed below"}.${row.weights ? " Every token keeps weight 1." : ""}`));
  }
  const modes = [row.weights ? "weight" : null, row.scores ? "score" : null].filter(Boolean);
  if (!modes.includes(mode)) mode = modes[0] || "weight";
  parts.push(el("div", { class: "tools" },
    el("div", {},
      el("div", { class: "switch", role: "group", "aria-label": "Color by" }, modes.map((name) => el("button", { type: "button", id: `mode-${name}`, "aria-pressed": String(mode === name), on: { click: () => { mode = name; drawDetail(row); } } }, name === "weight" ? "Weight" : "Score, nats"))),
      el("div", { class: "key" }, el("span", {}, el("i", { class: "thin bg-perception" }), "perception"), el("span", {}, el("i", { class: "thin dotted" }), "reasoning (dotted)"))),
    modes.length ? legend() : el("p", { class: "muted" }, row.length === undefined ? "Tokens are not recorded." : "Weights are not known.")));
  const reading = el("div", { class: "reading" });
  if (row.image) {
    const picture = el("img", { src: data.images[row.image], alt: "the image of this prompt" });
    const fit = () => { picture.className = picture.naturalWidth && picture.naturalWidth < 128 ? "tiny" : ""; };
    picture.addEventListener("load", fit);
    reading.className = "reading pictured";
    reading.append(el("div", {}, picture));
  }
  reading.append(heatMap(row));
  parts.push(reading);

  const facts = el("div", { class: "facts" });
  const fact = (name, value) => facts.append(el("span", {}, `${name} `, el("b", {}, value)));
  fact("tokens", row.length === undefined ? "-" : whole(row.length));
  for (const letter of "PR") {
    const of = (row.weights || []).filter((_, token) => row.roles[token] === letter);
    if (of.length) fact(`${ROLE[letter]} weight`, `${(of.reduce((sum, weight) => sum + weight, 0) / of.length / 1000).toFixed(2)} mean, ${(Math.min(...of) / 1000).toFixed(2)}–${(Math.max(...of) / 1000).toFixed(2)}`);
  }
  if (!row.finished) fact("cut off", "yes");
  if (row.extra) fact("extra", row.extra);
  parts.push(facts);
  at("detail").replaceChildren(...parts);
}

function drawSample() {
  const { shown, total, tooLarge, seed, images, imagesLeftOut, imagesMissing } = data.sample;
  const parts = [shown === total ? `all ${whole(total)}` : `a sample: ${whole(shown)} of ${whole(total)}, up to 8 of each kind and the rest at random (seed ${seed})`];
  if (tooLarge) parts.push(`${whole(tooLarge)} more drawn but left out to keep the page small`);
  if (images || imagesLeftOut || imagesMissing) parts.push(`${plural(images, "image")}${imagesLeftOut ? `, ${whole(imagesLeftOut)} left out to keep the page small` : ""}${imagesMissing ? `, ${whole(imagesMissing)} not found or not readable` : ""}`);
  at("sample").textContent = parts.join("; ");
  at("footer").append(
    el("p", {}, `Figures and distributions are over all of the ${plural(data.counts.responses, "response")} that have what a figure needs, and "-" where none has; the list shows ${shown === total ? "all" : "a sample"} of them. A kind is a reason to be malformed, or a combination of right and wrong answer and perception.`),
    el("p", {}, `Right answers: ${data.right}.`),
    el("p", {}, `Weights are ${data.weights === "not known" ? data.weights : data.weights === "recorded" ? "the trainer's own" : data.weights === "computed" ? `computed from the recorded log-probs, with ${data.options}` : `the trainer's own where recorded, else computed with ${data.options}`}. 1 is GRPO. Quantiles are exact to 0.3 % of their value.`),
    el("p", {}, `Written by srpo_core ${data.version}.`));
}

drawHeader();
drawOverview();
drawShares();
drawFormat();
drawQuadrants();
drawDistributions();
drawTraining();
drawFilters();
drawSample();
drawList();
const wanted = /^#response-(\d+)$/.exec(location.hash);
const linked = wanted && rows.find((row) => row.index === Number(wanted[1]));
if (linked) select(linked);
if (!rows.length) at("detail").append(el("p", { class: "empty" }, "There is nothing to show."));
