"use strict";

// The rows of each section, as its figures name them.
const drawings = JSON.parse(document.getElementById("drawings").textContent).map(unpacked);

// A figure that a filter leaves empty is no cause for warnings.
const LEVEL = { error: 1, warn: 2 };
const ZOOM = {
  name: "zoomed",
  bind: "scales",
  select: {
    type: "interval",
    zoom: "wheel![event.shiftKey]",
    translate: "[pointerdown[event.shiftKey], window:pointerup] > window:pointermove!",
  },
};

function unpacked(drawing) {
  const { runs, curves } = drawing;
  const rows = curves.run.map((number, i) => ({
    ...runs[number],
    split: curves.split[i],
    step: curves.step[i],
    tokens: curves.tokens[i],
    seconds: curves.seconds[i],
    loss: curves.loss[i],
    speed: curves.speed[i],
  }));
  const of = (split) => rows.filter((row) => row.split === split);
  return { ...drawing, validation: of("validation"), training: of("training") };
}

// What a section's figures show when some of its runs are left out.
function shown(drawing, visible) {
  const names = new Set(drawing.runs.filter((_, i) => visible.has(i)).map((run) => run.run));
  return {
    runs: drawing.runs.filter((run) => names.has(run.run)),
    validation: drawing.validation.filter((row) => names.has(row.run)),
    training: drawing.training.filter((row) => names.has(row.run)),
    finals: drawing.finals.filter((row) => !row.members.length || row.members.some((i) => visible.has(i))),
  };
}

async function draw(place, drawing, rows) {
  const { spec, data } = drawing.specs[place.dataset.figure];
  const least = spec.usermeta?.least ?? 0;
  const narrow = place.clientWidth < 520;
  const sized = {
    ...spec,
    width: place.clientWidth < least ? least : "container",
    autosize: place.clientWidth < least ? "pad" : { type: "fit-x", contains: "padding" },
    datasets: { [data]: rows[data] },
    config: { ...spec.config, legend: { ...spec.config.legend, columns: narrow ? 1 : 3, labelLimit: narrow ? 300 : 320 } },
  };
  if (place.dataset.tokens) sized.layer = spec.layer.map((layer, i) => (i ? layer : { ...layer, params: [ZOOM] }));
  if (narrow) sized.config.axisY = { labelLimit: 110 };
  const longest = Math.max(0, ...rows[data].map((row) => (row.label ?? "").length));
  if (spec.usermeta?.bars && 6 * longest > 0.4 * place.clientWidth) {
    // Names stand above their bars: beside them they would leave no room.
    const axis = { labelAlign: "left", labelPadding: -4, labelOffset: -12, labelLimit: place.clientWidth - 40, ticks: false };
    sized.height = spec.height * 1.8;
    sized.layer = spec.layer.map((layer) => (layer.encoding.y
      ? { ...layer, encoding: { ...layer.encoding, y: { ...layer.encoding.y, axis: { ...layer.encoding.y.axis, ...axis } } } }
      : layer));
  }
  const renderer = rows[data].length > 5000 ? "canvas" : "svg";
  place.vega?.finalize();
  place.vega = await vegaEmbed(place, sized, { actions: false, renderer, logLevel: LEVEL[rows === drawing ? "warn" : "error"] });
}

function wire(section) {
  const drawing = drawings[section.dataset.section];
  const places = [...section.querySelectorAll(".chart")];
  const rows = [...section.querySelectorAll(".runs tbody tr")];
  let visible = new Set(rows.keys());
  rows.forEach((row, number) => { row.number = number; });

  const redraw = async () => {
    const some = shown(drawing, visible);
    for (const place of places) {
      const { data } = drawing.specs[place.dataset.figure];
      await place.vega.view.logLevel(LEVEL.error).data(data, some[data]).runAsync();
    }
  };

  const filter = async () => {
    const words = section.querySelector(".find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = [...section.querySelectorAll(".filter")].filter((select) => select.value);
    visible = new Set();
    for (const row of rows) {
      const run = drawing.runs[row.number];
      const text = row.textContent.toLowerCase();
      row.hidden = !(words.every((word) => text.includes(word))
        && wanted.every((select) => row.dataset[select.dataset.field] === select.value));
      if (!row.hidden) visible.add(row.number);
    }
    section.querySelector(".count").textContent =
      visible.size === rows.length ? "" : `${visible.size} of ${rows.length} runs, in all that follows; `
        + "final figures are those of whole configurations";
    section.querySelectorAll("[data-members]").forEach((part) => {
      const members = part.dataset.members.split(" ").filter(Boolean).map(Number);
      part.hidden = members.length > 0 && !members.some((number) => visible.has(number));
    });
    await redraw();
  };

  const sort = (head, column) => {
    const down = head.getAttribute("aria-sort") === "ascending";
    section.querySelectorAll(".runs th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.value;
    const numbers = rows.every((row) => !Number.isNaN(Number(value(row))));
    const ordered = [...rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // what is not known comes last, either way
      return (down ? -1 : 1) * (numbers ? x - y : x.localeCompare(y, "en", { numeric: true }));
    });
    section.querySelector(".runs tbody").append(...ordered);
  };

  section.querySelector(".find")?.addEventListener("input", filter);
  section.querySelectorAll(".filter").forEach((select) => select.addEventListener("change", filter));
  section.querySelectorAll(".runs th").forEach((head, column) =>
    head.querySelector("button").addEventListener("click", () => sort(head, column)));
  section.querySelector(".against")?.addEventListener("change", async (event) => {
    const some = shown(drawing, visible);
    for (const place of places.filter((place) => place.dataset.tokens)) {
      place.dataset.figure = place.dataset[event.target.value];
      await draw(place, drawing, some);
      const links = place.parentElement.querySelectorAll(".files a");
      const file = place.dataset.files === "tokens" ? place.dataset.tokens : place.dataset.figure;
      links[0].href = `${file}.svg`;
      links[1].href = `${file}.png`;
    }
  });
  return async () => {
    for (const place of places) await draw(place, drawing, drawing);
  };
}

(async () => {
  for (const start of [...document.querySelectorAll("section")].map(wire)) await start();
  document.documentElement.dataset.drawn = "all";
})();
