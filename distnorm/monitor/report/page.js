// When figures are drawn, and what the reader does to them.
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const settings = { displayModeBar: false, responsive: false, doubleClick: "reset" };
const shownSteps = {};

function draw(figure) {
  if (!figure.traces.length) return;
  const div = place(figure);
  const [traces, layout] = (makers[figure.kind] || plain)(figure, div);
  if (figure.kind !== "spread") layout.xaxis.range = (shownSteps[figure.run] || figure.range).slice();
  div.style.height = `${layout.height}px`;
  Plotly.react(div, traces, layout, settings);
  if (!figure.wired) wire(figure, div);
}

function drawAll() {
  figures.forEach(draw);
}

let following = false;
function showSteps(run, range) {
  shownSteps[run] = range;
  following = true;
  for (const figure of figures) {
    if (figure.run !== run || figure.kind === "spread" || !figure.traces.length) continue;
    Plotly.relayout(place(figure), { "xaxis.range": (range || figure.range).slice() });
  }
  following = false;
}

function wire(figure, div) {
  figure.wired = true;
  div.on("plotly_relayout", (change) => {
    if (following || figure.kind === "spread") return;
    if (change["xaxis.autorange"]) showSteps(figure.run, null);
    else if (change["xaxis.range[0]"] !== undefined)
      showSteps(figure.run, [change["xaxis.range[0]"], change["xaxis.range[1]"]]);
  });
  if (figure.kind === "heat") {
    div.on("plotly_click", (event) => {
      picker(figure.run).value = event.points[0].y;
      pick(figure.run);
    });
  }
  if (figure.kind === "heat" || figure.kind === "spread") {
    div.on("plotly_relayout", (change) => {
      const range = change["yaxis.autorange"] ? null : [change["yaxis.range[0]"], change["yaxis.range[1]"]];
      if (range && range[0] === undefined) return;
      const ticks = rowTicks(div, figure.traces[0].names, figure.height, range);
      Plotly.relayout(div, { "yaxis.tickvals": ticks.tickvals, "yaxis.ticktext": ticks.ticktext });
    });
  }
}

function pick(run) {
  for (const figure of figures.filter((other) => other.run === run && other.traces.length)) {
    if (figure.kind === "picked") draw(figure);
    if (figure.kind === "heat") Plotly.relayout(place(figure), marked(figure));
  }
}

for (const select of document.querySelectorAll("select[data-run]"))
  select.addEventListener("change", () => pick(select.dataset.run));

for (const form of document.querySelectorAll("form[data-run]")) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const ends = [Number(form.elements.first.value), Number(form.elements.last.value)].sort((a, b) => a - b);
    showSteps(form.dataset.run, [ends[0] - 0.5, ends[1] + 0.5]);
  });
  form.addEventListener("reset", () => showSteps(form.dataset.run, null));
}

const button = document.getElementById("theme");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
function themed() {
  button.setAttribute("aria-pressed", String(isDark()));
  drawAll();
}
button.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  themed();
});
systemDark.addEventListener("change", themed);

let resizing = 0;
let lastWidth = innerWidth;
addEventListener("resize", () => {
  if (printing || innerWidth === lastWidth) return;
  lastWidth = innerWidth;
  clearTimeout(resizing);
  resizing = setTimeout(drawAll, 120);
});

// Paper is white and narrow, whatever the screen is; what is folded away on screen is unfolded.
let before = null;
addEventListener("beforeprint", () => {
  before = { theme: root.dataset.theme, closed: [...document.querySelectorAll("details.config:not([open])")] };
  before.closed.forEach((details) => { details.open = true; });
  root.dataset.theme = "light";
  printing = true;
  drawAll();
});
addEventListener("afterprint", () => {
  printing = false;
  before.closed.forEach((details) => { details.open = false; });
  if (before.theme) root.dataset.theme = before.theme; else delete root.dataset.theme;
  drawAll();
});

themed();
root.dataset.drawn = figures.filter((figure) => figure.traces.length).length;
