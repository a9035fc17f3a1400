// The roofline of a decode step, and throughput by batch: log-log, what is predicted as rings and what is measured as dots.

const TRAIL = 14;
const trail = [];
let lowest = Infinity;
let slowest = Infinity;

/** Round outwards to half decades, so that axes hold still. */
const floorTo = (value) => 10 ** (Math.floor(2 * Math.log10(value)) / 2);
const ceilTo = (value) => 10 ** (Math.ceil(2 * Math.log10(value)) / 2);

/** Powers of ten in a range, and 2 and 5 times them where it is short. */
function ticks(low, high) {
  const steps = Math.log10(high / low) < 2.2 ? [1, 2, 5] : [1];
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const step of steps) found.push(step * 10 ** power);
  }
  return found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
}

class Chart {
  constructor(figure, height) {
    this.figure = figure;
    this.height = height;
    this.svg = draw("svg", { role: "group" });
    this.still = draw("g");
    this.live = draw("g");
    this.trail = draw("g", { "aria-hidden": "true" });
    this.ring = this.mark("ring", 7.5);
    this.dot = this.mark("dot", 6.5);
    // From the dot up to the ring, in the dot's own group: they move together.
    this.gap = draw("line", { class: "gap mark", x1: 0, x2: 0, y1: 0, y2: -1 });
    this.dot.prepend(this.gap);
    this.live.append(this.trail, this.dot, this.ring);
    this.svg.append(this.still, this.live);
    figure.append(this.svg);
    this.drawn = "";
  }

  mark(name, radius) {
    const mark = draw("g", { class: "mark", tabindex: "0", role: "img" });
    mark.append(draw("circle", { class: name, r: radius }), draw("text", { class: "halo strong", y: 4 }));
    return mark;
  }

  /** Set the scales; false if nothing that stands still has changed. */
  frame(x, y, key) {
    const width = this.figure.clientWidth;
    const drawn = JSON.stringify([width, x, y, key]);
    if (drawn === this.drawn || !width) return false;
    this.drawn = drawn;
    this.box = { left: 76, right: width - 8, top: 20, bottom: this.height - 38 };
    [this.xs, this.ys] = [x, y];
    this.svg.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    this.svg.setAttribute("height", this.height);
    this.still.replaceChildren();
    return true;
  }

  x(value) { return this.box.left + ((this.box.right - this.box.left) * Math.log(value / this.xs[0])) / Math.log(this.xs[1] / this.xs[0]); }
  y(value) { return this.box.bottom - ((this.box.bottom - this.box.top) * Math.log(value / this.ys[0])) / Math.log(this.ys[1] / this.ys[0]); }

  put(name, attributes, text = null) {
    const element = draw(name, attributes, text);
    this.still.append(element);
    return element;
  }

  axes(xTitle, xLabel, yLabel) {
    const { left, right, top, bottom } = this.box;
    for (const value of ticks(...this.xs)) {
      this.put("line", { class: "grid", x1: this.x(value), x2: this.x(value), y1: top, y2: bottom });
      this.put("text", { x: this.x(value), y: bottom + 16, "text-anchor": "middle" }, xLabel(value));
    }
    for (const value of ticks(...this.ys)) {
      this.put("line", { class: "grid", x1: left, x2: right, y1: this.y(value), y2: this.y(value) });
      this.put("text", { x: left - 6, y: this.y(value) + 4, "text-anchor": "end" }, yLabel(value));
    }
    this.put("text", { x: (left + right) / 2, y: bottom + 33, "text-anchor": "middle" }, xTitle);
  }

