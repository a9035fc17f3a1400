// Chat and completion: the settings, the call, its answers as they come, and Stop.

const NOTES = {
  complete: "The model goes on from where your text ends.",
  chat: "The model is given the conversation so far, and writes the next turn.",
  plain: "The model is given the conversation as “role: content” lines: it has no chat template, and may never have seen a chat.",
};
let messages = [];
let running = null;

const chatting = () => document.querySelector("input[name=mode]:checked").value === "chat";

function showMode() {
  const chat = chatting();
  say($("mode-note"), NOTES[!chat ? "complete" : engine && !engine.about.chat ? "plain" : "chat"]);
  say($("send"), chat ? "Send" : "Complete");
  $("prompt").placeholder = chat ? "Say something." : "Write a beginning, and the model goes on.";
}

for (const radio of document.querySelectorAll("input[name=mode]")) radio.addEventListener("change", () => { clearAll(); showMode(); });

/** Settings that the calls carry; what is empty is left out. */
function settings() {
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const stop = $("stop-strings").value.split("\n").filter((line) => line !== "");
  return {
    temperature: number("temperature"), top_p: number("top-p"), top_k: number("top-k"), max_tokens: number("max-tokens"),
    seed: number("seed"), n: number("n"), stop: stop.length ? stop : undefined,
  };
}

function showSettings() {
  const { temperature, top_p, max_tokens, seed, n } = settings();
  const parts = [`temperature ${temperature ?? 1}`, `top-p ${top_p ?? 1}`, `${max_tokens ?? "default"} tokens`];
  if (seed !== undefined) parts.push(`seed ${seed}`);
  if (n > 1) parts.push(`${n} answers`);
  say($("settings-short"), parts.join(" · "));
}

$("settings").addEventListener("input", showSettings);

function fail(message) {
  $("talk-error").hidden = !message;
  say($("talk-error"), message);
}

function clearAll() {
  running?.abort();
  ended();
  messages = [];
  $("answers").replaceChildren();
  fail("");
}

/** Nothing is asked: the next call may be sent. */
function ended() {
  running = null;
  $("send").disabled = false;
  $("stop").disabled = true;
}

/** Keep the newest text in sight, unless the reader scrolled up. */
function following(change) {
  const box = $("answers");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  change();
  if (atEnd) box.scrollTop = box.scrollHeight;
}

async function talk() {
  const text = $("prompt").value;
  if (running || (chatting() && !text.trim())) return;
  const chat = chatting();
  const { n, ...sampling } = settings();
  const num = Number.isInteger(n) && n > 0 ? n : 1;
  const wanted = $("logprobs").checked;
  const body = chat
    ? { messages: [...messages, { role: "user", content: text }], ...(wanted && { logprobs: true, top_logprobs: NUM_LIKELIEST }) }
    : { prompt: text, ...(wanted && { logprobs: NUM_LIKELIEST }) };
  const controller = new AbortController();
  running = controller;
  fail("");
  $("send").disabled = true;
  $("stop").disabled = false;
  const views = Array.from({ length: num }, (_, index) => new AnswerView(num > 1 ? `answer ${index + 1} of ${num}` : "", chat ? "" : text));
  const said = chat ? [make("div", { class: "said text" }, text)] : [];
  $("answers").append(...said, ...views.map((view) => view.root));
  $("answers").scrollTop = $("answers").scrollHeight;
  if (chat) $("prompt").value = "";
  for (const view of views) view.facts.append(make("span", {}, "sent: waiting for a slot and the first token"));
  const startMs = performance.now();
  const timings = views.map(() => ({ firstS: null, nowS: 0 }));
  const show = (index) => { if (views[index].numTokens) showFacts(views[index], timings[index]); };
  let failure = null;
  try {
    const path = chat ? "/v1/chat/completions" : "/v1/completions";
    for await (const chunk of chunks(path, { ...body, ...sampling, n }, controller.signal)) {
      following(() => {
        for (const choice of chunk.choices) {
          const view = views[choice.index];
          const piece = chat ? choice.delta.content ?? "" : choice.text;
          if (chunk.usage) view.numTokens = chunk.usage.completion_tokens;
          timings[choice.index].nowS = (performance.now() - startMs) / 1000;
          if (view.numTokens) timings[choice.index].firstS ??= timings[choice.index].nowS;
          view.push(piece, reported(choice.logprobs));
          if (choice.finish_reason) view.end(choice.finish_reason);
          show(choice.index);
        }
      });
    }
  } catch (error) {
    // Whoever cleared it all wants nothing of this any more.
    if (running !== controller) return;
    failure = error.name === "AbortError" ? "stopped" : "failed";
    if (failure === "failed") fail(error instanceof Refusal ? error.message : `The answer broke off: ${error.message}`);
  }
  following(() => {
    for (const [index, view] of views.entries()) {
      if (!view.reason) view.end(failure ?? "failed");
      showFacts(view, timings[index]);
    }
    if (failure === "failed" && views.every((view) => !view.text)) {
      for (const element of [...said, ...views.map((view) => view.root)]) element.remove();
      if (chat && !$("prompt").value) $("prompt").value = text;
    } else if (chat) {
      messages = [...body.messages, { role: "assistant", content: views[0].text }];
      if (num > 1) views[0].facts.append(make("span", {}, "the conversation goes on from this one"));
    } else {
      for (const view of views) view.facts.append(goOn(text + view.text));
    }
  });
  ended();
  $("prompt").focus({ preventScroll: true });
}

/** A button that makes an answer part of the prompt. */
function goOn(text) {
  const button = make("button", { type: "button", "data-explain": "Puts this text into the prompt, so that the model can go on from it." }, "Go on");
  button.addEventListener("click", () => { $("prompt").value = text; $("prompt").focus(); });
  return button;
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); talk(); });
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", clearAll);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  talk();
});
showMode();
showSettings();
