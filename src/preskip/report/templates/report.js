// Theme, plots, sorting, saving. Runs once, after the page and the Vega bundle; sends nothing anywhere.
const preskip = {}; // what the page's scripts share: make, save, say, csv, complete, ready
(function () {
  "use strict";
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const specs = read("specs");
  const root = document.documentElement;
  const live = document.getElementById("live");
  const views = {};
  const say = (text) => { live.textContent = text; };
  const make = (tag, more) => Object.assign(document.createElement(tag), more);

  function save(name, content, type) {
    const url = URL.createObjectURL(new Blob([content], { type: type }));
    const link = make("a", { href: url, download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
    say("Saved " + name);
  }
  Object.assign(preskip, { save, say, make });
  preskip.complete = (data) => data; // the map's script puts back what it holds

  // Rows of records as comma-separated values (RFC 4180), the columns in the order in which they appear.
  preskip.csv = (records) => {
    const columns = Array.from(new Set(records.flatMap(Object.keys)));
    const field = (value) => (value === null || value === undefined ? "" : /[",\r\n]/.test(value) ? '"' + String(value).replace(/"/g, '""') + '"' : String(value));
    return [columns, ...records.map((record) => columns.map((name) => record[name]))].map((row) => row.map(field).join(",")).join("\r\n") + "\r\n";
  };

  // Plots take their colours and type from the style sheet, so that they follow the theme.
  function config(columns) {
    const style = getComputedStyle(root);
    const value = (name) => style.getPropertyValue(name).trim();
    const font = getComputedStyle(document.body).fontFamily;
    const text = { labelColor: value("--muted"), titleColor: value("--muted"), labelFont: font, titleFont: font };
    return {
      background: value("--surface"),
      font: font,
      padding: { left: 2, right: 12, top: 6, bottom: 4 },
      view: { stroke: null },
      axis: Object.assign({ labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", titlePadding: 10, gridColor: value("--line"),
        domainColor: value("--control"), tickColor: value("--control"), labelOverlap: true }, text),
      axisY: { domain: false, ticks: false, labelPadding: 8 },
      legend: Object.assign({ orient: "top", labelFontSize: 13, titleFontSize: 12, titleFontWeight: "normal", symbolStrokeWidth: 2.5, symbolSize: 260, symbolType: "stroke", symbolOpacity: 1, columns: columns },
        text, { labelColor: value("--ink") }),
      style: { strong: { stroke: value("--ink") }, hollow: { fill: value("--surface") } },
      rule: { color: value("--muted") },
      text: { color: value("--muted"), font: font },
      range: {
        category: [1, 2, 3, 4, 5, 6, 7, 8].map((n) => value("--arm-" + n)),
        ramp: [0, 1, 2].map((n) => value("--depth-" + n)),
        heatmap: [0, 1, 2, 3].map((n) => value("--heat-" + n)),
        ordinal: ["better", "worse", "equivalent", "undecided", "undecided"].map((name) => value("--" + name)),
      },
    };
  }

  async function drawOne(key) {
    if (views[key]) views[key].finalize();
    const copy = JSON.parse(JSON.stringify(specs[key]));
    const traces = document.querySelector(`[data-traces="${CSS.escape(key)}"]`);
    if (traces) copy.params[0].value = traces.checked;
    if (traces && !traces.checked) copy.layer = copy.layer.filter((layer) => !(layer.name || "").startsWith("traces"));
    // `ast` interprets expressions instead of compiling them: the page needs no eval.
    const element = document.getElementById(key);
    const shared = config(Math.max(2, Math.min(6, Math.floor(element.clientWidth / 135)))); // arms in a row of the legend
    views[key] = await vegaEmbed(element, copy, { actions: false, ast: true, mode: "vega-lite", renderer: "svg", config: shared });
    element.querySelector("svg").setAttribute("aria-hidden", "true"); // the figure says in words what it shows
  }

  // Those in sight first; between any two the page answers the reader.
  const place = (key) => {
    const box = document.getElementById(key).getBoundingClientRect();
    return box.bottom < 0 ? innerHeight - box.bottom : box.top;
  };
  const width = (key) => document.getElementById(key).clientWidth; // 0 in what is folded, in some browsers
  async function draw() {
    delete root.dataset.drawn;
    for (const key of Object.keys(specs).sort((a, b) => place(a) - place(b))) {
      if (width(key)) await drawOne(key);
      await new Promise((resolve) => setTimeout(resolve));
    }
    root.dataset.drawn = "true";
  }

  let drawing = Promise.resolve().then(() => preskip.ready); // then one after the other, so that the last theme chosen wins
  const redraw = () => { drawing = drawing.then(draw).catch(failed); };
  const failed = (error) => { console.error(error); say("A plot could not be drawn; the tables hold its data."); };

  const theme = document.getElementById("theme");
  const recolour = () => { document.dispatchEvent(new Event("recolour")); redraw(); };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const label = () => { theme.textContent = isDark() ? "Light" : "Dark"; theme.setAttribute("aria-label", "Switch to the " + (isDark() ? "light" : "dark") + " theme"); };
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; label(); recolour(); });
  system.addEventListener("change", () => { label(); recolour(); });
  label();

  const download = document.getElementById("download");
  download.addEventListener("click", () => save(download.dataset.name, JSON.stringify(preskip.complete(read("data")), null, 2), "application/json"));
  for (const button of document.querySelectorAll("[data-save]")) {
    button.addEventListener("click", async () => {
      const key = button.dataset.figure;
      const name = "preskip-" + key.replace(/[^\w.-]+/g, "-") + "." + button.dataset.save;
      if (button.dataset.save === "json") return save(name, JSON.stringify(specs[key].data.values, null, 2), "application/json");
      if (button.dataset.save === "csv") return save(name, preskip.csv(specs[key].data.values), "text/csv");
      if (!views[key]) await drawOne(key);
      const view = views[key].view;
      if (button.dataset.save === "svg") return save(name, await view.toSVG(), "image/svg+xml");
      const canvas = await view.toCanvas(2);
      canvas.toBlob((blob) => save(name, blob, "image/png"), "image/png");
    });
  }
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      const source = document.getElementById(button.dataset.copy);
      try {
        await navigator.clipboard.writeText(source.textContent);
        button.textContent = "Copied";
        say("Copied");
      } catch (error) { // no clipboard for local files in some browsers: select, so that one key copies
        getSelection().selectAllChildren(source);
        say("Selected; press Ctrl+C to copy");
      }
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }

  // A cell's place in the order: what it says it sorts by, else its first line as a number where its column has numbers.
  function sorting(cell, numeric) {
    if (cell.dataset.sort !== undefined) return cell.dataset.sort;
    const text = (cell.firstChild ? cell.firstChild.textContent : "").trim();
    if (!numeric) return cell.textContent.trim();
    const found = text.replace(/,/g, "").replace(/−/g, "-").match(/[-+]?\d+(\.\d+)?(e[-+]?\d+)?/i);
    return found ? String(Number(found[0]) * (/GiB/.test(text) ? 1024 : 1)) : "";
  }
  for (const table of document.querySelectorAll("table.sortable")) {
    const headings = Array.from(table.tHead.rows[table.tHead.rows.length - 1].cells); // above it stand the names of groups
    headings.forEach((heading, column) => {
      const button = make("button", { type: "button" });
      const words = Array.from(heading.childNodes).filter((node) => node.nodeName !== "SMALL");
      heading.prepend(button);
      button.append(...words);
      heading.setAttribute("aria-sort", "none");
      const numeric = heading.classList.contains("number");
      button.addEventListener("click", () => {
        const ascending = heading.getAttribute("aria-sort") !== "ascending";
        headings.forEach((other) => other.setAttribute("aria-sort", "none"));
        heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        const keyed = Array.from(table.tBodies[0].rows, (row) => [row, sorting(row.cells[column], numeric)]);
        keyed.sort(([, a], [, b]) => {
          if (a === "" || b === "") return (a === "") - (b === ""); // what was not measured: last
          const difference = numeric ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true });
          return ascending ? difference : -difference;
        });
        table.tBodies[0].append(...keyed.map(([row]) => row));
      });
    });
  }

  // What is folded opens where a link leads into it, and its plots are drawn if they could not be before.
  const unfold = () => {
    let target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    for (const own of target.querySelectorAll(":scope > details.fold")) own.open = true;
    for (; target; target = target.parentElement) if (target.tagName === "DETAILS") target.open = true;
  };
  addEventListener("hashchange", unfold);
  for (const link of document.querySelectorAll("nav a")) link.addEventListener("click", () => setTimeout(unfold));
  unfold();
  document.addEventListener("toggle", ({ target }) => {
    if (!target.open || !target.querySelector) return;
    const missing = Object.keys(specs).filter((key) => !views[key] && target.contains(document.getElementById(key)));
    if (missing.length) drawing = drawing.then(async () => { for (const key of missing) if (width(key)) await drawOne(key); }).catch(failed);
  }, true);
  for (const box of document.querySelectorAll("[data-traces]")) {
    box.addEventListener("change", () => { drawing = drawing.then(() => drawOne(box.dataset.traces)).catch(failed); });
  }

  // Contents show where the reader is.
  const links = Array.from(document.querySelectorAll("nav a")).filter((link) => document.getElementById(link.hash.slice(1)));
  const mark = () => {
    const reached = links.filter((link) => document.getElementById(link.hash.slice(1)).getBoundingClientRect().top < innerHeight / 3);
    const current = reached[reached.length - 1] || links[0];
    if (!current || current.hasAttribute("aria-current")) return;
    links.forEach((link) => link.removeAttribute("aria-current"));
    current.setAttribute("aria-current", "true");
    const bar = current.closest("nav");
    bar.scrollLeft = current.offsetLeft - bar.clientWidth / 2 + current.clientWidth / 2;
  };
  addEventListener("scroll", mark, { passive: true });
  mark();

  // Paper shows what is folded, and plots for its columns: drawn wider, and scaled by the style sheet to its small type.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = Array.from(document.querySelectorAll("details:not([open]):not(.save)"));
    opened.forEach((details) => { details.open = true; });
    for (const [key, { view }] of Object.entries(views)) {
      const grid = document.getElementById(key).closest(".grid, .planes");
      view.width(grid ? (grid.matches(".three, .small") ? 300 : 420) : 860).run();
    }
  });
  addEventListener("afterprint", () => {
    opened.forEach((details) => { details.open = false; });
    for (const [key, { view }] of Object.entries(views)) if (width(key)) view.width(width(key)).run();
  });

  redraw();
})();
