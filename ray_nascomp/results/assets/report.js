// Draws the report's figures when they come into view, and a trial's details when it is clicked.
"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const isTouch = matchMedia("(pointer: coarse)").matches;
  const plotConfig = { displaylogo: false, responsive: true, displayModeBar: isTouch ? false : "hover" };

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text; // Never innerHTML: names come from users.
    return made;
  }

  function number(value) {
    if (typeof value !== "number") return String(value);
    if (Number.isInteger(value) || Math.abs(value) >= 1e4) return Math.round(value).toLocaleString("en");
    return String(Number(value.toPrecision(4)));
  }

  // Figures.

  const drawn = new Set();

  function draw(plot) {
    if (drawn.has(plot.id)) return;
    drawn.add(plot.id);
    const figure = JSON.parse(document.getElementById(plot.id + "-data").textContent);
    if (isTouch) figure.layout.dragmode = false; // A finger that moves scrolls the page.
    Plotly.newPlot(plot, figure.data, figure.layout, plotConfig);
    if (plot.id === "plot-front" || plot.id === "plot-parallel") {
      plot.on("plotly_click", (event) => show(event.points[0].customdata, true));
    }
    if (plot.id === "plot-parallel") {
      plot.on("plotly_selected", (event) => keep(plot, event && event.range));
      plot.on("plotly_deselect", () => keep(plot, null));
    }
  }

  const plots = Array.from(document.querySelectorAll(".plot[id]"));
  const watcher = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
    { rootMargin: "300px" },
  );
  plots.forEach((plot) => watcher.observe(plot));

  // Parallel axes: the lines that pass through a box stand out.

  function keep(plot, range) {
    const own = plot.data.filter((trace) => trace.meta !== "kept");
    if (plot.data.length > own.length) Plotly.deleteTraces(plot, plot.data.length - 1);
    Plotly.restyle(plot, { opacity: range ? 0.12 : 1 });
    if (!range) return;
    const [left, right] = [...range.x].sort((a, b) => a - b);
    const [low, high] = [...range.y].sort((a, b) => a - b);
    const kept = { x: [], y: [], customdata: [], text: [] };
    for (const trace of own) {
      let start = 0;
      for (let end = 0; end < trace.x.length; end++) {
        if (trace.x[end] !== null) continue;
        let inside = true;
        for (let i = start; i < end; i++) {
          if (trace.x[i] >= left && trace.x[i] <= right) inside = inside && trace.y[i] >= low && trace.y[i] <= high;
        }
        if (inside) {
          for (const key of Object.keys(kept)) kept[key].push(...Array.from(trace[key]).slice(start, end + 1));
        }
        start = end + 1;
      }
    }
    Plotly.addTraces(plot, {
      ...kept,
      meta: "kept",
      mode: "lines",
      name: "in the box",
      line: { color: "#000000", width: 1.5 },
      hovertemplate: own[0].hovertemplate,
    });
  }

  // One trial.

  const fact = document.getElementById("trial-facts");

  function show(id, isAsked) {
    const trial = data.trials[id];
    if (!trial) return;
    document.querySelectorAll("tr.picked").forEach((row) => row.classList.remove("picked"));
    const row = document.getElementById("row-" + id);
    if (row) row.classList.add("picked");
    document.getElementById("trial-title").textContent = (id === data.knee ? "The knee: trial " : "Trial ") + id;
    fact.replaceChildren(
      ...trial.metrics.map((value, index) => {
        const item = element("li", "", data.metrics[index]);
        item.prepend(element("b", "", value === null ? "-" : number(value)));
        return item;
      }),
    );
    document.getElementById("trial-plan").textContent = data.dimensions
      .map((name, index) => (trial.plan[index] === null ? "" : name + ": " + number(trial.plan[index])))
      .filter(Boolean)
      .join("\n");
    const layers = data.layers[id];
    document.getElementById("trial-layers").hidden = !layers;
    document.getElementById("trial-no-layers").hidden = Boolean(layers);
    if (layers) {
      drawNetwork(layers);
      fillLayers(layers);
    }
    if (isAsked) document.getElementById("trial").scrollIntoView({ behavior: "smooth", block: "start" });
  }

  function bitsClass(bits) {
    return bits >= 32 ? "bits-float" : bits > 8 ? "bits-16" : bits === 8 ? "bits-8" : "bits-low";
  }

  function drawNetwork(layers) {
    const shown = layers.filter((layer) => layer.macs_before || layer.macs_after);
    const width = (layer, when) => layer["channels_" + when] || Math.sqrt(layer["params_" + when]);
    const widest = Math.max(...shown.map((layer) => Math.max(width(layer, "before"), width(layer, "after"))), 1);
    const cells = [];
    for (const layer of shown) {
      const before = Math.max(width(layer, "before"), width(layer, "after"));
      const share = before ? width(layer, "after") / before : 0;
      const block = element("div", share ? "" : "gone");
      const whole = element("div", "whole");
      whole.style.width = (100 * before) / widest + "%";
      const left = element("div", "left " + bitsClass(layer.bits));
      left.style.width = 100 * share + "%";
      whole.append(left);
      block.append(whole);
      block.title = layer.name + ": " + number(layer.params_before) + " parameters before, " + number(layer.params_after) + " after";
      const removed = share === 0 ? "gone" : layer.sparsity ? "-" + Math.round(100 * layer.sparsity) + "%" : "whole";
      const note = element("div", "note", removed + (share === 0 ? "" : ", " + layer.bits + " bits"));
      cells.push(element("div", "layer", layer.name), block, note);
    }
    document.getElementById("trial-network").replaceChildren(...cells);
  }

  function fillLayers(layers) {
    const largest = {};
    for (const key of ["params", "macs", "bytes"]) {
      largest[key] = Math.max(...layers.map((layer) => Math.max(layer[key + "_before"], layer[key + "_after"])), 1);
    }
    const rows = layers.map((layer) => {
      const row = element("tr");
      row.append(element("td", "name", layer.name), element("td", "text", layer.type));
      for (const key of ["params", "macs", "bytes"]) {
        const cell = element("td", "", number(layer[key + "_before"]) + " → " + number(layer[key + "_after"]));
        for (const when of ["before", "after"]) {
          const bar = element("span", when);
          bar.style.width = (100 * layer[key + "_" + when]) / largest[key] + "%";
          cell.append(bar);
        }
        row.append(cell);
      }
      row.append(element("td", "", Math.round(100 * layer.sparsity) + "%"), element("td", "", layer.bits));
      return row;
    });
    document.getElementById("trial-table").replaceChildren(...rows);
  }

  document.querySelectorAll("#front tr[id]").forEach((row) => {
    const choose = () => show(row.id.slice("row-".length), true);
    row.addEventListener("click", choose);
    row.tabIndex = 0;
    row.addEventListener("keydown", (event) => event.key === "Enter" && choose());
  });
  if (data.knee) show(data.knee, false);

  // Paper is narrower than the screen, and shows all.

  function fit(width) {
    for (const plot of plots) {
      draw(plot);
      Plotly.relayout(plot, { width: width && Math.min(width, plot.parentElement.classList.contains("pair") ? width / 2 : width) });
    }
  }
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll("details.print").forEach((details) => (details.open = true));
    fit(680);
  });
  window.addEventListener("afterprint", () => fit(null));
})();