  line(points, attributes) {
    return this.put("path", { d: `M${points.map(([x, y]) => `${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`).join(" L")}`, fill: "none", ...attributes });
  }

  /** A vertical line at the critical batch, with its name on top. */
  critical(x, batch) {
    const at = this.x(x);
    const group = draw("g", {
      "data-explain": "Critical batch: from so many requests decoded together, reading the weights is no longer what a step waits for; a long context moves it right, for caches are not shared.",
    });
    group.append(draw("line", { class: "critical", x1: at, x2: at, y1: this.box.top, y2: this.box.bottom }));
    group.append(draw("line", { class: "hit", x1: at, x2: at, y1: this.box.top, y2: this.box.bottom }));
    const anchor = at > this.box.right - 70 ? "end" : at < this.box.left + 70 ? "start" : "middle";
    group.append(draw("text", { class: "strong", x: at, y: this.box.top - 7, "text-anchor": anchor }, `critical batch ${figures(batch)}`));
    this.still.append(group);
  }

  span(low, high) {
    this.gap.style.transform = `scaleY(${(this.y(low) - this.y(high)).toFixed(1)})`;
  }

  move(mark, x, y, label, words) {
    const [px, py] = [this.x(x), this.y(y)];
    mark.style.transform = `translate(${px.toFixed(1)}px, ${py.toFixed(1)}px)`;
    const text = mark.lastChild;
    const left = px > this.box.right - 110;
    text.setAttribute("x", left ? -13 : 13);
    text.setAttribute("text-anchor", left ? "end" : "start");
    say(text, label);
    mark.dataset.explain = words;
    mark.setAttribute("aria-label", words);
  }
}

/** A value of the predicted path at a batch between its batches, on logarithmic scales. */
function along(path, batch, name) {
  const next = path.findIndex((one) => one.batch >= batch);
  if (next <= 0) return path.at(next === 0 ? 0 : -1)[name];
  const [a, b] = [path[next - 1], path[next]];
  return a[name] * (b[name] / a[name]) ** (Math.log(batch / a.batch) / Math.log(b.batch / a.batch));
}

const roofChart = new Chart($("roofline"), 330);
const batchChart = new Chart($("throughput"), 230);

function showRoofline() {
  const { roofline, decode } = engine;
  for (const id of ["roofline", "throughput"]) $(id).hidden = !roofline;
  showBatch(roofline, decode);
  if (!roofline) return say($("machine"), "This server shows no roofline: that of its machine is not known, or its batch is that of several devices.");
  const where = { measured: "measured on this machine", catalogue: "from the catalogue" }[roofline.source];
  say($("machine"), `${roofline.machine}: ${si(roofline.flops_per_s, "FLOP/s")} in ${roofline.dtype} and ${si(roofline.bytes_per_s, "B/s")} of memory (${where}), ridge at ${figures(roofline.ridge)} FLOP/byte. The step is predicted from the model’s operations and bytes alone.`);
  const { predicted, measured, path } = decode;
  // Room below the roof for what will be measured.
  if (lowest === Infinity) lowest = path[0].flops_per_s / 30;
  if (predicted) lowest = Math.min(lowest, measured.flops_per_s);
  drawRoof(roofline, path, predicted);
  drawThroughput(roofline, path, measured);
  for (const chart of [roofChart, batchChart]) chart.live.classList.toggle("idle", !decode.live);
  for (const chart of [roofChart, batchChart]) chart.live.setAttribute("visibility", predicted ? "visible" : "hidden");
  if (!predicted) return;
  const batch = `${plural(predicted.batch, "request")} of ${plural(predicted.cells, "token")} context`;
  const could = `Predicted: a step for ${batch} takes ${time(predicted.step_s)}, so ${si(predicted.flops_per_s, "FLOP/s")} and ${figures(predicted.tokens_per_s)} tokens/s.`;
  const above = measured.flops_per_s > predicted.flops_per_s ? " That is above the roof, which was measured too low, or the caches hold what the prediction reads from memory." : "";
  const did = `Measured: the last step for ${batch} took ${time(measured.step_s)}, so ${si(measured.flops_per_s, "FLOP/s")} and ${figures(measured.tokens_per_s)} tokens/s.${above}`;
  roofChart.move(roofChart.ring, predicted.intensity, predicted.flops_per_s, "", could);
  roofChart.move(roofChart.dot, predicted.intensity, measured.flops_per_s, si(measured.flops_per_s, "FLOP/s"), did);
  batchChart.move(batchChart.ring, predicted.batch, predicted.tokens_per_s, "", could);
  batchChart.move(batchChart.dot, predicted.batch, measured.tokens_per_s, `${figures(measured.tokens_per_s)} tokens/s`, did);
  roofChart.span(measured.flops_per_s, predicted.flops_per_s);
  batchChart.span(measured.tokens_per_s, predicted.tokens_per_s);
  showTrail(predicted.intensity, measured.flops_per_s);
}

function showTrail(x, y) {
  const last = trail.at(-1);
  if (!last || last[0] !== x || last[1] !== y) trail.push([x, y]);
  if (trail.length > TRAIL) trail.shift();
  roofChart.trail.replaceChildren(...trail.slice(0, -1).map(([x, y], index) =>
    draw("circle", { class: "trail", r: 2.5, cx: roofChart.x(x), cy: roofChart.y(y), opacity: (0.5 * (index + 1)) / TRAIL })));
}

function drawRoof(roofline, path, predicted) {
  const { flops_per_s: peak, bytes_per_s: bandwidth, ridge } = roofline;
  const least = Math.min(path[0].intensity, predicted?.intensity ?? Infinity);
  const x = [floorTo(Math.min(least, ridge / 4) / 1.2), ceilTo(Math.max(path.at(-1).intensity, ridge * 3))];
  const y = [floorTo(Math.min(least * bandwidth, lowest) / 1.6), ceilTo(peak * 2)];
  const chart = roofChart;
  if (!chart.frame(x, y, [path, roofline])) return;
  const { left, right, top, bottom } = chart.box;
  const turn = chart.x(ridge);
  const wide = right - left > 380;
  chart.put("rect", { class: "zone", x: left, y: top, width: turn - left, height: bottom - top });
  chart.put("rect", { class: "zone compute", x: turn, y: top, width: right - turn, height: bottom - top });
  chart.axes("arithmetic intensity, FLOP/byte", figures, (value) => si(value, "FLOP/s").replace(" ", " "));
  chart.put("text", { x: left + 8, y: bottom - 8 }, wide ? "← bound by memory" : "← memory");
  chart.put("text", { x: right - 8, y: bottom - 8, "text-anchor": "end" }, wide ? "bound by compute →" : "compute →");
  chart.critical(along(path, roofline.critical_batch, "intensity"), roofline.critical_batch);
  const from = Math.max(x[0], y[0] / bandwidth);
  const roof = [[from, from * bandwidth], [ridge, peak], [x[1], peak]];
  chart.line(roof, { class: "roof" });
  chart.line(roof, { class: "hit quiet", "data-explain": `The roof: ${si(bandwidth, "B/s")} times the intensity, up to ${si(peak, "FLOP/s")}; no step can be above it.` });
  const [ax, ay, bx, by] = [chart.x(from), chart.y(from * bandwidth), chart.x(ridge), chart.y(peak)];
  const angle = (Math.atan2(by - ay, bx - ax) * 180) / Math.PI;
  const [mx, my] = [ax + (bx - ax) * 0.45, ay + (by - ay) * 0.45];
  chart.put("text", { class: "halo", "text-anchor": "middle", transform: `translate(${mx} ${my}) rotate(${angle}) translate(0 -9)` }, `memory ${si(bandwidth, "B/s")}`);
  chart.put("text", { class: "halo", x: right - 6, y: chart.y(peak) - 8, "text-anchor": "end" }, `peak ${si(peak, "FLOP/s")}`);
  for (const one of path) {
    const step = chart.put("g", { class: "quiet", "data-explain": `Predicted: a batch of ${plural(one.batch, "request")} of ${plural(one.cells, "token")} context has ${figures(one.intensity)} FLOP/byte and gives ${figures(one.tokens_per_s)} tokens/s.` });
    const at = { cx: chart.x(one.intensity), cy: chart.y(one.flops_per_s) };
    step.append(draw("circle", { class: "step", r: 3, ...at }), draw("circle", { class: "hit", r: 2, ...at }));
    if (one.batch === 1 || one.batch === engine.slots.num) {
      const label = one.batch === 1 ? "batch 1" : `${one.batch}, all slots`;
      step.append(draw("text", { class: "halo", x: at.cx + 7, y: at.cy + 15 }, label));
    }
  }
  explainable(chart.still);
}

function drawThroughput(roofline, path, measured) {
  const x = [0.9, path.at(-1).batch * 1.15];
  slowest = Math.min(slowest, path[0].tokens_per_s / 30, measured?.tokens_per_s ?? Infinity);
  const y = [floorTo(slowest / 1.3), ceilTo(path.at(-1).tokens_per_s * 1.2)];
  const chart = batchChart;
  if (!chart.frame(x, y, [path, roofline])) return;
  const { top, bottom } = chart.box;
  chart.axes("requests decoded together", figures, (value) => si(value, ""));
  chart.put("text", { x: 0, y: top - 7 }, "tokens/s");
  const slots = chart.x(engine.slots.num);
  chart.put("line", { class: "gap", x1: slots, x2: slots, y1: top, y2: bottom });
  chart.put("text", { class: "halo", x: slots - 5, y: top + 14, "text-anchor": "end" }, `${engine.slots.num} slots`);
  chart.critical(roofline.critical_batch, roofline.critical_batch);
  chart.line(path.map((one) => [one.batch, one.tokens_per_s]), { class: "road" });
  for (const one of path) {
    const at = { cx: chart.x(one.batch), cy: chart.y(one.tokens_per_s) };
    const step = chart.put("g", { class: "quiet", "data-explain": `Predicted: ${plural(one.batch, "request")} decoded together get ${figures(one.tokens_per_s)} tokens/s in all, a token each ${time(one.step_s)}.` });
    step.append(draw("circle", { class: "step", r: 3, ...at }), draw("circle", { class: "hit", r: 2, ...at }));
  }
  explainable(chart.still);
}

const STEP_ROWS = [
  ["one step", (one) => time(one.step_s), "Time of one decode step: each running request gets one token, or, with guesses, those that were right and one more."],
  ["tokens/s", (one) => figures(one.tokens_per_s), "Tokens a second of the last decode dispatch; a request may end before it does."],
  ["arithmetic", (one) => si(one.flops_per_s, "FLOP/s"), "Operations that the model needs for the step, over the time of the step."],
];

function showBatch(roofline, decode) {
  const { predicted, measured } = decode;
  const line = $("batch-line");
  const words = !measured ? "No decode step yet: ask for something." : `${decode.live ? "Now" : "Last"}: ${plural(decode.batch, "request")} decoded together, ${plural(decode.cells, "token")} of context each` +
    (predicted ? ` · ${figures(predicted.intensity)} FLOP/byte: bound by ${predicted.bound}, ${percent(decode.batch / roofline.critical_batch)} of the critical batch` : "") +
    (predicted?.bound === "memory" && decode.batch > roofline.critical_batch ? " (the weights are shared enough, and each cache is still read for one request alone)" : "");
  say(line, words);
  const body = $("step-table").tBodies[0];
  if (!body.children.length) {
    const rows = [...STEP_ROWS, ["reached", null, "Measured over predicted: the rest goes to dispatching, sampling, caches and kernels that the prediction takes for perfect."]];
    body.append(...rows.map(([name, , words]) => make("tr", {}, make("td", { "data-explain": words }, name), make("td"), make("td"))));
    explainable(body);
  }
  for (const [index, [, format]] of STEP_ROWS.entries()) {
    const [, left, right] = body.children[index].children;
    say(left, predicted ? format(predicted) : "–");
    say(right, measured && (index < 2 || predicted) ? format(measured) : "–");
  }
  const [, left, right] = body.lastChild.children;
  say(left, predicted ? "100 %" : "–");
  say(right, predicted ? percent(predicted.step_s / measured.step_s) : "–");
}

new ResizeObserver(() => { if (engine) showRoofline(); }).observe($("roofline-panel"));
