// What the other scripts share: elements, numbers for a reader, explanations, and calls of the server.
// All text is set as text (never as HTML): what a model writes is not trusted.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

/** A new element with attributes and children; strings become text. */
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function draw(name, attributes = {}, text = null) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  return element;
}

/** Set text only where it changed, so that a screen reader and a selection are left alone. */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Numbers -------------------------------------------------------------------------------------------------------------

const PREFIXES = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

/** Three figures that count, without an exponent. */
function figures(value) {
  if (value === 0) return "0";
  const decimals = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value)) + 1e-9));
  return value.toLocaleString("en-US", { minimumFractionDigits: 0, maximumFractionDigits: Math.min(decimals, 6) });
}

function si(value, unit) {
  const [size, letter] = PREFIXES.find(([size]) => value >= size * 0.9995) ?? [1, ""];
  return `${figures(value / size)} ${letter}${unit}`;
}

/** Seconds as [number, unit]. */
function duration(seconds) {
  if (seconds < 0.9995e-3) return [figures(seconds * 1e6), "µs"];
  return seconds < 0.9995 ? [figures(seconds * 1e3), "ms"] : [figures(seconds), "s"];
}

const time = (seconds) => duration(seconds).join(" ");
const whole = (value) => Math.round(value).toLocaleString("en-US");
const percent = (value) => `${figures(value * 100)} %`;
const plural = (count, one, many = `${one}s`) => `${whole(count)} ${count === 1 ? one : many}`;

// Explanations: hover, focus or tap what has data-explain ---------------------------------------------------------------

const tip = $("tip");
let explained = null;

function explain(element) {
  if (element === explained) return;
  explained?.removeAttribute("aria-describedby");
  explained = element;
  tip.hidden = !element;
  if (!element) return;
  tip.textContent = element.dataset.explain;
  element.setAttribute("aria-describedby", "tip");
  place();
}

function place() {
  const box = explained.getBoundingClientRect();
  const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.top = `${Math.max(8, below ? box.bottom + 8 : box.top - 8 - tip.offsetHeight)}px`;
  const middle = box.left + Math.min(box.width, 400) / 2 - tip.offsetWidth / 2;
  tip.style.left = `${Math.max(8, Math.min(innerWidth - tip.offsetWidth - 8, middle))}px`;
}

/** Let the keyboard reach an explanation too, unless a control is there already. */
function explainable(root) {
  for (const element of root.querySelectorAll("[data-explain]:not([tabindex])")) {
    if (!element.matches("button, input, label, .token, .quiet")) element.setAttribute("tabindex", "0");
  }
}

const nearest = (event) => event.target.closest?.("[data-explain]") ?? null;
let pointer = "";
let waiting = 0;
document.addEventListener("pointerover", (event) => {
  const [at, target] = [`${event.screenX} ${event.screenY}`, nearest(event)];
  // What slides under a pointer that rests explains nothing, nor does what a pointer only crosses.
  const rests = at === pointer;
  pointer = at;
  if (target === explained) return;
  explain(null);
  clearTimeout(waiting);
  if (target && !rests) waiting = setTimeout(() => target.isConnected && explain(target), 150);
});
document.addEventListener("focusin", (event) => explain(event.target.matches(":focus-visible") ? nearest(event) : null));
document.addEventListener("focusout", () => explain(null));
document.addEventListener("keydown", (event) => { if (event.key === "Escape") explain(null); });
// Focus scrolls what it reaches into sight: its explanation goes along.
const scrolled = () => (explained && explained === document.activeElement ? place() : explain(null));
document.addEventListener("scroll", scrolled, { capture: true, passive: true });
document.documentElement.addEventListener("pointerleave", () => explain(null));
explainable(document);

// The server ------------------------------------------------------------------------------------------------------------

let apiKey = "";
/** What the last snapshot said; null until there is one. */
let engine = null;

/** An answer other than 200, in words; `status` is HTTP's. */
class Refusal extends Error {
  constructor(status, message, retryS) {
    super(message);
    this.status = status;
    this.retryS = retryS;
  }
}

async function call(path, { body, signal } = {}) {
  const headers = { ...(apiKey && { Authorization: `Bearer ${apiKey}` }), ...(body && { "Content-Type": "application/json" }) };
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The server cannot be reached. Is it still running?", 2);
  }
  if (response.ok) return response;
  let message = `The server answered ${response.status}.`;
  try { message = (await response.json()).error.message; } catch { /* not JSON: the status says it */ }
  const retryS = Number(response.headers.get("Retry-After")) || null;
  if (response.status === 401) {
    message = `This server wants an API key${apiKey ? ", and this one is wrong" : ""}: type it under “API key” above.`;
    $("key-box").open = true;
  } else if (response.status === 429) {
    message = `The queue is full (429): ${message}`;
  } else if (response.status === 503) {
    message = `Not ready (503): ${message}`;
  }
  if (retryS) message += ` The server says to try again in ${retryS} s.`;
  throw new Refusal(response.status, message, retryS);
}

/** The data of each server-sent event, parsed; ends at [DONE] or with the connection. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** Chunks of a streamed completion; an error in the stream is thrown. */
async function* chunks(path, body, signal) {
  const options = { stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  for await (const chunk of events(await call(path, { body: { ...body, ...options }, signal }))) {
    if (chunk.error) throw new Refusal(200, chunk.error.message, null);
    yield chunk;
  }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey = $("key").value.trim();
  $("key-box").open = false;
  watchAnew();
});
