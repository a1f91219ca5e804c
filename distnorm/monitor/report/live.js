// New rows of runs that go on, from where the page came from.
const EVERY = 1000, TEXT_EVERY = 3000, LAYERS_EVERY = 10000;
const statusLine = document.getElementById("status");
let have = page.have, heard = Date.now(), spoken = 0, stamp = "", moved = false;
const shownLayers = new Map();

const get = async (path) => {
  const answer = await fetch(path, { cache: "no-store" });
  if (!answer.ok) throw new Error(`${answer.status}`);
  return answer.json();
};

function take(run, news) {
  if (!news.columns) return false;
  const columns = unpackColumns(news.columns);
  if (news.replace) { run.columns = columns; run.derived.clear(); } else append(run, columns);
  return true;
}

async function poll() {
  const answer = await get(`rows?have=${have.map((pair) => pair.join(".")).join(",")}`);
  const changed = answer.runs.map((news, place) => take(runs[place], news));
  have = answer.runs.map((news) => [news.epoch, news.count]);
  if (changed.some(Boolean)) {
    heard = Date.now();
    // Others lie in sight of a figure that compares, and its differences are from the first.
    redraw(lined().filter((figure) => figure.run === "compare" || changed[Number(figure.run.slice(3))]));
  }
  moved = moved || answer.stamp !== stamp;
  stamp = answer.stamp;
  if (moved && Date.now() - spoken > TEXT_EVERY) { moved = false; spoken = Date.now(); await speak(); }
  for (const [key, shown] of shownLayers)
    if (Date.now() - shown.at > LAYERS_EVERY && shown.rows !== have[Number(key.slice(3))][1]) await showLayers(key);
  tell();
}

// Words and tables are the server's; a page whose charts are others now begins again, and keeps what the reader chose.
async function speak() {
  const open = [...document.querySelectorAll("details.numbers[open]")].map((each) => each.dataset.figure);
  const answer = await get(`text?open=${open.join(",")}`);
  if (answer.shape !== page.shape) { keep(); location.reload(); return; }
  for (const [id, html] of Object.entries(answer.html)) {
    const place = id.endsWith("-table") ? document.querySelector(`details[data-figure="${id.slice(0, -6)}"] > div`) : document.getElementById(id);
    if (place) place.innerHTML = html; // escaped where it was made; the policy runs nothing that would come in it
  }
  put(answer.words);
}
function put(words) {
  for (const [id, text] of Object.entries(words)) {
    const place = document.getElementById(id);
    if (place && place.textContent !== text) place.textContent = text;
  }
}

function tell() {
  for (const each of document.querySelectorAll("form[data-run]")) {
    const { step } = runs[Number(each.dataset.run.slice(3))].columns, { last } = each.elements;
    if (last.value === last.defaultValue) last.value = last.defaultValue = step[step.length - 1];
  }
  const steps = runs.map(({ columns: { step } }) => (step.length ? step[step.length - 1] : 0));
  const seconds = Math.round((Date.now() - heard) / 1000);
  const since = seconds < 10 ? "" : `, nothing new for ${seconds < 120 ? `${seconds} s` : `${Math.round(seconds / 60)} min`}`;
  statusLine.textContent = `Following, step ${steps.map((step) => step.toLocaleString("en")).join(" and ")}${since}`;
}

async function again() {
  try {
    if (form.elements.follow.checked) await poll(); else statusLine.textContent = "Not following";
  } catch (error) {
    statusLine.textContent = "distnorm watch doesn't answer; trying again";
  }
  root.dataset.rows = have.map((pair) => pair[1]).join(",");
  setTimeout(again, document.hidden ? 5 * EVERY : EVERY);
}

// Tables of hundreds of rows stand in the page only while somebody looks at them.
const layerTables = {};
function fill(details) {
  details.querySelector("div").innerHTML = layerTables[details.dataset.figure]; // escaped where it was made
}
const drawnAs = (some) => JSON.stringify(some.map(({ id, layers: { names, zeros = [], broken = [] } }) =>
  [id, names, zeros.length > 0, broken.length > 0]));

async function showLayers(key) {
  const answer = await get(`layers?run=${key.slice(3)}`);
  const old = figures.filter((figure) => figure.run === key && isLayers(figure));
  Object.assign(layerTables, answer.tables);
  if (old.length && !document.getElementById(`${key}-layers`).hidden && drawnAs(old) === drawnAs(answer.figures)) {
    old.forEach((figure, at) => { figure.layers = answer.figures[at].layers; figure.band = null; });
    put(answer.words);
    for (const each of document.querySelectorAll(`#${key}-layers details[open]`)) fill(each);
    redraw(old);
  } else replaceLayers(key, answer, old);
  shownLayers.set(key, { at: Date.now(), rows: have[Number(key.slice(3))][1] });
}

function replaceLayers(key, answer, old) {
  const box = document.getElementById(`${key}-layers`), chosen = picker(key) && picker(key).value;
  old.forEach((figure) => { watcher.unobserve(place(figure)); dirty.delete(figure); figures.splice(figures.indexOf(figure), 1); });
  box.innerHTML = answer.html;
  box.hidden = false;
  if (chosen) picker(key).value = chosen;
  figures.push(...answer.figures);
  answer.figures.forEach((figure) => watcher.observe(place(figure)));
  redraw(answer.figures);
}

for (const control of document.querySelectorAll("button[data-layers]"))
  control.addEventListener("click", async () => {
    const key = control.dataset.layers, box = document.getElementById(`${key}-layers`);
    const hide = shownLayers.delete(key);
    control.setAttribute("aria-expanded", String(!hide));
    control.textContent = hide ? "Show layers" : "Hide layers";
    if (hide) box.hidden = true; else await showLayers(key).catch(() => { statusLine.textContent = "The layers can't be had"; });
  });
addEventListener("toggle", ({ target }) => {
  if (!target.matches || !target.matches("details.numbers[open]")) return;
  if (target.dataset.figure in layerTables) fill(target); else speak().catch(() => {});
}, true);

const KEPT = "distnorm";
function keep() {
  sessionStorage.setItem(KEPT, JSON.stringify({ theme: root.dataset.theme, top: scrollY, shownSteps, ...view }));
}
const kept = JSON.parse(sessionStorage.getItem(KEPT) || "null");
if (kept) {
  sessionStorage.removeItem(KEPT);
  if (kept.theme) root.dataset.theme = kept.theme;
  form.elements.smoothing.value = kept.smoothing;
  form.elements.axis.value = kept.axis;
  Object.assign(shownSteps, kept.shownSteps);
  look();
  themed();
  scrollTo(0, kept.top);
}
again();
