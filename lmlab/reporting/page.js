"use strict";

// A chart that a filter leaves empty is no cause for warnings.
const ERRORS = 1;
const drawings = JSON.parse(document.getElementById("drawings").textContent);

// The rows of a table that comes as columns and lists of values.
function rows(table) {
  return table.data.map((values) => Object.fromEntries(values.map((value, i) => [table.columns[i], value])));
}

function wire(section) {
  const drawing = drawings[section.dataset.section];
  const data = Object.fromEntries(Object.entries(drawing.data).map(([name, table]) => [name, rows(table)]));
  const charts = [...section.querySelectorAll(".chart")];
  const body = section.querySelector(".runs tbody");
  const lines = [...(body?.rows ?? [])];
  const visible = new Set(lines.keys());
  lines.forEach((line, number) => { line.number = number; });
  const belongs = (members) => !members.length || members.some((number) => visible.has(number));

  // What charts show when some runs are left out.
  const shown = () => ({
    ...data,
    runs: data.runs.filter((_, number) => visible.has(number)),
    finals: data.finals.filter((_, number) => belongs(drawing.members[number])),
  });

  const draw = async (chart) => {
    const { spec, data: names } = drawing.specs[chart.dataset.chart];
    const some = shown();
    const width = chart.clientWidth;
    const axisY = { ...spec.config.axisY, labelLimit: Math.max(90, 0.35 * width) };
    const legend = { ...spec.config.legend, columns: width < 520 ? 1 : 3, labelLimit: Math.min(320, width - 60) };
    chart.vega?.finalize();
    chart.vega = await vegaEmbed(chart, {
      ...spec,
      width: "container",
      autosize: { type: "fit-x", contains: "padding" },
      datasets: Object.fromEntries(names.map((name) => [name, some[name]])),
      config: { ...spec.config, axisY, legend },
    }, { actions: false, renderer: some[names[0]].length > 5000 ? "canvas" : "svg", logLevel: visible.size < lines.length ? ERRORS : 2 });
  };

  const filter = async () => {
    const words = section.querySelector(".find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const selects = [...section.querySelectorAll(".filter")].filter((select) => select.value);
    visible.clear();
    for (const line of lines) {
      const text = line.textContent.toLowerCase();
      line.hidden = !words.every((word) => text.includes(word))
        || !selects.every((select) => line.dataset[select.dataset.field] === select.value);
      if (!line.hidden) visible.add(line.number);
    }
    section.querySelector(".count").textContent = visible.size === lines.length ? ""
      : `${visible.size} of ${lines.length} runs, in all that follows; final metrics are those of whole configurations`;
    for (const part of section.querySelectorAll("[data-members]")) {
      part.hidden = !belongs(part.dataset.members.split(" ").filter(Boolean).map(Number));
    }
    const some = shown();
    for (const chart of charts) {
      const view = chart.vega.view.logLevel(ERRORS);
      for (const name of drawing.specs[chart.dataset.chart].data) view.data(name, some[name]);
      await view.runAsync();
    }
  };

  const sort = (head, column) => {
    const down = head.getAttribute("aria-sort") === "ascending";
    section.querySelectorAll(".runs th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (line) => line.cells[column].dataset.value;
    const numbers = lines.every((line) => !Number.isNaN(Number(value(line))));
    body.append(...[...lines].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // what is not known comes last, either way
      return (down ? -1 : 1) * (numbers ? x - y : x.localeCompare(y, "en", { numeric: true }));
    }));
  };

  section.querySelector(".find")?.addEventListener("input", filter);
  section.querySelectorAll(".filter").forEach((select) => select.addEventListener("change", filter));
  section.querySelectorAll(".runs th").forEach((head, column) =>
    head.querySelector("button").addEventListener("click", () => sort(head, column)));
  section.querySelector(".against")?.addEventListener("change", async (event) => {
    for (const chart of charts.filter((chart) => chart.dataset.tokens)) {
      chart.dataset.chart = chart.dataset[event.target.value];
      await draw(chart);
    }
  });
  return async () => {
    for (const chart of charts) await draw(chart);
  };
}

(async () => {
  for (const start of [...document.querySelectorAll("section")].map(wire)) await start();
  document.documentElement.dataset.drawn = "all";
})();
