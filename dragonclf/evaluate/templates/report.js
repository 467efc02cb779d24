"use strict";
(() => {
  const MOST_PICTURES = 24, MOST_NAMED = 200, GRID = 1000, NEVER = 1.001;
  const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array, f8: Float64Array };
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const all = (selector) => [...document.querySelectorAll(selector)];

  function unpacked({ type, base64 }) {
    return new ARRAYS[type](Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0)).buffer);
  }

  // Element with text or children; text is never read as HTML.
  function made(name, attributes, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  const targets = unpacked(data.targets), predicted = unpacked(data.predicted), confidence = unpacked(data.confidence);
  const pictures = new Map(Object.entries(data.pictures).map(([place, source]) => [Number(place), source]));
  for (const image of all("img[data-image]")) pictures.set(Number(image.dataset.image), image.src);

  // Pictures of images

  // As the rest of the page has it: never 0.0 or 100.0 % for a share that is neither.
  function percent(share) {
    if (share > 0 && share < 0.0005) return "<\u00a00.1\u00a0%";
    if (share >= 0.9995 && share < 1) return ">\u00a099.9\u00a0%";
    return `${(100 * share).toFixed(1)}\u00a0%`;
  }

  function pair(name, value, attributes = {}) {
    return made("div", {}, made("dt", {}, name), made("dd", attributes, value));
  }

  function tile(place, prob) {
    const actual = data.classes[targets[place]], label = data.classes[predicted[place]];
    const verdict = targets[place] === predicted[place] ? "right" : "wrong";
    const names = [pair("predicted", made("bdi", {}, label), { class: verdict }), pair("actual", made("bdi", {}, actual))];
    const figures = made("dl", {}, ...names, pair(...prob(place)));
    const uri = made("bdi", { class: "uri" }, data.prefix + data.uris[place]);
    const picture = made("img", { src: pictures.get(place), alt: `Image of ${actual}, predicted as ${label}` });
    return made("li", {}, made("figure", {}, picture, made("figcaption", {}, figures, uri)));
  }

  // `places` of `total` images: some as pictures, the others by name.
  function show(box, places, total, prob) {
    const shown = places.filter((place) => pictures.has(place)).slice(0, MOST_PICTURES);
    const isShown = new Set(shown);
    const named = places.filter((place) => !isShown.has(place)).slice(0, MOST_NAMED);
    const left = total - shown.length - named.length;
    box.replaceChildren();
    if (shown.length) box.append(made("ul", { class: "tiles" }, ...shown.map((place) => tile(place, prob))));
    if (named.length) {
      const lines = named.map((place) => made("li", {}, made("bdi", {}, data.prefix + data.uris[place]), `, ${prob(place).join(" ")}`));
      box.append(made("ul", { class: "uris" }, ...lines));
    }
    if (left > 0) box.append(made("p", { class: "quiet" }, `${left.toLocaleString("en")} more: predictions.parquet holds all.`));
  }

  // Cells of the confusion matrix

  function openCell(button) {
    const { actual, predicted: label, count } = button.dataset;
    const isOpen = button.getAttribute("aria-pressed") === "true";
    for (const other of all(".cell")) other.setAttribute("aria-pressed", "false");
    byId("cell-heading").replaceChildren();
    byId("cell-images").replaceChildren();
    if (isOpen) return;
    button.setAttribute("aria-pressed", "true");
    button.closest(".scroll").after(byId("cell"));
    const images = Number(count) === 1 ? "image" : "images";
    byId("cell-heading").append(
      `${Number(count).toLocaleString("en")} ${images} of `, made("bdi", {}, data.classes[actual]),
      " predicted as ", made("bdi", {}, data.classes[label]));
    const places = [];
    for (let place = 0; place < targets.length; place++) {
      if (targets[place] === Number(actual) && predicted[place] === Number(label)) places.push(place);
    }
    show(byId("cell-images"), places, Number(count), (place) => ["probability", percent(confidence[place])]);
  }

  for (const button of all(".cell")) {
    button.disabled = false;
    button.addEventListener("click", () => openCell(button));
  }

  // Thresholds

  const chosen = data.chosen.map((one) => {
    const at = unpacked(one.at), sums = [one.positives, one.negatives].map((packed) => {
      const counts = unpacked(packed), from = new Float64Array(counts.length + 1);
      for (let i = counts.length - 1; i >= 0; i--) from[i] = from[i + 1] + counts[i];
      return from;
    });
    return { at, positives: sums[0], negatives: sums[1], probs: unpacked(one.probs), start: one.threshold, threshold: one.threshold };
  });
  let current = 0;

  function firstFrom(at, threshold) {
    let low = 0, high = at.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (at[middle] < threshold) low = middle + 1; else high = middle;
    }
    return low;
  }

  function outcome(one, threshold) {
    const first = firstFrom(one.at, threshold);
    const tp = one.positives[first], fp = one.negatives[first];
    return { tp, fp, fn: one.positives[0] - tp, tn: one.negatives[0] - fp };
  }

  function put(id, value, text) {
    byId(id).value = value === null ? "" : String(value);
    byId(id).textContent = value === null ? "–" : text(value);
  }

  function place(slug, x, y) {
    const svg = document.getElementById(slug), marker = svg.querySelector(".marker");
    const [left, top, width, height] = svg.dataset.plot.split(" ").map(Number);
    marker.setAttribute("visibility", x === null || y === null ? "hidden" : "visible");
    marker.setAttribute("cx", left + width * x);
    marker.setAttribute("cy", top + height * (1 - y));
  }

  const share = (part, whole) => (whole ? part / whole : null);
  const decimals = (value) => value.toFixed(3), whole = (value) => value.toLocaleString("en");
  const costs = () => ["cost-fp", "cost-fn"].map((id) => Math.max(0, Number(byId(id).value) || 0));

  function update() {
    const one = chosen[current], { threshold } = one, { tp, fp, fn, tn } = outcome(one, threshold);
    const precision = share(tp, tp + fp), recall = share(tp, tp + fn);
    put("at-precision", precision, decimals);
    put("at-recall", recall, decimals);
    put("at-f1", share(2 * tp, 2 * tp + fp + fn), decimals);
    for (const [id, count] of Object.entries({ tp, fp, fn, tn })) put(`at-${id}`, count, whole);
    byId("threshold-range").value = String(threshold);
    byId("threshold-number").value = String(threshold);
    const index = byId("threshold").dataset.classes.split(" ")[current];
    place(`roc-${index}`, share(fp, fp + tn), recall);
    place(`pr-${index}`, recall, precision);
    const [ofPositive, ofNegative] = costs();
    put("cost", ofPositive * fp + ofNegative * fn, (value) => value.toLocaleString("en"));
    flips(one);
  }

  function flips(one) {
    const [low, high] = [Math.min(0.5, one.threshold), Math.max(0.5, one.threshold)];
    const counts = [low, high].map((threshold) => { const { tp, fp } = outcome(one, threshold); return tp + fp; });
    const total = counts[0] - counts[1], places = [];
    for (let at = 0; at < one.probs.length; at++) if (low <= one.probs[at] && one.probs[at] < high) places.push(at);
    places.sort((a, b) => Math.abs(one.probs[a] - one.threshold) - Math.abs(one.probs[b] - one.threshold));
    put("flips", total, whole);
    show(byId("flip-images"), places, total, (at) => ["probability of the class", percent(one.probs[at])]);
  }

  function move(threshold) {
    if (!Number.isFinite(threshold)) return;
    const within = Math.min(NEVER, Math.max(0, threshold));
    chosen[current].threshold = data.classes.length === 2 ? within : Math.round(within * GRID) / GRID;
    byId("cost-told").hidden = true;
    update();
  }

  // The threshold of least cost; of equals the one nearest to 1/2.
  function cheapest(one) {
    const [ofPositive, ofNegative] = costs();
    let best = { cost: Infinity, threshold: 0.5 };
    for (let i = 0; i <= one.at.length; i++) {
      const threshold = i < one.at.length ? one.at[i] : NEVER;
      const cost = ofPositive * one.negatives[i] + ofNegative * (one.positives[0] - one.positives[i]);
      const isNearer = Math.abs(threshold - 0.5) < Math.abs(best.threshold - 0.5);
      if (cost < best.cost || (cost === best.cost && isNearer)) best = { cost, threshold };
    }
    return best.threshold;
  }

  function choose(number) {
    current = number;
    for (const block of all(".of-class")) block.hidden = Number(block.dataset.number) !== number;
    byId("threshold-reset").textContent = `Back to ${chosen[number].start}`;
    byId("cost-told").hidden = true;
    update();
  }

  if (byId("class-select")) byId("class-select").addEventListener("change", (event) => choose(Number(event.target.value)));
  byId("threshold-range").addEventListener("input", (event) => move(Number(event.target.value)));
  byId("threshold-number").addEventListener("change", (event) => move(event.target.value === "" ? NaN : Number(event.target.value)));
  byId("threshold-reset").addEventListener("click", () => move(chosen[current].start));
  for (const id of ["cost-fp", "cost-fn"]) byId(id).addEventListener("input", update);
  byId("cost-choose").addEventListener("click", () => {
    move(cheapest(chosen[current]));
    byId("cost-told").hidden = false;
  });

  // Galleries

  function filter() {
    const ofClass = byId("filter-class").value, verdict = byId("filter-verdict").value;
    for (const one of all("section.gallery li[data-actual]")) {
      one.hidden = (ofClass !== "" && one.dataset.actual !== ofClass) || (verdict !== "" && one.dataset.verdict !== verdict);
    }
    const left = all("section.gallery li[data-actual]:not([hidden])").length;
    byId("filter-told").textContent = `${whole(left)} pictures shown`;
  }
  for (const id of ["filter-class", "filter-verdict"]) byId(id).addEventListener("change", filter);

  for (const element of all(".scripted")) element.hidden = false;
  for (const element of all(".unscripted")) element.hidden = true;
  choose(0);
  filter();
})();
