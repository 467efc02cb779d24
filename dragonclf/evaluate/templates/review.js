"use strict";
// The page's only state is `history`: what was decided, in order. The last entry of a picture counts, undo takes the last one back.

const { run, classes, items } = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const DELETE = null; // a decision is a label or this; a label that the picture has already means that it is right
const STORE = `dragonclf-review ${run}`;
const MAX_KEYS = 9;
const tiles = [...document.querySelectorAll("#pictures > li")];
const keys = items.map((item) => JSON.stringify([item.uri, item.etag, item.label]));
const indexOf = new Map(keys.map((key, index) => [key, index]));

let history = []; // [index, decision]
let elsewhere = []; // [key, decision] of pictures of the run that this page does not show
let decisions = new Map();
let current = 0;

// Keeping progress

function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(STORE) ?? "[]");
    elsewhere = kept.filter(([key]) => !indexOf.has(key));
    history = kept.filter(([key]) => indexOf.has(key)).map(([key, decision]) => [indexOf.get(key), decision]);
    history = history.filter(([, decision]) => decision === DELETE || classes.includes(decision));
    localStorage.setItem(STORE, JSON.stringify(kept));
  } catch {
    $("unkept").hidden = false;
  }
}

function save() {
  try {
    localStorage.setItem(STORE, JSON.stringify([...elsewhere, ...history.map(([index, it]) => [keys[index], it])]));
  } catch {
    $("unkept").hidden = false;
  }
}

// Deciding

function decide(decision) {
  if (!isVisible(current)) return;
  const decided = current;
  history.push([decided, decision]);
  save();
  render();
  select(nextUndecided(decided));
  say(`Picture ${decided + 1}: ${told(decided)}. ${progress()}`);
}

function keep() {
  decide(items[current].label ?? items[current].predicted);
}

function undo() {
  const last = history.pop();
  if (last === undefined) return say("There is nothing to undo.");
  save();
  render();
  if (!isVisible(last[0])) {
    $("only-label").value = $("only-state").value = "";
    render();
  }
  select(last[0]);
  say(`Picture ${last[0] + 1}: ${decisions.has(last[0]) ? told(last[0]) : "not decided"} again. ${progress()}`);
}

function choicesOf(index) {
  return classes.length <= MAX_KEYS ? classes : items[index].likeliest;
}

function chooseTyped() {
  const typed = $("other").value.trim();
  const matches = (test) => classes.filter((name) => test(name.toLowerCase(), typed.toLowerCase()));
  const found = [
    classes.filter((name) => name === typed), matches((name, text) => name === text),
    matches((name, text) => name.startsWith(text)), matches((name, text) => name.includes(text)),
  ].find((names) => names.length) ?? [];
  if (typed === "" || found.length !== 1) {
    return say(found.length > 1 ? `${found.length} classes match: type more.` : `No class matches “${typed}”.`);
  }
  $("other").value = "";
  decide(found[0]);
}

function isKept(index) {
  return decisions.get(index) === items[index].label;
}

function told(index) {
  const decision = decisions.get(index);
  return decision === DELETE ? "delete" : isKept(index) ? "the label is right" : `becomes ${decision}`;
}

function progress() {
  return `${decisions.size} of ${items.length} decided.`;
}

// Moving

function isVisible(index) {
  return index < tiles.length && !tiles[index].hidden;
}

function visible() {
  return [...tiles.keys()].filter(isVisible);
}

function nextUndecided(index) {
  const open = visible().filter((other) => !decisions.has(other));
  return open.find((other) => other > index) ?? open[0] ?? (isVisible(index) ? index : (visible()[0] ?? index));
}

function move(step) {
  const shown = visible();
  if (!shown.length) return;
  const place = Math.max(0, shown.indexOf(current)) + step;
  select(shown[Math.min(Math.max(place, 0), shown.length - 1)]);
}

function rowStep() {
  const tops = visible().map((index) => tiles[index].offsetTop);
  const count = tops.filter((top) => top === tops[0]).length;
  return isGrid() ? count : 1;
}

function isGrid() {
  return document.body.dataset.view === "grid";
}

function toggleView() {
  document.body.dataset.view = isGrid() ? "one" : "grid";
  render();
  select(current);
}

function select(index, { focus = true } = {}) {
  current = index;
  for (const [other, tile] of tiles.entries()) {
    const figure = tile.firstElementChild;
    figure.tabIndex = other === index ? 0 : -1;
    figure.toggleAttribute("aria-current", other === index);
    tile.classList.toggle("current", other === index);
  }
  renderBar();
  if (!focus || !isVisible(index)) return; // a page that moved under a finger would take the tap for another picture
  const figure = tiles[index].firstElementChild;
  figure.focus({ preventScroll: true });
  figure.scrollIntoView({ block: "nearest" });
}

// Showing

function say(text) {
  $("status").textContent = text;
}

