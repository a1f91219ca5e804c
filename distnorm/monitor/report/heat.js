// The map of layers. Its cells lie on a canvas under plotly's axes: plotly makes a picture of them, and encodes it, each
// time that anything of the chart changes, and that takes longer than a reader waits.
const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];

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
  return { low, high, tickvals, ticktext };
}

// What of the map is another only when its layers are: the columns' edges, the colours' range, a picture of a pixel a cell.
function mapOf(figure) {
  const trace = layersOf(figure);
  if (trace.map) return trace.map;
  const starts = Array.from(trace.starts), columns = starts.length;
  const width = columns > 1 ? Math.max(1, starts[columns - 1] - starts[columns - 2]) : 1;
  const edges = [...starts.map((start) => start - 0.5), Math.max(trace.end + 0.5, starts[columns - 1] - 0.5 + width)];
  const range = colourRange(trace.z);
  trace.map = { edges, range, picture: pictured(trace.z, range) };
  return trace.map;
}

function pictured(z, { low, high }) {
  const picture = document.createElement("canvas");
  [picture.width, picture.height] = [z[0].length, z.length];
  const context = picture.getContext("2d"), image = context.createImageData(picture.width, picture.height);
  const shades = VIRIDIS.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  z.forEach((values, row) => values.forEach((value, column) => {
    if (Number.isNaN(value)) return;
    const share = Math.min(1, Math.max(0, (value - low) / (high - low))) * (shades.length - 1);
    const from = Math.min(shades.length - 2, Math.floor(share)), at = 4 * (row * picture.width + column);
    for (let part = 0; part < 3; part++)
      image.data[at + part] = shades[from][part] + (share - from) * (shades[from + 1][part] - shades[from][part]);
    image.data[at + 3] = 255;
  }));
  context.putImageData(image, 0, 0);
  return picture;
}

function heat(figure, div) {
  const trace = layersOf(figure), { low, high, tickvals, ticktext } = mapOf(figure).range;
  figure.height = heights(trace.z.length);
  const scale = { color: [low], cmin: low, cmax: high, colorscale: VIRIDIS.map((hex, at) => [at / (VIRIDIS.length - 1), hex]),
    colorbar: { title: { text: "norm", side: "top" }, thickness: 12, outlinewidth: 0, tickvals, ticktext, len: 1,
      tickfont: { size: 11 }, x: 1, xpad: 16 } };
  // A point that is nowhere, for the scale beside the map.
  const traces = [{ type: "scatter", mode: "markers", x: [null], y: [null], marker: scale, hoverinfo: "skip", showlegend: false }];
  const layout = merged(baseLayout(div, figure), {
    hovermode: false,
    margin: { l: besides(div, trace.names), r: 84, t: 16, b: 48 },
    xaxis: { title: { text: "step" }, showgrid: false },
    yaxis: rowAxis(figure, div),
  });
  return [traces, layout];
}

// Draw the cells that are in sight, and the mark of the picked layer.
function paint(figure) {
  const div = place(figure), trace = layersOf(figure), { edges, picture } = mapOf(figure);
  const { _size: { l, t, w, h }, xaxis, yaxis } = div._fullLayout;
  const canvas = div.querySelector("canvas") || div.insertBefore(document.createElement("canvas"), div.firstChild);
  const dots = printing ? 2 : devicePixelRatio;
  Object.assign(canvas.style, { left: `${l}px`, top: `${t}px`, width: `${w}px`, height: `${h}px` });
  [canvas.width, canvas.height] = [Math.round(w * dots), Math.round(h * dots)];
  const along = (from, to, size) => (value) => Math.round(((value - from) / (to - from)) * size);
  const x = along(xaxis.range[0], xaxis.range[1], canvas.width), y = along(yaxis.range[1], yaxis.range[0], canvas.height);
  const context = canvas.getContext("2d"), top = y(-0.5), bottom = y(picture.height - 0.5);
  context.imageSmoothingEnabled = false;
  for (let column = 0; column < picture.width; column++) {
    const left = x(edges[column]), right = x(edges[column + 1]);
    if (right > 0 && left < canvas.width)
      context.drawImage(picture, column, 0, 1, picture.height, left, top, right - left, bottom - top);
  }
  // A pixel each at least: one that is not finite is seen however many layers there are.
  for (const [cells, name] of [[trace.zeros, "zero"], [trace.broken, "broken"]]) {
    context.fillStyle = colour(name);
    for (const [row, column] of cells) {
      const left = x(edges[column]), upper = y(row - 0.5);
      context.fillRect(left, upper, Math.max(1, x(edges[column + 1]) - left), Math.max(1, y(row + 0.5) - upper));
    }
  }
  mark(figure);
}

