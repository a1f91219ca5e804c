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
// The rows that the reader chose to see, or all of them, with names beside those that have room for one.
function rowAxis(figure, div) {
  const { names } = layersOf(figure), range = (figure.shownRows || [names.length - 0.5, -0.5]).slice();
  const from = Math.max(0, Math.ceil(Math.min(...range))), to = Math.min(names.length - 1, Math.floor(Math.max(...range)));
  const every = Math.max(1, Math.ceil(((to - from + 1) * 14) / Math.max(60, figure.height - 90)));
  const tickvals = [];
  for (let row = from; row <= to; row += every) tickvals.push(row);
  // There is room for all of them: plotly would measure each again to see.
  const ticktext = tickvals.map((row) => beside(div, names[row]));
  return { range, showgrid: false, tickvals, ticktext, ticklabeloverflow: "allow" };
}

const heights = (rows) => Math.min(820, Math.max(240, rows * 16 + 100));

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
    yaxis: rowAxis(figure, div),
    shapes: isCrowded ? crowded(column, known, figure.height / rows) : [],
  });
  logTicks(layout.xaxis, [positive]);
  if (isCrowded) layout.xaxis.range = [column(1), column(5)].map((ends, most) => Math.log10(Math[most ? "max" : "min"](...ends)) + (most ? 0.05 : -0.05));
  return [traces, layout];
}

const layerMakers = { heat, picked, spread };
