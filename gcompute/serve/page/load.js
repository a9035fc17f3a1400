// A burst of requests, so that slots fill and a queue grows: one call with many prompts, for a browser opens but a few
// connections to one server.

const SHARED = "The engine reads each prompt once, keeps its keys and values, and then writes a token a step. ";
const TOPICS = ["A batch", "The queue", "Memory", "A matrix", "The cache", "A token", "The clock", "Attention"];
let loading = null;

/** Prompts that begin alike and end apart; short enough for any tokenizer to fit a quarter of the context. */
function loadPrompts(num) {
  const room = Math.floor(engine.about.max_context / 4);
  return Array.from({ length: num }, (_, index) => {
    const own = `${TOPICS[index % TOPICS.length]} ${index + 1} `;
    return SHARED.slice(0, Math.max(0, room - own.length)) + own.slice(0, room);
  });
}

/** At most what slots and queue hold, so that the server need not refuse all of it. */
function fitLoad() {
  const most = engine.about.max_choices;
  $("load-num").max = String(most);
  $("load-tokens").max = String(Math.floor(engine.about.max_context / 2));
  if (!$("load-num").dataset.fitted) {
    $("load-num").dataset.fitted = "yes";
    $("load-num").value = String(Math.min(most, 2 * engine.slots.num + Math.ceil(engine.slots.num / 2)));
    $("load-tokens").value = String(Math.min(Number($("load-tokens").value), Math.floor(engine.about.max_context / 2)));
    $("max-tokens").value = String(Math.min(Number($("max-tokens").value), Math.floor(engine.about.max_context / 2)));
    showSettings();
  }
}

async function load() {
  if (!engine) return say($("load-note"), "The engine is not known yet.");
  const num = Number($("load-num").value);
  const body = { prompt: loadPrompts(num), max_tokens: Number($("load-tokens").value), temperature: 0.8, ignore_eos: true };
  loading = new AbortController();
  say($("load-go"), "Cancel");
  const made = new Array(num).fill(0);
  const startMs = performance.now();
  let done = 0;
  const tell = (word) => {
    const tokens = made.reduce((sum, one) => sum + one, 0);
    const rate = tokens / ((performance.now() - startMs) / 1000);
    say($("load-note"), `${word}: ${done} of ${plural(num, "request")} done, ${whole(tokens)} tokens, ${figures(rate)} tokens/s in all (measured here).`);
    $("load-bar").style.width = `${(100 * tokens) / (num * body.max_tokens)}%`;
  };
  try {
    for await (const chunk of chunks("/v1/completions", body, loading.signal)) {
      for (const choice of chunk.choices) {
        if (chunk.usage) made[choice.index] = chunk.usage.completion_tokens;
        done += choice.finish_reason ? 1 : 0;
      }
      tell("Running");
    }
    tell("Done");
  } catch (error) {
    if (error.name === "AbortError") tell("Cancelled");
    else say($("load-note"), error instanceof Refusal ? error.message : `The burst broke off: ${error.message}`);
  }
  $("load-bar").style.width = "0";
  loading = null;
  say($("load-go"), "Load");
}

$("load").addEventListener("submit", (event) => {
  event.preventDefault();
  if (loading) loading.abort();
  else load();
});
