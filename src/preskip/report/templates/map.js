// The bypass map: unpacks the numbers, shows a text shaded by one layer or as a heat map of all, answers to pointer and keys.
(function () {
  "use strict";
  const id = (name) => document.getElementById(name), { make } = preskip;
  const map = JSON.parse(id("map").textContent);
  const layers = map.layers.length;
  const NONE = -128;
  const NAMES = { bypass: "‖skip‖ / ‖attention output‖", enrichment: "‖x̃ − x̂‖ / ‖x̂‖" };
  const SIGNS = { "\n": "⏎", "\t": "⇥", "\r": "␍" };
  const measures = {}; // key → every value, by document, layer, token
  const first = []; // where a document's values begin
  let total = 0;
  for (const text of map.documents) { first.push(total); total += text.tokens.length * layers; }

  const state = { text: 0, measure: Object.keys(map.measures)[0], layer: Number(id("map-layer").value), view: "text", part: -1, token: 0, own: false, match: -1, matches: [] };
  const text = () => map.documents[state.text];
  const at = (measure, token, layer) => measures[measure][first[state.text] + layer * text().tokens.length + token];
  const shown = (value) => (value === null ? "not measured" : String(value));

  async function unpack(packed) {
    const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const planes = new Uint8Array(await new Response(stream).arrayBuffer());
    const exponents = new Int8Array(planes.buffer, 2 * total, total);
    const values = new Array(total);
    for (let i = 0; i < total; i += 1) {
      const mantissa = planes[i] + 256 * planes[total + i];
      const exponent = exponents[i];
      // Division by a power of ten is rounded once: the same double as JSON reads.
      if (exponent === NONE) values[i] = null;
      else if (exponent < -22) values[i] = Number(mantissa + "e" + exponent);
      else values[i] = exponent < 0 ? mantissa / 10 ** -exponent : mantissa * 10 ** exponent;
    }
    return values;
  }

  // ---- the part of the text that is shown: all of it, or one sentence
  function range() {
    const { tokens, sentences } = text();
    return state.part < 0 ? [0, tokens.length] : [sentences[state.part], sentences[state.part + 1] ?? tokens.length];
  }
  const visible = (token) => token.replace(/[\n\t\r]/g, (sign) => SIGNS[sign]) || "∅";
  const spoken = (token) => visible(token).replace(/ /g, "␣");

  // ---- shades: from 0 to the value that 98 % of a layer's tokens do not exceed, or to the largest of these
  const caps = {};
  function layerCap(layer) {
    const key = state.measure + layer;
    if (!(key in caps)) {
      const values = map.documents.flatMap((entry, i) => measures[state.measure].slice(first[i] + layer * entry.tokens.length, first[i] + (layer + 1) * entry.tokens.length));
      const sorted = Float64Array.from(values.filter((value) => value !== null)).sort();
      caps[key] = sorted.length ? sorted[Math.floor(0.98 * (sorted.length - 1))] || sorted[sorted.length - 1] : 0;
    }
    return caps[key];
  }
  const capText = (each) => "≥ " + (each ? "each layer’s 98 %" : Number(cap().toPrecision(3)));
  const cap = (layer = state.layer) => (state.own ? layerCap(layer) : Math.max(...map.layers.map((_, i) => layerCap(i)))) || 1;
  const ramps = {}; // behind words pale enough to read them, in the heat map over the whole range
  function colours(kind) {
    const style = getComputedStyle(document.documentElement);
    const stops = [0, 1, 2, 3].map((n) => style.getPropertyValue(`--${kind}-${n}`).trim()).map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
    ramps[kind] = Array.from({ length: 256 }, (_, i) => {
      const place = (i / 255) * 3, low = Math.min(2, Math.floor(place)), part = place - low;
      return stops[low].map((channel, k) => Math.round(channel + part * (stops[low + 1][k] - channel)));
    });
  }
  const recolour = () => { colours("ramp"); colours("heat"); };
  const shade = (value, limit, kind) => ramps[kind][Math.round(255 * Math.min(1, value / limit))];

  // ---- the text
  const words = id("map-text");
  let spans = [];
  function write() {
    const [from, to] = range();
    const marked = new Set();
    for (const match of state.matches) if (match.text === state.text) for (let i = match.from; i < match.to; i += 1) marked.add(i);
    const now = state.matches[state.match];
    spans = [];
    const made = document.createDocumentFragment();
    for (let i = from; i < to; i += 1) {
      const span = document.createElement("span");
      const token = text().tokens[i];
      span.textContent = token.replace(/\r/g, SIGNS["\r"]).replace(/\t/g, "⇥\t").replace(/\n+/, (lines) => "⏎" + lines.slice(0, 2)) || "∅";
      span.setAttribute("role", "option");
      span.dataset.token = i;
      if (marked.has(i)) span.classList.add("hit");
      if (now && now.text === state.text && i >= now.from && i < now.to) span.classList.add("current");
      name(span, token);
      spans.push(span);
      made.append(span);
    }
    words.replaceChildren(made);
  }
  function name(span, token) { // a blank token has no name of its own
    if (token.trim()) span.removeAttribute("aria-label");
    else span.setAttribute("aria-label", spoken(token));
  }
  function paint() {
    const [from] = range();
    const limit = cap();
    spans.forEach((span, i) => {
      const value = at(state.measure, from + i, state.layer);
      span.style.backgroundColor = value === null ? "" : "rgb(" + shade(value, limit, "ramp").join(" ") + ")";
    });
  }

  // ---- the heat map: one pixel per token and layer, enlarged by the style sheet; the first layer is at the bottom
  const heat = id("map-heat"), plane = heat.querySelector(".heat-plane"), canvas = heat.querySelector("canvas");
  const size = { width: 1, height: 1 };
  function paintHeat() {
    const [from, to] = range();
    const count = to - from;
    const room = heat.clientWidth - 44;
    size.width = Math.min(40, Math.max(state.part < 0 ? 2 : 18, room / count));
    size.height = Math.max(6, Math.min(22, Math.round(420 / layers)));
    canvas.width = count;
    canvas.height = layers;
    canvas.style.width = plane.style.width = count * size.width + "px";
    canvas.style.height = layers * size.height + "px";
    canvas.getContext("2d").putImageData(pixels(from, to), 0, 0);
    const labels = heat.querySelector(".heat-layers");
    const step = Math.ceil(18 / size.height);
    labels.replaceChildren(...map.layers.flatMap((name, i) => {
      if (i % step) return [];
      return [make("span", { textContent: name, style: `top:${(layers - 1 - i + 0.5) * size.height}px` })];
    }));
    labels.style.height = canvas.style.height;
    heat.querySelector(".heat-words").replaceChildren(...(size.width < 15 ? [] : text().tokens.slice(from, to).map((token) => make("span", { textContent: spoken(token), style: `width:${size.width}px` }))));
  }
  function pixels(from, to) {
    const image = new ImageData(to - from, layers);
    for (let layer = 0; layer < layers; layer += 1) {
      const limit = cap(layer);
      for (let i = from; i < to; i += 1) {
        const value = at(state.measure, i, layer);
        const place = 4 * ((layers - 1 - layer) * (to - from) + i - from);
        if (value !== null) image.data.set([...shade(value, limit, "heat"), 255], place);
      }
    }
    return image;
  }

  // ---- the chosen token
  function choose(token, layer, { follow = false, speak = false } = {}) {
    const [from, to] = range();
    state.token = Math.max(from, Math.min(to - 1, token));
    if (layer !== state.layer) setLayer(layer);
    const old = words.querySelector(".now");
    if (old) { old.classList.remove("now"); old.removeAttribute("id"); old.removeAttribute("aria-selected"); name(old, old.textContent); }
    const span = spans[state.token - from];
    if (span) {
      span.classList.add("now");
      span.id = "map-now";
      span.setAttribute("aria-selected", "true");
      span.setAttribute("aria-label", spoken(text().tokens[state.token]) + ", " + shown(at(state.measure, state.token, state.layer)));
      words.setAttribute("aria-activedescendant", "map-now");
      if (follow) inSight(words, span);
    }
    const cursor = heat.querySelector(".heat-cursor");
    const left = (state.token - from) * size.width;
    cursor.style.cssText = `left:${left}px;top:${(layers - 1 - state.layer) * size.height}px;width:${size.width}px;height:${size.height}px`;
    if (follow && (left < heat.scrollLeft || left > heat.scrollLeft + heat.clientWidth - 80)) heat.scrollLeft = left - heat.clientWidth / 2;
    readout();
    if (speak) preskip.say(`${spoken(text().tokens[state.token])}, layer ${map.layers[state.layer]}: ${shown(at(state.measure, state.token, state.layer))}`);
  }
  function inSight(box, element) {
    const top = element.offsetTop, bottom = top + element.offsetHeight;
    if (top < box.scrollTop) box.scrollTop = top - 8;
    else if (bottom > box.scrollTop + box.clientHeight) box.scrollTop = bottom - box.clientHeight + 8;
  }
  const profile = id("map-profile");
  const bars = map.layers.map((_, layer) => {
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    bar.addEventListener("click", () => choose(state.token, layer));
    profile.append(bar);
    return bar;
  });
  function readout() {
    const { tokens } = text();
    id("map-token").textContent = spoken(tokens[state.token]);
    id("map-place").textContent = `token ${state.token + 1} of ${tokens.length}, layer ${map.layers[state.layer]}`;
    const flat = (from, to) => tokens.slice(Math.max(0, from), to).join("").replace(/\s+/g, " ");
    const parts = [["span", "…" + flat(state.token - 6, state.token)], ["b", flat(state.token, state.token + 1)], ["span", flat(state.token + 1, state.token + 7) + "…"]];
    id("map-context").replaceChildren(...parts.map(([tag, textContent]) => make(tag, { textContent })));
    const rows = Object.keys(measures).map((measure) => [measure, NAMES[measure], shown(at(measure, state.token, state.layer))]);
    const mine = at(state.measure, state.token, state.layer);
    if (mine !== null) {
      let less = 0;
      for (let i = 0; i < tokens.length; i += 1) less += at(state.measure, i, state.layer) < mine;
      rows.push(["rank", "Higher than", Math.round((100 * less) / tokens.length) + " % of this text"]);
    }
    id("map-values").replaceChildren(...rows.map(([key, name, value]) => {
      const row = make("div", { className: key === state.measure ? "chosen" : "" }), number = make("dd", { textContent: value });
      number.dataset.value = key;
      row.append(make("dt", { textContent: name }), number);
      return row;
    }));
    const values = map.layers.map((_, layer) => at(state.measure, state.token, layer));
    const most = Math.max(...values.map(Number)) || 1, width = 240 / layers;
    bars.forEach((bar, layer) => {
      const height = Math.max(1, (70 * Number(values[layer])) / most);
      const box = { x: layer * width + 0.1 * width, y: 72 - height, width: 0.8 * width, height: height, class: layer === state.layer ? "now" : "" };
      for (const [name, value] of Object.entries(box)) bar.setAttribute(name, value);
    });
  }

  // ---- controls
  function legend() {
    id("map-measure-name").textContent = NAMES[state.measure];
    id("map-cap").textContent = capText(state.own && state.view === "layers");
  }
  function setLayer(layer) {
    state.layer = layer;
    const slider = id("map-layer");
    slider.value = layer;
    slider.setAttribute("aria-valuetext", "Layer " + map.layers[layer]);
    id("map-layer-name").textContent = map.layers[layer];
    if (state.view === "text") paint();
    legend();
  }
  function refresh(options) {
    id("map-panel").dataset.view = state.view;
    words.hidden = state.view !== "text";
    heat.hidden = state.view !== "layers";
    if (state.view === "text") { write(); paint(); } else { spans = []; paintHeat(); }
    legend();
    choose(state.token, state.layer, options);
  }
  function setText(index, part, options) {
    state.text = (index + map.documents.length) % map.documents.length;
    id("map-document").value = state.text;
    const { tokens, sentences } = text();
    const option = (value, words) => make("option", { value, textContent: words });
    id("map-sentence").replaceChildren(option(-1, `Whole text, ${tokens.length} tokens`), ...sentences.map((start, i) => {
      const words = tokens.slice(start, Math.min(start + 14, sentences[i + 1] ?? tokens.length)).join("").replace(/\s+/g, " ").trim();
      return option(i, `${i + 1}. ${words.slice(0, 56)}${words.length > 56 ? "…" : ""}`);
    }));
    setPart(part, options);
  }
  function setPart(part, options) {
    state.part = part < -1 ? text().sentences.length - 1 : part >= text().sentences.length ? -1 : part;
    id("map-sentence").value = state.part;
    const [from, to] = range();
    if (state.token < from || state.token >= to) state.token = from;
    words.scrollTop = heat.scrollLeft = 0;
    refresh(options);
  }

  // ---- search in all texts
  const folded = map.documents.map(() => null); // text in lower case, and where each token begins in it
  function fold(index) {
    if (!folded[index]) {
      const starts = [];
      let whole = "";
      for (const token of map.documents[index].tokens) { starts.push(whole.length); whole += token.toLowerCase(); }
      folded[index] = { whole, starts };
    }
    return folded[index];
  }
  function search() {
    const wanted = id("map-search").value.toLowerCase();
    state.matches = [];
    state.match = -1;
    if (wanted.trim()) map.documents.forEach((_, index) => {
      const { whole, starts } = fold(index);
      let token = 0;
      for (let place = whole.indexOf(wanted); place >= 0; place = whole.indexOf(wanted, place + wanted.length)) {
        while (token + 1 < starts.length && starts[token + 1] <= place) token += 1;
        let to = token + 1;
        while (to < starts.length && starts[to] < place + wanted.length) to += 1;
        state.matches.push({ text: index, from: token, to: to });
      }
    });
    if (state.matches.length) go(Math.max(0, state.matches.findIndex((match) => match.text >= state.text)));
    else { id("map-search-found").textContent = wanted.trim() ? "not found" : ""; refresh(); }
  }
  function go(index) {
    const { matches } = state;
    if (!matches.length) return;
    state.match = (index + matches.length) % matches.length;
    const match = matches[state.match];
    state.token = match.from;
    const [from, to] = range();
    if (match.text !== state.text) setText(match.text, -1, { follow: true });
    else if (match.from < from || match.from >= to) setPart(-1, { follow: true });
    else refresh({ follow: true });
    id("map-search-found").textContent = `${state.match + 1} of ${matches.length}`;
    preskip.say(`Match ${state.match + 1} of ${matches.length}`);
  }

  // ---- saving what is shown
  function records() {
    const [from, to] = range();
    return text().tokens.slice(from, to).map((token, i) => ({
      position: from + i,
      token: token,
      ...Object.fromEntries(map.layers.map((name, layer) => ["layer_" + name, at(state.measure, from + i, layer)])),
    }));
  }
  function drawing() {
    const [from, to] = range();
    const count = to - from, cell = count > 150 ? 4 : 18, tall = 14, left = 44, top = 34, named = cell > 10 ? 96 : 24;
    const image = make("canvas", { width: count, height: layers });
    image.getContext("2d").putImageData(pixels(from, to), 0, 0);
    const style = getComputedStyle(document.documentElement), ink = style.getPropertyValue("--ink"), ground = style.getPropertyValue("--surface");
    const escape = (words) => words.replace(/[&<>"\u0000-\u001f]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[sign] || "\ufffd");
    const width = left + count * cell + 12, height = top + layers * tall + named;
    const label = (x, y, words, more) => `<text x="${x}" y="${y}" ${more || ""}>${escape(words)}</text>`;
    const layerNames = map.layers.map((name, i) => (i % 5 ? "" : label(left - 6, top + (layers - i) * tall - 3, String(name), 'text-anchor="end"'))).join("");
    const tokens = cell > 10 ? text().tokens.slice(from, to).map((token, i) => `<g transform="translate(${left + (i + 0.65) * cell} ${top + layers * tall + 6}) rotate(90)">${label(0, 0, spoken(token).slice(0, 14))}</g>`).join("") : label(left, height - 8, `tokens ${from + 1} to ${to}`);
    return { width, height, svg: `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" font-family="sans-serif" font-size="11" fill="${ink}"><rect width="100%" height="100%" fill="${ground}"/>${label(left, 20, `${NAMES[state.measure]} by token and layer, 0 to ${capText(state.own)} — ${text().title}`)}${layerNames}<image x="${left}" y="${top}" width="${count * cell}" height="${layers * tall}" preserveAspectRatio="none" style="image-rendering:pixelated" href="${image.toDataURL()}"/>${tokens}</svg>` };
  }
  function saveAs(kind) {
    const name = "preskip-map-" + (state.text + 1) + (state.part < 0 ? "" : "-" + (state.part + 1)) + "." + kind;
    if (kind === "csv") return preskip.save(name, preskip.csv(records()), "text/csv");
    if (kind === "json") return preskip.save(name, JSON.stringify(records(), null, 1), "application/json");
    const { svg, width, height } = drawing();
    if (kind === "svg") return preskip.save(name, svg, "image/svg+xml");
    const picture = new Image();
    picture.onload = () => {
      const target = make("canvas", { width: 2 * width, height: 2 * height });
      target.getContext("2d").drawImage(picture, 0, 0, 2 * width, 2 * height);
      target.toBlob((blob) => preskip.save(name, blob, "image/png"), "image/png");
    };
    picture.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(svg);
  }

  // ---- events
  function listen() {
    const on = (name, event, action) => id(name).addEventListener(event, action);
    on("map-document", "change", (event) => setText(Number(event.target.value), -1));
    on("map-document-back", "click", () => setText(state.text - 1, -1));
    on("map-document-on", "click", () => setText(state.text + 1, -1));
    on("map-sentence", "change", (event) => setPart(Number(event.target.value)));
    on("map-sentence-back", "click", () => setPart(state.part - 1));
    on("map-sentence-on", "click", () => setPart(state.part + 1));
    on("map-layer", "input", (event) => choose(state.token, Number(event.target.value)));
    on("map-search", "input", search);
    on("map-search-form", "submit", (event) => { event.preventDefault(); go(state.match + 1); });
    on("map-search-back", "click", () => go(state.match - 1));
    on("map-panel", "change", (event) => {
      const { name, value } = event.target;
      if (name === "map-view") state.view = value;
      else if (name === "map-measure") state.measure = value;
      else if (name === "map-scale") state.own = value === "layer";
      else return;
      refresh({ follow: true });
    });
    on("map-panel", "click", (event) => { const button = event.target.closest("[data-map]"); if (button) saveAs(button.dataset.map); });
    const point = (event) => { const span = event.target.closest("[data-token]"); if (span) choose(Number(span.dataset.token), state.layer); };
    words.addEventListener("pointerover", point);
    words.addEventListener("click", point);
    words.addEventListener("focus", () => choose(state.token, state.layer));
    const cell = (event) => {
      const box = canvas.getBoundingClientRect(), [from, to] = range();
      const token = Math.floor((event.clientX - box.left) / size.width), row = Math.floor((event.clientY - box.top) / size.height);
      if (token >= 0 && token < to - from && row >= 0 && row < layers) choose(from + token, layers - 1 - row);
    };
    plane.addEventListener("pointermove", cell);
    plane.addEventListener("click", cell);
    const keys = (event) => {
      const [from, to] = range();
      const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1], Home: [from - state.token, 0], End: [to - 1 - state.token, 0] };
      const move = moves[event.key];
      if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      choose(state.token + move[0], Math.max(0, Math.min(layers - 1, state.layer + move[1])), { follow: true, speak: state.view === "layers" || move[1] !== 0 });
    };
    words.addEventListener("keydown", keys);
    heat.addEventListener("keydown", keys);
    document.addEventListener("recolour", () => { recolour(); refresh(); });
    addEventListener("resize", () => { if (state.view === "layers") refresh(); });
  }

  preskip.complete = (data) => {
    const documents = map.documents.map((entry, index) => {
      const count = entry.tokens.length;
      const rows = (measure) => (measures[measure] ? map.layers.map((_, layer) => measures[measure].slice(first[index] + layer * count, first[index] + (layer + 1) * count)) : null);
      return { id: entry.id, title: entry.title, tokens: entry.tokens, bypass: rows("bypass"), enrichment: rows("enrichment") };
    });
    if (data.explain) data.explain.documents = documents; else data.documents = documents;
    return data;
  };

  preskip.ready = (async () => {
    for (const [key, packed] of Object.entries(map.measures)) measures[key] = await unpack(packed);
    recolour();
    listen();
    setText(0, -1);
    setLayer(state.layer);
    id("map-panel").dataset.ready = "true";
    performance.mark("map-ready");
  })().catch((error) => { console.error(error); words.textContent = "The map could not be drawn: it needs a browser of 2023 or later."; });
})();