// The row and column under the pointer, if any.
function cellAt(figure, { clientX, clientY }) {
  const div = place(figure), { _size: { w, h }, xaxis, yaxis } = div._fullLayout, { edges, picture } = mapOf(figure);
  const box = div.querySelector("canvas").getBoundingClientRect(), across = (clientX - box.left) / w, down = (clientY - box.top) / h;
  const step = xaxis.range[0] + across * (xaxis.range[1] - xaxis.range[0]);
  const row = Math.round(yaxis.range[1] + down * (yaxis.range[0] - yaxis.range[1])), column = firstFrom(edges, step) - 1;
  const isInside = across >= 0 && across <= 1 && down >= 0 && down <= 1;
  return isInside && row >= 0 && row < picture.height && column >= 0 && column < picture.width ? [row, column] : null;
}

const tip = document.body.appendChild(document.createElement("div"));
tip.className = "tip";
tip.hidden = true;
function showTip(figure, event) {
  const trace = layersOf(figure), cell = cellAt(figure, event);
  tip.hidden = !cell;
  if (!cell) return;
  const [row, column] = cell, norm = trace.z[row][column];
  const is = (cells) => cells.some((other) => other[0] === row && other[1] === column);
  const measured = Number.isNaN(norm) ? "no norm" : `norm ${readable(10 ** norm)}`;
  const says = is(trace.broken) ? "not finite" : is(trace.zeros) ? "all zero" : measured;
  tip.innerHTML = `${trace.names[row]}<br>steps ${trace.bins[column]}<br>${says}`; // names are escaped already
  tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${event.clientY + 14}px`;
}

// plotly tells of its own points only. A press that doesn't become a drag picks a layer; where it ends, plotly may have
// laid something over the page.
function wireHeat(figure, div) {
  for (const moved of ["plotly_relayouting", "plotly_relayout"]) div.on(moved, () => paint(figure));
  div.addEventListener("pointermove", (event) => showTip(figure, event));
  div.addEventListener("pointerleave", () => { tip.hidden = true; });
  div.addEventListener("pointerdown", (down) => {
    const cell = cellAt(figure, down);
    addEventListener("pointerup", (up) => {
      const isStill = up.pointerId === down.pointerId && Math.hypot(up.clientX - down.clientX, up.clientY - down.clientY) < 5;
      if (!cell || !isStill) return;
      picker(figure.run).value = cell[0];
      pick(figure.run);
    }, { once: true });
  });
}

const picker = (run) => document.querySelector(`select[data-run="${run}"]`);
// Where the picked layer is: an arrow at its row, and a frame where rows are high enough to keep their colours in it.
function mark(figure) {
  const div = place(figure), { l, t, w, h } = div._fullLayout._size, [low, high] = div._fullLayout.yaxis.range;
  const row = Number((picker(figure.run) || { value: -9 }).value), at = (value) => ((value - high) / (low - high)) * h;
  const over = div.querySelector(".mark") || div.appendChild(document.createElement("div"));
  const top = Math.max(0, at(row - 0.5)), bottom = Math.min(h, at(row + 0.5));
  over.className = layersOf(figure).z.length <= 60 ? "mark framed" : "mark";
  over.hidden = bottom <= top;
  Object.assign(over.style, { left: `${l}px`, width: `${w}px`, top: `${t + top}px`, height: `${bottom - top}px` });
}
