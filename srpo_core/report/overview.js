// The part of the page that is about all responses.

function drawHeader() {
  const { counts, files } = data;
  const parts = [files.join(", "), plural(counts.responses, "response"), counts.tokens === null ? "" : plural(counts.tokens, "token")];
  if (counts.groups) parts.push(plural(counts.groups, "group"));
  if (counts.steps) parts.push(plural(counts.steps, "step"));
  at("subtitle").append(...textNodes(parts.filter(Boolean).join(" · ")));

  if (counts.malformed) {
    const list = el("ul", {}, data.errors.map((error) => el("li", {}, `${files.length > 1 ? `${error.file}, ` : ""}line ${error.line}: ${error.reason}`)));
    if (counts.malformed > data.errors.length) list.append(el("li", {}, `and ${whole(counts.malformed - data.errors.length)} more`));
    at("notices").append(el("div", { class: "notice bad" }, `${plural(counts.malformed, "line")} could not be read and ${counts.malformed === 1 ? "is" : "are"} left out:`, list));
  }
  const notice = (text) => at("notices").append(el("div", { class: "notice" }, text));
  const lack = (count, what) => { if (count) notice(`${whole(count)} of ${plural(counts.responses, "response")} ${count === 1 ? "has" : "have"} ${what}.`); };
  lack(counts.withoutTokens, "no tokens: figures of tokens, weights and scores are over the others");
  lack(counts.withoutWeights, "neither weights nor scores nor the log-probs of a second view, so that no weights are known");
  if (data.missingImages) notice(data.missingImages);
}

function drawAnswers() {
  if (!data.answers.length) return;
  const words = (sentence) => sentence.split("`").map((part, index) => (index % 2 ? el("code", {}, part) : part));
  at("answers").append(el("dl", {}, data.answers.map(({ question, sentence, measured }) => el("div", { class: measured ? "answer" : "answer open" }, el("dt", {}, question), el("dd", {}, words(sentence))))));
  at("answers").hidden = false;
}

function drawOverview() {
  at("overview").append(...data.figures.map(({ label, value, note, help, warning }) => el("div", { class: warning ? "tile warned" : "tile" },
    el("div", { class: "label" }, label, helpMark(label, help)), el("div", { class: "value" }, value),
    el("div", { class: "note" }, note, warning ? el("div", { class: "warning" }, warning) : null))));
}

