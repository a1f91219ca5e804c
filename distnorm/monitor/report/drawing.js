// Figures as plotly takes them. Colours are the page's own custom properties, "@name" in a figure, so that light, dark
// and print need no second set.
const root = document.documentElement;
let printing = false;

const probe = document.body.appendChild(document.createElement("span"));
probe.hidden = true;
function colour(name) {
  probe.style.color = `var(--${name.replace("@", "")})`;
  return getComputedStyle(probe).color;
}

const ruler = document.createElement("canvas").getContext("2d");
// How wide the widest of some tick labels is; an entity is one character.
function widest(texts) {
  ruler.font = "11px system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif";
  return Math.max(0, ...texts.map((text) => ruler.measureText(text.replace(/&#?\w+;/g, "m")).width));
}

const place = (figure) => document.getElementById(figure.id);
const isNarrow = (div) => div.clientWidth < 520;

function screenHeight(figure, div) {
  figure.screenHeight = figure.screenHeight || div.clientHeight;
  return figure.screenHeight;
}

function baseLayout(div, figure) {
  const axis = { gridcolor: colour("rule"), zeroline: false, linecolor: colour("rule"),
    tickfont: { size: 11 }, title: { font: { size: 12 }, standoff: 8 }, separatethousands: true, exponentformat: "power", minexponent: 5 };
  return {
    axis,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif", size: 12, color: colour("ink") },
    // Room for what stands there: with plotly's automargin every chart would be drawn twice.
    margin: { l: 70, r: 14, t: 30, b: 48 },
    width: printing ? 690 : div.clientWidth,
    height: figure.height || Math.round(screenHeight(figure, div) * (printing ? 0.85 : 1)),
    hovermode: "x unified",
    hoverlabel: { bgcolor: colour("paper"), bordercolor: colour("rule"), font: { color: colour("ink") } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
  };
}

function merged(base, own) {
  const { axis, ...layout } = { ...base, ...own };
  for (const key of ["xaxis", "yaxis"]) {
    const mine = own[key] || {};
    layout[key] = { ...axis, ...mine, title: { ...axis.title, ...(mine.title || {}) } };
  }
  return layout;
}

// Ticks at 1, 2 and 5 within a few decades, at powers of ten beyond; plotly's own where even those are too far apart.
function logTicks(axis, values) {
  let low = Infinity, high = 0;
  for (const each of values)
    for (const value of each)
      if (value > 0 && value < Infinity) { low = Math.min(low, value); high = Math.max(high, value); }
  if (axis.type !== "log" || !high) return;
  const decades = Math.log10(high) - Math.log10(low);
  if (decades > 3) Object.assign(axis, { dtick: Math.ceil(decades / 6), exponentformat: "power", minexponent: 3 });
  else if (decades > 0.7) Object.assign(axis, { dtick: "D2", tickformat: "~g" });
  else Object.assign(axis, { tickformat: ".3~g", nticks: 5 });
}

const shorten = (text, most) => {
  // Entities stand for one character each: cutting one in two would show its letters.
  const chars = text.match(/&#?\w+;|[^]/gu) || [];
  const half = (most - 1) / 2;
  return chars.length <= most ? text
    : chars.slice(0, Math.ceil(half)).join("") + "…" + chars.slice(-Math.floor(half)).join("");
};

const power = (exponent) => `10<sup>${exponent < 0 ? "−" + -exponent : exponent}</sup>`;
function readable(value) {
  if (!Number.isFinite(value)) return "";
  if (value === 0) return "0";
  const size = Math.abs(value);
  // By hand: toLocaleString takes longer than all else that a chart of a thousand points does.
  if (size >= 1000 && size < 1e6) return String(Math.round(value)).replace(/\d(?=(\d{3})+$)/g, "$&,");
  if (size >= 1e-3 && size < 1000) return String(Number(value.toPrecision(4)));
  return value.toExponential(2).replace(/\.?0*e\+?/, "e");
}
const percent = (value) => `${readable(Number((100 * value).toPrecision(3)))}%`;

const UNSMOOTHED = ["threshold", "learning_rate"];
// The traces of one line of a chart: a smoothed one lies over what it smooths; or marks where rows have a flag.
function traced(line, figure, from, to, log) {
  const run = runs[line.run], x = places(run), ink = colour(line.colour);
  if (!x) return [];
  if (line.marks) {
    const kept = [];
    for (let at = from; at < to; at++) if (run.columns.flags[at] & line.marks) kept.push(at);
    const heights = kept.map((at) => line.edge || run.columns[line.column][at]);
    const some = kept.length <= MOST_MARKS ? kept : extremes(heights, 0, kept.length, MOST_MARKS / 2).map((at) => kept[at]);
    const y = some.map((at) => line.edge || run.columns[line.column][at]);
    return some.length ? [{ type: "scatter", mode: "markers", name: line.name, x: some.map((at) => x[at]), y,
      marker: { color: ink, symbol: line.symbol, size: 7, line: { width: 1, color: colour("paper") } },
      text: line.edge ? some.map((at) => `step ${run.columns.step[at]}`) : y.map(readable), hovertemplate: "%{text}",
      ...(line.edge ? { yaxis: "y2" } : {}) }] : [];
  }
  const values = column(run, line.column);
  if (!values) return [];
  const made = (source, more) => {
    const [xs, ys] = thin(x, source, from, to);
    const y = log ? ys.map((value) => (value > 0 ? value : NaN)) : ys;
    const few = y.reduce((count, value) => count + !Number.isNaN(value), 0) < 3;
    return { type: "scatter", mode: few ? "lines+markers" : "lines", name: line.name, x: xs, y,
      line: { color: ink, dash: line.dash, width: line.width }, marker: { size: 7, color: ink },
      text: Array.from(y, figure.axis === "rate" ? percent : readable), hovertemplate: "%{text}", ...more };
  };
  if (!view.smoothing || UNSMOOTHED.includes(line.column)) return [made(values, {})];
  const pale = { opacity: 0.3, showlegend: false, hoverinfo: "skip", hovertemplate: undefined, text: undefined };
  return [made(values, pale), made(smoothed(run, line.column, log), {})];
}

function xAxis(figure) {
  if (view.axis === "elapsed") return { title: { text: `${unit()[0]} since the start` } };
  return view.axis === "clock" ? { title: { text: "time of day" }, type: "date" } : { title: { text: "step" } };
}

function plain(figure, div) {
  const log = figure.axis === "log", range = sight(figure);
  const traces = figure.lines.flatMap((line) => {
    const { step } = runs[line.run].columns;
    // One more on each side, so that lines leave through the edges; a range may end at a step or between two.
    const from = Math.max(0, firstFrom(step, range[0]) - 1), to = Math.min(step.length, firstFrom(step, range[1]) + 2);
    return traced(line, figure, from, to, log);
  });
  const named = traces.filter((trace) => trace.showlegend !== false);
  const rate = figure.axis === "rate" ? { tickformat: ".0%", rangemode: "tozero" } : {};
  const layout = merged(baseLayout(div, figure), {
    xaxis: xAxis(figure),
    yaxis: { title: { text: figure.word }, fixedrange: true, ...(log ? { type: "log" } : {}), ...rate },
    yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
    showlegend: named.length > 1 || figure.lines.some((line) => line.column.startsWith("group:") || figure.kind === "compare"),
  });
  logTicks(layout.yaxis, traces.filter((trace) => !trace.yaxis).map((trace) => trace.y));
  if (!layout.showlegend) layout.margin = { ...layout.margin, t: 10 };
  if (view.axis === "clock") layout.margin = { ...layout.margin, b: 62 }; // the day stands below the hours
  return [traces, layout];
}
