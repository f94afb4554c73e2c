"use strict";
// Draws the charts of the page from the numbers in it, and moves the slider's pictures. Nothing is loaded.
const data = JSON.parse(document.getElementById("data").textContent);
const WIDTH_LEAST = 200, HEIGHT = 230, LEFT = 54, RIGHT = 14, TOP = 10, BOTTOM = 36;
const DASHES = ["", "6 3", "2 3", "8 3 2 3"]; // beyond eight series the colours come again, with another dash
let smoothing = 0;

function add(parent, name, attributes = {}, text = null) {
  const namespace = name === "li" || name === "span" ? "http://www.w3.org/1999/xhtml" : "http://www.w3.org/2000/svg";
  const node = document.createElementNS(namespace, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text; // never as HTML: names come from files
  parent.append(node);
  return node;
}

function format(value, digits = 5) {
  if (value === null || value === undefined) return "not finite";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(digits - 2);
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  return Number(value.toPrecision(digits)).toLocaleString("en-US", { maximumFractionDigits: 8 });
}

function short(value) { // for the axes
  const size = Math.abs(value);
  for (const [unit, name] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit) return Number((value / unit).toPrecision(4)) + name;
  }
  return size !== 0 && size < 1e-3 ? value.toExponential(0) : String(Number(value.toPrecision(4)));
}

function linearTicks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-6); k * step <= high + step * 1e-6; k++) ticks.push(k * step);
  return ticks;
}

function logTicks(low, high) {
  const ticks = [], first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const factors = last - first > 3 ? [1] : [1, 2, 5], every = Math.ceil((last - first) / 8);
  for (let k = first; k <= last; k += every) {
    for (const factor of factors) {
      const tick = factor * 10 ** k;
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  }
  return ticks.length > 1 ? ticks : linearTicks(low, high, 4);
}

function smoothed(values) { // exponential mean, unbiased at the start; rows that are not finite have no part
  if (!smoothing) return values;
  let sum = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = smoothing * sum + (1 - smoothing) * value;
    weight = smoothing * weight + 1 - smoothing;
    return sum / weight;
  });
}

function seriesOf(chart) {
  return chart.series.map((series) => {
    const columns = series.run === undefined ? null : data.runs[series.run].columns;
    return { label: series.label, x: columns ? columns.step : series.x, raw: columns ? columns[series.column] : series.y,
             fromLog: Boolean(columns), color: series.color };
  });
}

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
}

