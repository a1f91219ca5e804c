// The charts of a run's layers.
const unpacked = new WeakMap();
function layersOf(figure) {
  if (!unpacked.has(figure.layers)) {
    const { z, starts, spread: boxes, ...more } = figure.layers;
    unpacked.set(figure.layers, { z: z && z.map(unpack), starts: starts && unpack(starts), spread: boxes && boxes.map(unpack), ...more });
  }
  return unpacked.get(figure.layers);
}

const beside = (div, name) => shorten(name.replace(/\.weight$/, ""), isNarrow(div) && !printing ? 18 : 30);
const besides = (div, names) => Math.ceil(widest(names.map((name) => beside(div, name)))) + 14;
// Names beside the rows that have room for one, among the rows in sight.
function rowTicks(div, names, height, range) {
  const [low, high] = range ? [Math.min(...range), Math.max(...range)] : [-0.5, names.length - 0.5];
  const from = Math.max(0, Math.ceil(low)), to = Math.min(names.length - 1, Math.floor(high));
  const every = Math.max(1, Math.ceil(((to - from + 1) * 14) / Math.max(60, height - 90)));
  const tickvals = [];
  for (let row = from; row <= to; row += every) tickvals.push(row);
  return { tickvals, ticktext: tickvals.map((row) => beside(div, names[row])) };
}

// Where a few extreme cells would take most of the colours, the scale ends at the 0.5th and 99.5th percentile.
function colourRange(z) {
  const all = Float64Array.from(z.flatMap((row) => Array.from(row).filter((value) => !Number.isNaN(value)))).sort();
  const at = (share) => all[Math.round(share * (all.length - 1))];
  let [low, high] = [all[0], all[all.length - 1]];
  const cut = { low: at(0.005) - low > 1, high: high - at(0.995) > 1 };
  if (cut.low) low = at(0.005);
  if (cut.high) high = at(0.995);
  if (high - low < 0.5) [low, high] = [low - 0.25, high + 0.25];
  const every = Math.max(1, Math.ceil((high - low) / 6));
  let tickvals = [];
  for (let tick = Math.ceil(low); tick <= high; tick += every) tickvals.push(tick);
  let ticktext = tickvals.map(power);
  if (tickvals.length < 2) {
    tickvals = [low, (low + high) / 2, high];
    ticktext = tickvals.map((value) => readable(Number((10 ** value).toPrecision(2))));
  }
  if (cut.low) { tickvals.unshift(low); ticktext.unshift("less"); }
  if (cut.high) { tickvals.push(high); ticktext.push("more"); }
  return { zmin: low, zmax: high, tickvals, ticktext };
}

const heights = (rows) => Math.min(820, Math.max(240, rows * 16 + 100));

function heat(figure, div) {
  const trace = layersOf(figure);
  const rows = trace.z.length, columns = trace.bins.length;
  figure.height = heights(rows);
  const starts = Array.from(trace.starts);
  const width = columns > 1 ? Math.max(1, starts[columns - 1] - starts[columns - 2]) : 1;
  const x = [...starts.map((start) => start - 0.5), Math.max(trace.end + 0.5, starts[columns - 1] - 0.5 + width)];
  const y = trace.z.map((_, row) => row);
  trace.range = trace.range || colourRange(trace.z);
  const range = trace.range, hover = { hoverinfo: "none" }; // `tip` says what is under the pointer, without a text a cell
  const traces = [{
    type: "heatmap", x, y, z: trace.z, ...hover, colorscale: "Viridis", zmin: range.zmin, zmax: range.zmax,
    colorbar: { title: { text: "norm", side: "top" }, thickness: 12, outlinewidth: 0, tickvals: range.tickvals,
      ticktext: range.ticktext, len: 1, tickfont: { size: 11 }, x: 1, xpad: 16 },
  }];
  if (trace.zeros.length + trace.broken.length) {
    const marks = y.map(() => new Array(columns).fill(null));
    for (const [row, column] of trace.zeros) marks[row][column] = 0;
    for (const [row, column] of trace.broken) marks[row][column] = 1;
    trace.marks = marks;
    traces.push({ type: "heatmap", x, y, z: marks, ...hover, showscale: false, zmin: 0, zmax: 1,
      colorscale: [[0, colour("zero")], [0.5, colour("zero")], [0.5, colour("broken")], [1, colour("broken")]] });
  }
  const layout = merged(baseLayout(div, figure), {
    hovermode: "closest",
    plot_bgcolor: colour("band"),
    margin: { l: besides(div, trace.names), r: 84, t: 16, b: 48 },
    xaxis: { title: { text: "step" }, showgrid: false },
    yaxis: { range: [rows - 0.5, -0.5], showgrid: false, ...rowTicks(div, trace.names, figure.height) },
  });
  return [traces, layout];
}

const tip = document.body.appendChild(document.createElement("div"));
tip.className = "tip";
tip.hidden = true;
function showTip(figure, event) {
  const trace = layersOf(figure), [row, column] = event.points[0].pointIndex || event.points[0].pointNumber;
  const mark = trace.marks ? trace.marks[row][column] : null;
  const says = mark === 1 ? "not finite" : mark === 0 ? "all zero" : `norm ${readable(10 ** trace.z[row][column])}`;
  tip.innerHTML = `${trace.names[row]}<br>steps ${trace.bins[column]}<br>${says}`; // names are escaped already
  tip.hidden = false;
  const { clientX, clientY } = event.event;
  tip.style.left = `${Math.min(clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${clientY + 14}px`;
}

