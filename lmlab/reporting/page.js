"use strict";

const charts = JSON.parse(document.getElementById("charts").textContent);

async function draw(chart) {
  const spec = charts[chart.dataset.chart];
  const width = chart.clientWidth;
  const axisY = { ...spec.config.axisY, labelLimit: Math.max(90, 0.35 * width) };
  const legend = { ...spec.config.legend, columns: width < 520 ? 1 : 3, labelLimit: Math.min(320, width - 60) };
  const renderer = Object.values(spec.datasets).some((rows) => rows.length > 5000) ? "canvas" : "svg";
  await vegaEmbed(chart, {
    ...spec,
    width: "container",
    autosize: { type: "fit-x", contains: "padding" },
    config: { ...spec.config, axisY, legend },
  }, { actions: false, renderer });
}

function sort(table, head, column) {
  const down = head.getAttribute("aria-sort") === "ascending";
  table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const text = (line) => line.cells[column].textContent;
  const number = (line) => Number(text(line).replace(/[,≤ ]/g, ""));
  const lines = [...table.tBodies[0].rows];
  const numbers = lines.every((line) => !Number.isNaN(number(line)));
  table.tBodies[0].append(...lines.sort((a, b) => {
    if (!text(a) || !text(b)) return !text(a) - !text(b);  // what is not known comes last, either way
    return (down ? -1 : 1) * (numbers ? number(a) - number(b) : text(a).localeCompare(text(b), "en", { numeric: true }));
  }));
}

function find(section, words) {
  for (const line of section.querySelectorAll(".runs tbody tr")) {
    line.hidden = !words.every((word) => line.textContent.toLowerCase().includes(word));
  }
}

for (const input of document.querySelectorAll(".find")) {
  input.addEventListener("input", () => find(input.closest("section"), input.value.toLowerCase().split(/\s+/)));
}
for (const head of document.querySelectorAll("th")) {
  head.firstChild.addEventListener("click", () => sort(head.closest("table"), head, head.cellIndex));
}

(async () => {
  for (const chart of document.querySelectorAll(".chart")) await draw(chart);
  document.documentElement.dataset.drawn = "all";
})();