function draw(figure) {
  const chart = data.charts[Number(figure.dataset.chart)], log = figure.dataset.scale === "log";
  const all = seriesOf(chart).map((series) => ({ ...series, y: series.fromLog ? smoothed(series.raw) : series.raw }));
  const usable = (value) => value !== null && (!log || value > 0);
  const xs = all.flatMap((series) => series.x), ys = all.flatMap((series) => series.raw.filter(usable));
  const plot = figure.querySelector(".plot"), legend = figure.querySelector(".legend");
  plot.replaceChildren();
  const width = Math.max(WIDTH_LEAST, plot.clientWidth);
  const svg = add(plot, "svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": chart.title });
  let [xLow, xHigh] = [xs.reduce((a, b) => Math.min(a, b), Infinity), xs.reduce((a, b) => Math.max(a, b), -Infinity)];
  let [yLow, yHigh] = [ys.reduce((a, b) => Math.min(a, b), Infinity), ys.reduce((a, b) => Math.max(a, b), -Infinity)];
  if (!ys.length) {
    add(svg, "text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "no finite value");
    [yLow, yHigh] = [0, 1];
  }
  if (xLow === xHigh) [xLow, xHigh] = [xLow - 1, xHigh + 1];
  if (yLow === yHigh) [yLow, yHigh] = log ? [yLow / 2, yHigh * 2] : [yLow - (Math.abs(yLow) * 0.1 || 1), yHigh + (Math.abs(yHigh) * 0.1 || 1)];
  else if (!log) [yLow, yHigh] = [yLow - (yLow === 0 ? 0 : 0.03) * (yHigh - yLow), yHigh + 0.03 * (yHigh - yLow)];
  const mapX = (x) => LEFT + (x - xLow) / (xHigh - xLow) * (width - LEFT - RIGHT);
  const scale = log ? Math.log10 : (value) => value;
  const mapY = (y) => HEIGHT - BOTTOM - (scale(y) - scale(yLow)) / (scale(yHigh) - scale(yLow)) * (HEIGHT - TOP - BOTTOM);

  for (const tick of log ? logTicks(yLow, yHigh) : linearTicks(yLow, yHigh, 5)) {
    add(svg, "line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: mapY(tick), y2: mapY(tick) });
    add(svg, "text", { x: LEFT - 6, y: mapY(tick) + 4, "text-anchor": "end" }, short(tick));
  }
  for (const tick of linearTicks(xLow, xHigh, Math.max(2, Math.floor(width / 90)))) {
    add(svg, "line", { class: "axis", x1: mapX(tick), x2: mapX(tick), y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM + 4 });
    add(svg, "text", { x: mapX(tick), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, short(tick));
  }
  add(svg, "line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM });
  add(svg, "text", { x: width - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, chart.x);

  const style = (series) => ({ style: `stroke:var(--c${series.color % 8});stroke-dasharray:${DASHES[Math.floor(series.color / 8) % 4] || "none"}` });
  const line = (series, values, name) => {
    let path = "", pen = "M";
    values.forEach((value, index) => {
      if (!usable(value)) { pen = "M"; return; } // a gap where a row is not finite
      path += `${pen}${mapX(series.x[index]).toFixed(1)} ${mapY(value).toFixed(1)}`;
      pen = "L";
    });
    if (path) add(svg, "path", { d: path, class: name, ...style(series) });
  };
  for (const series of all) {
    if (series.fromLog && smoothing) line(series, series.raw, "raw");
    line(series, series.y, series.fromLog && !smoothing && series.x.length > 300 ? "many" : "line");
    if (series.x.length <= 40) {
      series.y.forEach((value, index) => {
        if (usable(value)) add(svg, "circle", { cx: mapX(series.x[index]), cy: mapY(value), r: 2.5, style: `fill:var(--c${series.color % 8})` });
      });
    }
  }
  const cursor = add(svg, "line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });

  function showValues(x) { // the values nearest to x, or the last ones
    const places = all.map((series) => x === null ? series.x.length - 1 : nearest(series.x, x));
    const shown = all.map((series, index) => series.x[places[index]]), most = shown.reduce((a, b) => Math.max(a, b));
    legend.replaceChildren();
    add(legend, "li", {}, `${chart.x} ${format(most)}`);
    all.forEach((series, index) => {
      const item = add(legend, "li"), value = series.raw[places[index]];
      const swatch = add(item, "span", { class: "swatch" });
      swatch.style.borderTopColor = `var(--c${series.color % 8})`;
      if (series.color >= 8) swatch.style.borderTopStyle = "dashed";
      const smooth = smoothing && series.fromLog ? ` (smooth ${format(series.y[places[index]])})` : "";
      const elsewhere = shown[index] === most ? "" : ` (at ${format(shown[index])})`;
      add(item, "span", {}, `${series.label ? series.label + ": " : ""}${format(value)}${smooth}${elsewhere}`);
    });
  }
  showValues(null);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), place = (event.clientX - box.left) * width / box.width;
    const x = xLow + (Math.min(Math.max(place, LEFT), width - RIGHT) - LEFT) / (width - LEFT - RIGHT) * (xHigh - xLow);
    cursor.setAttribute("x1", mapX(x));
    cursor.setAttribute("x2", mapX(x));
    cursor.setAttribute("visibility", "visible");
    showValues(x);
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); showValues(null); });
}

const figures = [...document.querySelectorAll("[data-chart]")];
for (const figure of figures) {
  const button = figure.querySelector("button");
  const values = seriesOf(data.charts[Number(figure.dataset.chart)]).flatMap((series) => series.raw);
  button.disabled = !values.some((value) => value > 0);
  button.addEventListener("click", () => {
    figure.dataset.scale = figure.dataset.scale === "log" ? "linear" : "log";
    button.textContent = figure.dataset.scale;
    draw(figure);
  });
  draw(figure);
}
let drawnWidth = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth !== drawnWidth) figures.forEach(draw);
  drawnWidth = window.innerWidth;
});

const smooth = document.getElementById("smoothing");
if (smooth) {
  smooth.addEventListener("input", () => {
    smoothing = Number(smooth.value);
    smooth.parentElement.querySelector("output").textContent = smoothing ? smoothing.toFixed(2) : "none";
    figures.forEach(draw);
  });
}

const slider = document.getElementById("slider");
if (slider) {
  slider.addEventListener("input", () => {
    const step = data.grid_steps[Number(slider.value)];
    slider.parentElement.querySelector("output").textContent = `step ${format(step)}`;
    for (const figure of document.querySelectorAll("[data-grids]")) {
      let found = false;
      for (const picture of figure.querySelectorAll("img")) {
        picture.hidden = Number(picture.dataset.step) !== step;
        found = found || !picture.hidden;
      }
      figure.querySelector(".missing").hidden = found;
    }
  });
}