const picker = (run) => document.querySelector(`select[data-run="${run}"]`);
// Where the picked layer is: an arrow at its row, and a frame where rows are high enough to keep their colours in it.
// It lies over the picture, which takes long to draw again.
function mark(figure) {
  const div = place(figure), { l, t, w, h } = div._fullLayout._size, [low, high] = div._fullLayout.yaxis.range;
  const row = Number((picker(figure.run) || { value: -9 }).value), at = (value) => ((value - high) / (low - high)) * h;
  const over = div.querySelector(".mark") || div.appendChild(document.createElement("div"));
  const top = Math.max(0, at(row - 0.5)), bottom = Math.min(h, at(row + 0.5));
  over.className = layersOf(figure).z.length <= 60 ? "mark framed" : "mark";
  over.hidden = bottom <= top;
  Object.assign(over.style, { left: `${l}px`, width: `${w}px`, top: `${t + top}px`, height: `${bottom - top}px` });
}

function picked(figure, div) {
  const source = figures.find((other) => other.run === figure.run && other.kind === "heat");
  const { z, starts, names } = layersOf(source);
  if (!figure.band) {
    const sorted = Array.from(starts, (_, column) =>
      z.map((row) => row[column]).filter((value) => !Number.isNaN(value)).sort((a, b) => a - b));
    const some = sorted.map((_, column) => column).filter((column) => sorted[column].length); // a gap breaks a band
    const at = (share) => some.map((column) => 10 ** sorted[column][Math.round(share * (sorted[column].length - 1))]);
    figure.band = [at(0.05), at(0.95)];
    figure.bandX = some.map((column) => starts[column]);
  }
  const row = Number(picker(figure.run).value);
  const x = Array.from(starts);
  const y = Array.from(z[row], (value) => (Number.isNaN(value) ? null : 10 ** value));
  const flat = { type: "scatter", mode: "lines", x: figure.bandX, line: { width: 0 }, hoverinfo: "skip", showlegend: false };
  const traces = [
    { ...flat, y: figure.band[0] },
    { ...flat, y: figure.band[1], fill: "tonexty", fillcolor: colour("band"), name: "90% of layers", showlegend: true },
    { type: "scatter", mode: y.filter((value) => value !== null).length < 3 ? "lines+markers" : "lines", x, y,
      name: shorten(names[row], 40), line: { color: colour("orange"), width: 1.8 }, text: y.map(readable), hovertemplate: "%{text}" },
  ];
  const layout = merged(baseLayout(div, figure), {
    xaxis: { title: { text: "step" } },
    yaxis: { title: { text: "norm" }, type: "log", fixedrange: true },
    showlegend: true,
  });
  logTicks(layout.yaxis, [...figure.band, y]);
  return [traces, layout];
}

// Hundreds of boxes as three paths: an element for each of them would take long to draw.
function crowded(column, rows, height) {
  const path = (line) => rows.map((row, at) => line(row, at)).join("");
  const shape = (line, width, ink) => ({ type: "path", path: path(line), line: { color: colour(ink), width }, layer: "below" });
  const across = (from, to) => (row, at) => `M${column(from)[at]},${row}L${column(to)[at]},${row}`;
  return [
    { ...shape(across(1, 5), 1, "blue"), opacity: 0.5 },
    shape(across(2, 4), Math.max(1.5, 0.6 * height), "blue"),
    shape((row, at) => `M${column(3)[at]},${row - 0.5}L${column(3)[at]},${row + 0.5}`, 1.5, "ink"),
  ];
}

function spread(figure, div) {
  const trace = layersOf(figure);
  const rows = trace.spread.length;
  figure.height = heights(rows);
  const positive = trace.spread.flatMap((of) => Array.from(of).filter((value) => value > 0));
  const floor = Math.min(...positive);
  const known = trace.spread.map((_, row) => row).filter((row) => !Number.isNaN(trace.spread[row][0]));
  const columns = [0, 1, 2, 3, 4, 5].map((index) => known.map((row) => Math.max(trace.spread[row][index], floor)));
  const column = (index) => columns[index];
  const said = known.map((row) => {
    const [least, low, , middle, , high, most] = Array.from(trace.spread[row], readable);
    return `${trace.names[row]}<br>median ${middle}<br>90%: ${low} to ${high}<br>all: ${least} to ${most}`;
  });
  const words = { text: said, hovertemplate: "%{text}<extra></extra>", showlegend: false };
  const isCrowded = rows > 80;
  const traces = isCrowded ? [{ type: "scatter", mode: "lines", line: { width: 0 }, x: column(3), y: known, ...words }] : [{
    type: "box", orientation: "h", y: known, lowerfence: column(1), q1: column(2),
    median: column(3), q3: column(4), upperfence: column(5), fillcolor: colour("band"), width: 0.8,
    line: { color: colour("blue"), width: 1.4 }, whiskerwidth: 0, hoverinfo: "skip", showlegend: false,
  }, {
    type: "scatter", mode: "markers", x: column(3), y: known, marker: { color: colour("blue"), size: 5 }, ...words,
  }];
  const layout = merged(baseLayout(div, figure), {
    hovermode: "closest",
    margin: { l: besides(div, trace.names), r: 14, t: 16, b: 48 },
    xaxis: { title: { text: "norm" }, type: "log", fixedrange: true },
    yaxis: { range: [rows - 0.5, -0.5], showgrid: false, ...rowTicks(div, trace.names, figure.height) },
    shapes: isCrowded ? crowded(column, known, figure.height / rows) : [],
  });
  logTicks(layout.xaxis, [positive]);
  if (isCrowded) layout.xaxis.range = [column(1), column(5)].map((ends, most) => Math.log10(Math[most ? "max" : "min"](...ends)) + (most ? 0.05 : -0.05));
  return [traces, layout];
}

const layerMakers = { heat, picked, spread };
