// The right half: snapshots as they come, four a second, only while the page is in sight.

const SPARK = 160;
const MOST_PAGES = 420;
const QUEUE_DOTS = 64;
const rates = new Array(SPARK).fill(0);
let watching = null;

// The connection --------------------------------------------------------------------------------------------------------

async function watchEngine() {
  const controller = new AbortController();
  watching = controller;
  while (watching === controller) {
    let waitS = 1;
    try {
      for await (const snapshot of events(await call("/engine/events", { signal: controller.signal }))) {
        if (watching === controller) show(snapshot);
      }
      lost("connection closed");
    } catch (error) {
      if (error.name === "AbortError") return;
      lost(error.status === 401 ? "API key needed" : error.status === 429 ? "too many watch" : "not connected");
      if (error.status === 401) return;
      waitS = error.retryS ?? 2;
    }
    await new Promise((wake) => setTimeout(wake, waitS * 1000));
  }
}

function watchAnew() {
  watching?.abort();
  watchEngine();
}

function lost(words) {
  $("status").className = "pill lost";
  say($("status"), words);
}

document.addEventListener("visibilitychange", () => {
  watching?.abort();
  watching = null;
  if (!document.hidden) watchEngine();
});

// What a snapshot says --------------------------------------------------------------------------------------------------

function show(snapshot) {
  const first = engine === null;
  engine = snapshot;
  if (first) introduce();
  $("status").className = `pill ${engine.status}`;
  say($("status"), engine.status);
  showTiles();
  showSlots();
  showQueue();
  showPages();
  showRoofline();
}

function introduce() {
  const { about, roofline } = engine;
  say($("model"), about.model);
  document.title = `${about.model} · gcompute serve`;
  const parts = [`context ${whole(about.max_context)} tokens`, plural(engine.slots.num, "slot")];
  if (roofline) parts.unshift(`${si(roofline.params, "")} parameters`.replace("  ", " "), roofline.dtype);
  say($("about"), parts.join(" · "));
  if (about.chat) document.querySelector("input[value=chat]").checked = true;
  showMode();
  fitLoad();
}

function tile(id, value, unit, sub) {
  say($(id), value ?? "–");
  $(id).closest(".tile").classList.toggle("idle", value === null);
  if (unit !== null) say($(`${id}-unit`), unit);
  say($(`${id}-sub`), sub);
}

function timeTile(id, times) {
  if (!times) return tile(id, null, "", "no request has finished yet");
  const [value, unit] = duration(times.p50);
  tile(id, value, `${unit} median`, `99 % within ${time(times.p99)} · measured, last ${plural(engine.recent.num, "request")}`);
}

function showTiles() {
  const { totals, recent } = engine;
  const rate = engine.rates.output_tokens_per_s;
  tile("rate", rate === null ? null : figures(rate), null, "measured, last 2 s");
  rates.push(rate ?? 0);
  rates.shift();
  showSpark();
  timeTile("ttft", recent.first_token_s);
  timeTile("tpot", recent.per_token_s);
  const hits = engine.hit_share;
  tile("hits", hits === null ? null : percent(hits), null,
    hits === null ? "no prompt yet" : `${whole(totals.num_hit_tokens)} of ${whole(totals.num_prompt_tokens)} prompt tokens · measured`);
  const accepted = engine.accepted_share;
  tile("accepted", accepted === null ? null : percent(accepted), null,
    accepted === null ? "nothing guessed: speculation is off" : `${whole(totals.num_accepted)} of ${whole(totals.num_drafted)} guesses · measured`);
  tile("finished", whole(totals.num_finished), null,
    `${whole(totals.num_output_tokens)} tokens in ${whole(totals.num_decode_steps)} decode steps` + (totals.num_preemptions ? ` · ${whole(totals.num_preemptions)} preempted` : "") + " · measured");
}

