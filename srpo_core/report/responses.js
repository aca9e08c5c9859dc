// The list of responses, and the one that is selected.

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

// The weights along a response in a few cells. Each cell has the weight of its stretch that differs most from 1.
function strip(row) {
  if (!row.weightShades) return null;
  const cells = Math.min(36, row.weightShades.length), middle = 20;
  return el("div", { class: "strip", "aria-hidden": "true", title: data.help.strip }, Array.from({ length: cells }, (_, cell) => {
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
  map.addEventListener("mouseover", (event) => { const node = event.target.closest(".t"); if (node) explain(row, node); });
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
  showTip(node, el("div", { class: "token" }, JSON.stringify(row.tokens[token])), el("dl", {}, facts.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
  node.classList.add("active");
}

function drawDetail(row) {
  hush();
  const top = el("div", { class: "top" }, el("h3", {}, row.id ? `#${row.index} · ${row.id}` : `#${row.index}`), ...badges(row));
  if (row.perceptionRight !== undefined && row.right !== undefined) top.append(el("span", { class: "badge", help: data.help.quadrants }, QUADRANT[`${Number(row.perceptionRight)}${Number(row.right)}`].toLowerCase()));
  if (row.reward !== undefined) top.append(el("span", { class: "badge number", help: data.help.reward }, `reward ${Number(row.reward.toFixed(3))}`));
  if (row.advantage !== undefined) top.append(el("span", { class: "badge number", help: data.help.advantage }, `advantage ${signed(row.advantage)}`));

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
      !modes.length ? null : el("div", { class: "switch", role: "group", "aria-label": "Color by" }, modes.map((name) => el("button", { type: "button", id: `mode-${name}`, "aria-pressed": String(mode === name), on: { click: () => { mode = name; drawDetail(row); } } }, name === "weight" ? "Weight" : "Score, nats"))),
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
  const fact = (name, value, help) => facts.append(el("span", help ? { help } : {}, `${name} `, el("b", {}, value)));
  fact("tokens", row.length === undefined ? "-" : whole(row.length), data.help.length);
  for (const letter of "PR") {
    const of = (row.weights || []).filter((_, token) => row.roles[token] === letter);
    if (of.length) fact(`${ROLE[letter]} weight`, `${(of.reduce((sum, weight) => sum + weight, 0) / of.length / 1000).toFixed(2)} on average, ${(Math.min(...of) / 1000).toFixed(2)} to ${(Math.max(...of) / 1000).toFixed(2)}`, data.help["role weight"]);
  }
  if (!row.finished) fact("cut off", "yes", data.help["cut off"]);
  if (row.extra) fact("extra", row.extra);
  parts.push(facts);
  at("detail").replaceChildren(...parts);
}

function drawSample() {
  const { shown, total, tooLarge, seed, images, imagesLeftOut, imagesMissing } = data.sample;
  const parts = [shown === total ? `all of the ${plural(total, "response")}` : `a sample of ${whole(shown)} of ${whole(total)}: up to 8 of each kind, the others drawn at random (seed ${seed})`];
  if (tooLarge) parts.push(`${whole(tooLarge)} more were drawn but are left out to keep the page small`);
  if (images || imagesLeftOut || imagesMissing) parts.push(`${plural(images, "image")}${imagesLeftOut ? `; ${whole(imagesLeftOut)} more are left out to keep the page small` : ""}${imagesMissing ? `; ${whole(imagesMissing)} more could not be shown` : ""}`);
  at("sample").textContent = parts.join("; ");
  at("footer").append(
    el("p", {}, `Each figure is over all responses that have what it needs, of ${whole(data.counts.responses)}; "-" means that none has. The list shows ${shown === total ? "all" : "a sample"} of the responses. A kind is a reason to be malformed, or a combination of right and wrong answer and perception.`),
    el("p", {}, `Rule for right answers: ${data.right}.`),
    el("p", {}, `Weights are ${data.weights === "not known" ? data.weights : data.weights === "recorded" ? "the trainer's own" : data.weights === "computed" ? `computed from the recorded log-probs, with ${data.options}` : `the trainer's own where recorded, else computed with ${data.options}`}. Weight 1 is GRPO. Quantiles are exact to 0.3 % of their value.`),
    el("p", {}, `Written by srpo_core ${data.version}.`));
}

drawHeader();
drawAnswers();
drawOverview();
explainHeadings();
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