function render() {
  decisions = new Map(history);
  const [label, state] = [$("only-label").value, $("only-state").value];
  for (const [index, tile] of tiles.entries()) {
    const item = items[index];
    const isDecided = decisions.has(index);
    tile.hidden =
      (label !== "" && JSON.parse(label) !== (item.label ?? item.predicted)) ||
      (state !== "" && (state === "decided") !== isDecided);
    tile.dataset.decision = !isDecided ? "" : decisions.get(index) === DELETE ? "delete" : isKept(index) ? "keep" : "relabel";
    tile.querySelector(".decision").textContent = isDecided ? told(index) : "";
  }
  const count = (name) => tiles.filter((tile) => tile.dataset.decision === name).length;
  $("progress").value = decisions.size;
  $("num-decided").textContent = progress();
  $("tally").textContent = `${count("relabel")} relabelled, ${count("delete")} deleted, ${count("keep")} right`;
  $("download").disabled = count("relabel") + count("delete") === 0;
  $("nothing").hidden = visible().length > 0;
  $("done").hidden = decisions.size < items.length;
  $("undo").disabled = history.length === 0;
  $("view").setAttribute("aria-pressed", String(!isGrid()));
  renderBar();
}

function renderBar() {
  const isThere = isVisible(current);
  const item = items[current];
  for (const button of document.querySelectorAll("#bar .decides")) button.disabled = !isThere;
  $("which").textContent = isThere ? `Picture ${current + 1} of ${items.length}` : "No picture";
  $("keep-text").textContent = item.label === null ? `Accept ${item.predicted}` : "Label is right";
  const buttons = $("choices").children;
  for (let place = 0; place < buttons.length; place++) {
    const name = choicesOf(current)[place];
    buttons[place].hidden = name === undefined;
    buttons[place].querySelector("bdi").textContent = name ?? "";
    const decision = decisions.get(current);
    buttons[place].setAttribute("aria-pressed", String(isThere && name !== undefined && decision === name));
  }
}

// The file: RFC 4180

function csv() {
  const quoted = (cell) => (/[",\r\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell);
  const rows = [["uri", "etag", "old", "new", "reason"]];
  for (const [index, { uri, etag, label }] of items.entries()) {
    if (!decisions.has(index) || isKept(index)) continue;
    const decision = decisions.get(index);
    rows.push([uri, etag ?? "", label ?? "", decision ?? "", decision === DELETE ? "delete" : "relabel"]);
  }
  return rows.map((row) => `${row.map(quoted).join(",")}\r\n`).join("");
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  link.download = "corrections.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  say("corrections.csv is saved.");
}

// Keys and clicks

const ACTIONS = {
  d: () => decide(DELETE), k: keep, Enter: keep, u: undo, g: toggleView, "?": () => $("help").showModal(),
  ArrowLeft: () => move(-1), ArrowRight: () => move(1), ArrowUp: () => move(-rowStep()), ArrowDown: () => move(rowStep()),
  "/": () => $("other")?.focus(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  if (event.target.matches("input, select")) {
    if (event.key === "Escape") select(current);
    if (event.key === "Enter" && event.target.id === "other") chooseTyped();
    return;
  }
  if ((event.key === "Enter" || event.key === " ") && event.target.matches("button, a, summary")) return;
  if (event.repeat && !event.key.startsWith("Arrow")) return; // a key that is held decides once
  const place = "123456789".indexOf(event.key);
  const choice = place >= 0 ? choicesOf(current)[place] : undefined;
  if (choice !== undefined) decide(choice);
  else if (Object.hasOwn(ACTIONS, event.key)) ACTIONS[event.key]();
  else return;
  event.preventDefault();
});

$("pictures").addEventListener("pointerdown", (event) => {
  const tile = event.target.closest("#pictures > li");
  if (tile) select(tiles.indexOf(tile), { focus: false });
});
$("pictures").addEventListener("focusin", (event) => {
  const index = tiles.indexOf(event.target.parentElement);
  if (index >= 0 && index !== current) select(index, { focus: false });
});
for (const [place, button] of [...$("choices").children].entries()) {
  button.addEventListener("click", () => decide(choicesOf(current)[place]));
}
const CLICKS = {
  keep, undo, download, delete: () => decide(DELETE), view: toggleView, keys: () => $("help").showModal(),
  before: () => move(-1), after: () => move(1), close: () => $("help").close(), choose: chooseTyped,
};
for (const [id, action] of Object.entries(CLICKS)) $(id)?.addEventListener("click", action);
for (const id of ["only-label", "only-state"]) {
  $(id).addEventListener("change", () => {
    render();
    select(isVisible(current) ? current : (visible()[0] ?? current), { focus: false });
    say(`${visible().length} pictures shown.`);
  });
}

load();
document.body.dataset.view = "grid";
render();
if (decisions.has(0)) select(nextUndecided(0));
else {
  select(0, { focus: false });
  tiles[0].firstElementChild.focus({ preventScroll: true }); // the keys work at once, and the page begins at its top
}