function showSpark() {
  const svg = $("spark");
  const most = Math.max(1, ...rates);
  const points = rates.map((rate, index) => `${index} ${(30 - (28 * rate) / most).toFixed(1)}`);
  svg.setAttribute("viewBox", `0 0 ${SPARK - 1} 32`);
  svg.setAttribute("preserveAspectRatio", "none");
  if (!svg.firstChild) svg.append(draw("path", { "vector-effect": "non-scaling-stroke" }));
  svg.firstChild.setAttribute("d", `M-1 34 L${points.join(" L")} L${SPARK} 34 Z`);
}

function slotRow(index) {
  const track = make("span", { class: "track" }, make("i", { class: "prompt" }), make("i", { class: "unread" }), make("i", { class: "output" }));
  return make("li", { class: "free" }, make("span", { class: "name" }, String(index + 1)), track, make("span", { class: "what" }));
}

function showSlots() {
  const list = $("slots");
  const { num, running } = engine.slots;
  if (list.children.length !== num) list.replaceChildren(...Array.from({ length: num }, (_, index) => slotRow(index)));
  const held = new Map(running.map((one) => [one.slot, one]));
  for (const [index, row] of [...list.children].entries()) {
    const one = held.get(index);
    const [, track, what] = row.children;
    const [prompt, unread, output] = track.children;
    // A new request begins without sliding back from the old one's width.
    const fresh = one && row.dataset.request !== String(one.request_id);
    row.className = one ? `busy ${one.phase}` : "free";
    row.dataset.request = one ? one.request_id : "";
    const room = one ? one.num_prompt + one.max_tokens : 1;
    const read = one ? (one.phase === "prefill" ? Math.min(one.num_cached, one.num_prompt) : one.num_prompt) : 0;
    const widths = one ? [read, one.num_prompt - read, one.num_output] : [0, 0, 0];
    for (const [part, tokens] of [[prompt, widths[0]], [unread, widths[1]], [output, widths[2]]]) {
      part.style.transition = fresh ? "none" : "";
      part.style.width = `${(100 * tokens) / room}%`;
    }
    say(what, !one ? "free" : one.phase === "prefill"
      ? `prefill: ${whole(read)} of ${plural(one.num_prompt, "prompt token")}`
      : `prompt ${whole(one.num_prompt)} · output ${whole(one.num_output)} of ${whole(one.max_tokens)}`);
  }
  say($("slots-count"), `${engine.num_running} of ${num} taken (measured)`);
}

function showQueue() {
  const most = engine.about.max_choices - engine.slots.num;
  const dots = Math.min(most, QUEUE_DOTS);
  const line = $("queue");
  if (line.children.length !== dots) line.replaceChildren(...Array.from({ length: dots }, () => make("i")));
  const on = Math.ceil((engine.num_waiting * dots) / most);
  for (const [index, dot] of [...line.children].entries()) dot.className = index < on ? "on" : "";
  say($("queue-count"), `${plural(engine.num_waiting, "request waits", "requests wait")}, ${whole(most)} may`);
}

function showPages() {
  const { tokens, num, free, cached, used } = engine.pages;
  $("pages-panel").hidden = !num;
  if (!num) return;
  const each = Math.ceil(num / MOST_PAGES);
  const cells = Math.ceil(num / each);
  const grid = $("pages");
  if (grid.children.length !== cells) grid.replaceChildren(...Array.from({ length: cells }, () => make("i")));
  const usedCells = Math.ceil(used / each);
  const cachedCells = usedCells + Math.ceil(cached / each);
  for (const [index, cell] of [...grid.children].entries()) {
    const kind = index < usedCells ? "used" : index < cachedCells ? "cached" : "";
    if (cell.className !== kind) cell.className = kind;
  }
  say($("pages-size"), `${whole(num)} of ${whole(tokens)} tokens each` + (each > 1 ? `, a square is ${each}` : "") + " (measured)");
  for (const [id, count] of [["pages-used", used], ["pages-cached", cached], ["pages-free", free]]) say($(id), whole(count));
  grid.setAttribute("aria-label", `Pages: ${used} used, ${cached} cached, ${free} free`);
}

watchEngine();
