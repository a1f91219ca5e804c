"use strict";
// The runs' columns as the page holds them, and what of them is drawn: smoothed, and thinned to what a screen shows.
const page = JSON.parse(document.getElementById("page").textContent);
const figures = page.figures;
const view = { smoothing: 0, axis: "step" };

function unpack(value) {
  const bytes = Uint8Array.from(atob(value.bdata), (char) => char.charCodeAt(0));
  const kind = { f8: Float64Array, f4: Float32Array, i4: Int32Array }[value.dtype];
  return new kind(bytes.buffer);
}
const unpackColumns = (columns) =>
  Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, unpack(column)]));
const runs = page.runs.map((run) => ({ columns: unpackColumns(run.columns), derived: new Map() }));

// Rows that have come since; a number that was never there before is not known of the earlier ones.
function append(run, columns) {
  const before = run.columns.step.length, more = columns.step.length;
  for (const name of new Set([...Object.keys(run.columns), ...Object.keys(columns)])) {
    const kind = (run.columns[name] || columns[name]).constructor;
    const grown = new kind(before + more).fill(kind === Float64Array ? NaN : 0);
    if (run.columns[name]) grown.set(run.columns[name]);
    if (columns[name]) grown.set(columns[name], before);
    run.columns[name] = grown;
  }
}

// A column, or what is worked out of some; kept until the runs have other rows.
function derive(run, key, make) {
  const rows = runs[0].columns.step.length + run.columns.step.length;
  const known = run.derived.get(key);
  if (known && known.rows === rows) return known.values;
  const values = make();
  run.derived.set(key, { rows, values });
  return values;
}

function column(run, name) {
  return name === "difference" ? derive(run, name, () => differences(run)) : run.columns[name];
}

// |a - b| over the larger, against the first run, at steps that both have; equal ones are none.
function differences(run) {
  const base = runs[0].columns, found = new Float64Array(run.columns.step.length).fill(NaN);
  let at = 0;
  run.columns.step.forEach((step, place) => {
    while (at < base.step.length && base.step[at] < step) at++;
    const a = base.step[at] === step ? base.norm[at] : NaN, b = run.columns.norm[place];
    if (a !== b) found[place] = Math.abs(a - b) / Math.max(Math.abs(a), Math.abs(b));
  });
  return found;
}

// The average that forgets: m <- w m + (1 - w) y, divided by 1 - w^n; of logarithms where the axis is logarithmic.
function smoothed(run, name, log) {
  const weight = view.smoothing;
  return derive(run, `${name} ${weight} ${log}`, () => {
    let sum = 0, total = 0;
    return column(run, name).map((value) => {
      if (Number.isNaN(value) || (log && value <= 0)) return NaN;
      sum = weight * sum + (1 - weight) * (log ? Math.log(value) : value);
      total = weight * total + (1 - weight);
      return log ? Math.exp(sum / total) : sum / total;
    });
  });
}

// The place of the first of ascending values that is at least `value`.
function firstFrom(values, value) {
  let low = 0, high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < value) low = middle + 1; else high = middle;
  }
  return low;
}

const shift = new Date().getTimezoneOffset() * 60000; // plotly shows UTC
const unit = () => {
  const longest = Math.max(...runs.map(({ columns: { time } }) => (time ? time[time.length - 1] - time[0] : 0)));
  return longest > 172800 ? ["days", 86400] : longest > 7200 ? ["hours", 3600] : longest > 120 ? ["minutes", 60] : ["seconds", 1];
};
// Where steps lie on the axis that is chosen; null where this run doesn't know when its steps were.
function places(run) {
  const { step, time } = run.columns;
  if (view.axis === "step") return step;
  if (!time) return null;
  const [, seconds] = unit();
  return derive(run, view.axis + seconds, () =>
    view.axis === "clock" ? time.map((value) => value * 1000 - shift) : time.map((value) => (value - time[0]) / seconds));
}
// A step on that axis, and back: between two rows in proportion.
function between(from, to, value) {
  if (!from || !from.length) return value;
  const next = Math.min(Math.max(1, firstFrom(from, value)), from.length - 1);
  if (next < 1) return to[0];
  const share = (value - from[next - 1]) / (from[next] - from[next - 1] || 1);
  return to[next - 1] + share * (to[next] - to[next - 1]);
}
const toAxis = (run, step) => (view.axis === "step" ? step : between(run.columns.step, places(run), step));
const fromAxis = (run, x) => (view.axis === "step" ? x : between(places(run), run.columns.step, x));

// What is drawn of a column in sight: all of it, or the lowest and highest of each bin, which look the same.
const MOST = 1000, MOST_MARKS = 80; // each mark is an element of its own, a line is one
function thin(x, y, from, to) {
  if (to - from <= MOST) return [x.slice(from, to), y.slice(from, to)];
  const kept = extremes(y, from, to, MOST / 2);
  return [x.constructor.from(kept, (at) => x[at]), y.constructor.from(kept, (at) => y[at])];
}
function extremes(y, from, to, bins) {
  const kept = [];
  for (let bin = 0; bin < bins; bin++) {
    const start = from + Math.floor((bin * (to - from)) / bins), end = from + Math.floor(((bin + 1) * (to - from)) / bins);
    let low = -1, high = -1;
    for (let at = start; at < end; at++) {
      if (Number.isNaN(y[at])) continue;
      if (low < 0 || y[at] < y[low]) low = at;
      if (high < 0 || y[at] > y[high]) high = at;
    }
    if (low < 0) kept.push(start);
    else if (low === high) kept.push(low);
    else kept.push(Math.min(low, high), Math.max(low, high));
  }
  return kept;
}
