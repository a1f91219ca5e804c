// When figures are drawn, and what the reader does to them.
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const settings = { displayModeBar: false, responsive: false, doubleClick: "reset" };
const shownSteps = {};
const inGroup = (group) => figures.filter((figure) => figure.run === group);
const runsOf = (figure) => (figure.lines.length ? [...new Set(figure.lines.map((line) => line.run))] : [Number(figure.run.replace("run", ""))])
  .map((each) => runs[each]);

// The steps in sight of a figure; all of its group's charts lie over each other.
function sight(figure) {
  if (shownSteps[figure.run]) return shownSteps[figure.run];
  const steps = (figure.run === "compare" ? runs : runsOf(figure)).map((run) => run.columns.step).filter((step) => step.length);
  const first = Math.min(...steps.map((step) => step[0])), last = Math.max(...steps.map((step) => step[step.length - 1]));
  const room = Math.max(0.5, 0.006 * (last - first));
  return steps.length ? [first - room, last + room] : [0, 1];
}

const isLayers = (figure) => figure.kind in layerMakers;
function xRange(figure) {
  const range = sight(figure);
  if (isLayers(figure) || view.axis === "step") return range.slice();
  const ends = range.map((step) => runsOf(figure).filter(places).map((run) => toAxis(run, step)));
  return [Math.min(...ends[0]), Math.max(...ends[1])];
}

function draw(figure) {
  const div = place(figure);
  const [traces, layout] = (layerMakers[figure.kind] || plain)(figure, div);
  if (figure.kind !== "spread") layout.xaxis.range = xRange(figure);
  div.style.height = `${layout.height}px`;
  Plotly.react(div, traces, layout, settings);
  if (!figure.wired) wire(figure, div);
  if (figure.kind === "heat") paint(figure);
}

// One figure a task, those in sight first: the reader's next click never waits for more than one.
const dirty = new Set();
const inSight = new Set();
const watcher = new IntersectionObserver((entries) => entries.forEach(({ target, isIntersecting }) => {
  if (isIntersecting) inSight.add(target.id); else inSight.delete(target.id);
}), { rootMargin: "200px" });
const channel = new MessageChannel();
let pumping = false;
function redraw(some) {
  some.forEach((figure) => dirty.add(figure));
  root.dataset.waiting = dirty.size;
  if (!pumping && dirty.size) { pumping = true; channel.port2.postMessage(0); }
}
channel.port1.onmessage = () => {
  const waiting = [...dirty];
  const next = waiting.find((figure) => inSight.has(figure.id)) || waiting[0];
  dirty.delete(next);
  if (next) draw(next);
  root.dataset.waiting = dirty.size;
  pumping = dirty.size > 0;
  if (!pumping) root.dataset.drawn = figures.length;
  else if (inSight.has(next.id)) channel.port2.postMessage(0);
  else setTimeout(() => channel.port2.postMessage(0), 8); // what nobody sees leaves room for what somebody does
};
function drawAll() {
  dirty.clear();
  figures.forEach(draw);
  root.dataset.waiting = 0;
}

function showSteps(group, range) {
  shownSteps[group] = range;
  redraw(inGroup(group).filter((figure) => figure.kind !== "spread"));
}

function wire(figure, div) {
  figure.wired = true;
  watcher.observe(div);
  const back = (x, end) => {
    const value = typeof x === "string" ? Date.parse(x.replace(" ", "T") + "Z") : x;
    if (isLayers(figure)) return value;
    return Math[end](...runsOf(figure).filter(places).map((run) => fromAxis(run, value)));
  };
  // A double click sets a whole range, that of the first drawing: the reader wants to see all. Anything else sets its ends.
  div.on("plotly_relayout", (change) => {
    if (figure.kind === "spread") return;
    if (change["xaxis.range"]) showSteps(figure.run, null);
    else if (change["xaxis.range[0]"] !== undefined)
      showSteps(figure.run, [back(change["xaxis.range[0]"], "min"), back(change["xaxis.range[1]"], "max")]);
  });
  if (figure.kind === "heat") wireHeat(figure, div);
  if (figure.kind === "heat" || figure.kind === "spread") {
    div.on("plotly_relayout", (change) => {
      const range = change["yaxis.range"] ? null : [change["yaxis.range[0]"], change["yaxis.range[1]"]];
      if (range && range[0] === undefined) return;
      figure.shownRows = range;
      redraw([figure]);
    });
  }
}

function pick(group) {
  for (const figure of inGroup(group)) {
    if (figure.kind === "picked") draw(figure);
    if (figure.kind === "heat") mark(figure);
  }
}

addEventListener("change", ({ target }) => {
  if (target.matches("select[data-run]")) pick(target.dataset.run);
});

for (const form of document.querySelectorAll("form[data-run]")) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const ends = [Number(form.elements.first.value), Number(form.elements.last.value)].sort((a, b) => a - b);
    showSteps(form.dataset.run, [ends[0] - 0.5, ends[1] + 0.5]);
  });
  form.addEventListener("reset", () => showSteps(form.dataset.run, null));
}

const form = document.getElementById("view");
const lined = () => figures.filter((figure) => !isLayers(figure));
function look() {
  view.smoothing = Number(form.elements.smoothing.value);
  view.axis = form.elements.axis.value;
  form.elements.shown.value = view.smoothing;
}
form.addEventListener("input", () => { look(); redraw(lined()); });
form.addEventListener("submit", (event) => event.preventDefault());

const button = document.getElementById("theme");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
function themed() {
  button.setAttribute("aria-pressed", String(isDark()));
  const some = figures.filter((figure) => figure.kind !== "heat" || !figure.wired); // page.css has what a drawn one needs
  root.dataset.waiting = some.length;
  // The page itself gets its colours in a task of its own, so that the first chart's hasn't that to do too.
  setTimeout(() => { void document.body.offsetHeight; redraw(some); });
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
  resizing = setTimeout(() => redraw(figures), 120);
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

look(); // what a reload left in the form
figures.forEach((figure) => watcher.observe(place(figure)));
if (!figures.length) root.dataset.drawn = 0;
themed();
