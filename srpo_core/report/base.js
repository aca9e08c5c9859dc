"use strict";
// What all parts of the page share. Text from a model goes in as text nodes only.

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);

// Characters that are invisible or that reorder text are shown as escapes, as srpo_core/report/escapes.py does it.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}]/gu;
const escapeOf = (character) => {
  const code = character.codePointAt(0).toString(16);
  return code.length <= 2 ? `\\x${code.padStart(2, "0")}` : code.length <= 4 ? `\\u${code.padStart(4, "0")}` : `\\U${code.padStart(8, "0")}`;
};
const escaped = (text) => text.replace(HIDDEN, escapeOf);

function textNodes(text) {
  const nodes = [];
  let from = 0;
  for (const found of text.matchAll(HIDDEN)) {
    if (found.index > from) nodes.push(text.slice(from, found.index));
    const mark = document.createElement("span");
    mark.className = "escape";
    mark.append(escapeOf(found[0]));
    nodes.push(mark);
    from = found.index + found[0].length;
  }
  if (from < text.length || !nodes.length) nodes.push(text.slice(from));
  return nodes;
}

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") node.className = value;
    else if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name === "width") node.style.width = value;
    else if (name === "left") node.style.left = value;
    else if (name === "help") { node.dataset.help = value; if (tag !== "button") node.tabIndex = 0; }
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined) continue;
    node.append(...(typeof child === "string" ? textNodes(child) : [child]));
  }
  return node;
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// A question mark that explains what it stands beside; the text is also its name for screen readers.
const helpMark = (label, text) => el("button", { type: "button", class: "help", help: text, "aria-label": `${label}: ${text}` });

const whole = (value) => value.toLocaleString("en-US");
// With one more decimal where rounding would turn nearly all into all, or a few into none.
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
// What was not recorded is shown as "-": it is neither 0 nor 1.
const known = (name, show) => (name in metrics ? show(metrics[name]) : "-");

// Theme: that of the reader's system, until the button changes it.
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

// The box that explains a figure or a token

let explained = null;

function showTip(node, ...children) {
  hush();
  const tip = at("tooltip");
  tip.replaceChildren(...children);
  tip.hidden = false;
  explained = node;
  placeTip();
}

function placeTip() {
  const tip = at("tooltip"), node = explained;
  const box = node.getClientRects()[0] || node.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left), Math.max(8, innerWidth - tip.offsetWidth - 8));
  const below = box.bottom + 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${below + tip.offsetHeight > innerHeight - 8 ? Math.max(8, box.top - tip.offsetHeight - 8) : below}px`;
}

function hush() {
  at("tooltip").hidden = true;
  if (explained) explained.classList.remove("active");
  explained = null;
}

const helpOf = (event) => (event.target instanceof Element ? event.target.closest("[data-help]") : null);
for (const event of ["mouseover", "focusin", "click"]) {
  document.addEventListener(event, (happened) => { const node = helpOf(happened); if (node) showTip(node, el("div", {}, node.dataset.help)); });
}
// What has the focus stays explained wherever the mouse goes.
document.addEventListener("mouseout", (event) => { const node = helpOf(event); if (node && node === explained && node !== document.activeElement) hush(); });
document.addEventListener("focusout", (event) => { const node = helpOf(event); if (node && node === explained) hush(); });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hush(); });
// What has the focus may itself have been scrolled into view: its box goes along.
addEventListener("scroll", () => { if (explained && explained.dataset.help) { if (explained === document.activeElement) placeTip(); else hush(); } }, { passive: true });