function explainHeadings() {
  for (const name of ["shares", "format", "quadrants"]) {
    const heading = at(name).querySelector("h2");
    heading.append(helpMark(heading.textContent, data.help[name]));
  }
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
  const formats = data.formats.map(({ lines, count }) => el("div", { class: "tags" },
    data.formats.length > 1 ? el("div", { class: "muted" }, `in ${plural(count, "response")}:`) : null, lines.map((line) => el("div", {}, line))));
  if (formats.length) at("format").append(el("p", { class: "muted small" }, "Tags that were searched for:"), ...formats);
  if (!broken.length) return at("format").append(el("p", { class: "muted" }, total ? "Every response is well-formed." : "There are no responses."));
  at("format").append(
    el("table", { class: "reasons" }, broken.sort((a, b) => b.count - a.count).map((entry) => el("tr", {},
      el("td", {}, el("button", { type: "button", class: "linklike", on: { click: () => filterBy({ format: entry.reason }) } }, entry.meaning)),
      el("td", { class: "number" }, whole(entry.count)),
      el("td", { class: "number muted" }, percent(entry.count / total, 1))))),
    el("p", { class: "explain" }, "In training each token of a malformed response keeps weight 1, as in GRPO. Click a reason to see such responses."));
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
      el("div", { class: "muted" }, plural(cell.count, "response")), cell.score === null ? null : el("div", { class: "muted" }, `score ${signed(cell.score)} nats`)));
  }
  at("quadrants").append(grid, el("p", { class: "explain" }, `These are the ${plural(total, "response")} with a labeled perception. The score is the mean visual dependency. Click a cell to see such responses.`));
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
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height + 34}`, role: "img", "aria-label": `distribution of ${role} ${kind}s` });
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
  drawing.append(svg("text", { x: width / 2, y: height + 30, "text-anchor": "middle" }, kind === "weight" ? "weight" : "nats"));
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
      const name = kind === "weight" ? `Weights of ${role}` : role === "perception" ? "Visual dependency" : "Perception consistency";
      const noise = kind === "score" && metrics[`noise/${role}/rms`];
      plots.append(el("div", { class: "plot" }, el("h3", {}, name, helpMark(name, data.help[`${kind}/${role}`])),
        el("div", { class: "caption" }, data.histograms[kind][role].count ? `median ${middle}; 90 % are between ${low} and ${high}` : data.histograms[kind][role].tokens ? "not known" : "there are no such tokens"),
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

// Round numbers that divide a range into a few parts.
function ticksOf(low, high, parts) {
  const rough = (high - low) / parts, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, index) => Number(((first + index) * step).toPrecision(12)));
}

function drawCurve({ label, unit, help, values }, step) {
  const seen = values.filter((value) => value !== null);
  if (seen.length < 2) return null;
  const isShare = unit === "share", left = 46, top = 8, width = 330, height = 118, bottom = top + height;
  const name = (value) => (isShare ? `${Number((100 * value).toFixed(1))} %` : Number(value.toPrecision(3)).toString().replace("-", "−"));
  let low = Math.min(...seen), high = Math.max(...seen);
  const room = high > low ? (high - low) * 0.06 : isShare ? 0.05 : Math.max(Math.abs(high) * 0.1, 0.1);
  [low, high] = isShare ? [Math.max(0, low - room), Math.min(1, high + room)] : [low - room, high + room];
  const first = step[0], last = step[step.length - 1];
  const x = (at) => left + ((at - first) / (last - first)) * (width - left - 8);
  const y = (value) => bottom - ((value - low) / (high - low)) * height;
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${bottom + 36}`, role: "img", "aria-label": `${label} by step, from ${name(seen[0])} to ${name(seen[seen.length - 1])}` });
  const marks = [3, 5, 8].map((parts) => ticksOf(low, high, parts)).find((ticks) => ticks.length > 1) || [];
  for (const tick of marks) drawing.append(svg("line", { class: "grid", x1: left, x2: width - 8, y1: y(tick), y2: y(tick) }), svg("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, name(tick)));
  for (const tick of ticksOf(first, last, 4).filter(Number.isInteger)) drawing.append(svg("line", { class: "axis", x1: x(tick), x2: x(tick), y1: bottom, y2: bottom + 4 }), svg("text", { x: x(tick), y: bottom + 16, "text-anchor": "middle" }, whole(tick)));
  drawing.append(svg("line", { class: "axis", x1: left, x2: width - 8, y1: bottom, y2: bottom }), svg("text", { x: (left + width - 8) / 2, y: bottom + 32, "text-anchor": "middle" }, "step"));
  // A step at which nothing is known breaks the line.
  let run = [];
  const flush = () => {
    if (run.length > 1) drawing.append(svg("polyline", { class: "line line-plain", points: run.join(" ") }));
    else if (run.length) drawing.append(svg("circle", { class: "dot", cx: run[0].split(",")[0], cy: run[0].split(",")[1], r: 2 }));
    run = [];
  };
  values.forEach((value, index) => { if (value === null) flush(); else run.push(`${x(step[index]).toFixed(1)},${y(value).toFixed(1)}`); });
  flush();
  return el("div", { class: "plot" }, el("h3", {}, label, helpMark(label, help)),
    el("div", { class: "caption" }, `${unit}; first ${name(seen[0])}, last ${name(seen[seen.length - 1])}`), drawing);
}

function drawTraining() {
  if (!data.training) return;
  const plots = data.training.curves.map((curve) => drawCurve(curve, data.training.step)).filter(Boolean);
  at("training").append(el("div", { class: "plots curves" }, plots));
  at("training").hidden = !plots.length;
}
