// One answer on the page: its text as it comes, what is known of its tokens, and what it took.

const NUM_LIKELIEST = 3;

class AnswerView {
  /** which: "answer 2 of 3", or "". before: text that the answer goes on from, shown softer. */
  constructor(which, before) {
    this.text = "";
    this.tokens = [];
    this.numTokens = 0;
    this.reason = null;
    this.shown = make("div", { class: "text" });
    this.written = make("span", { class: "written" });
    this.facts = make("div", { class: "facts" });
    if (before) this.shown.append(make("span", { class: "ask" }, before));
    this.shown.append(this.written);
    this.root = make("div", { class: "answer running" }, ...(which ? [make("div", { class: "which" }, which)] : []), this.shown, this.facts);
    this.decoder = new TextDecoder();
    this.coloured = 0;
    this.tail = document.createTextNode("");
    this.written.append(this.tail);
  }

  /** Add a chunk's text, and the tokens that it reports: [{bytes, logprob, top}]. */
  push(text, tokens) {
    this.text += text;
    this.tokens.push(...tokens.map((token) => ({ ...token, text: this.decoder.decode(token.bytes, { stream: true }) })));
    // Text may lag behind its tokens: part of a character, or of a stop string, is held back.
    while (this.tokens.length && this.text.startsWith(this.tokens[0].text, this.coloured)) {
      const token = this.tokens.shift();
      if (!token.text) continue;
      const span = make("span", { class: "token", "data-explain": chances(token) }, token.text);
      span.style.setProperty("--doubt", String(1 - Math.exp(token.logprob)));
      this.written.insertBefore(span, this.tail);
      this.coloured += token.text.length;
    }
    this.tail.data = this.text.slice(this.coloured);
  }

  end(reason) {
    this.reason = reason;
    this.root.classList.remove("running");
  }
}

/** One token's probability, and the likeliest others, in words. */
function chances(token) {
  const probability = (logprob) => percent(Math.exp(logprob));
  const quoted = (text) => `“${text.replaceAll("\n", "⏎")}”`;
  const others = token.top.map((one) => `${quoted(one.text)} ${probability(one.logprob)}`).join(", ");
  return `${quoted(token.text)}: the model gave it ${probability(token.logprob)}.` + (others ? `\nLikeliest: ${others}.` : "");
}

const utf8 = new TextEncoder();

/** The bytes of a token as completions write it: part of a character is "bytes:\xe2\x82". */
function spelled(token) {
  if (!/^bytes:(\\x[0-9a-f]{2})+$/.test(token)) return utf8.encode(token);
  return Uint8Array.from(token.slice(6).matchAll(/\\x(..)/g), (found) => parseInt(found[1], 16));
}

/** The tokens that a choice of either API reports. */
function reported(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((one) => ({
      bytes: Uint8Array.from(one.bytes), logprob: one.logprob,
      top: one.top_logprobs.map((other) => ({ text: other.token, logprob: other.logprob })),
    }));
  }
  return logprobs.tokens.map((token, index) => ({
    bytes: spelled(token), logprob: logprobs.token_logprobs[index],
    // The chosen token is among them, likely or not.
    top: Object.entries(logprobs.top_logprobs[index]).map(([text, logprob]) => ({ text, logprob }))
      .sort((one, other) => other.logprob - one.logprob).slice(0, NUM_LIKELIEST),
  }));
}

const REASONS = {
  stop: ["ended by itself", "The model chose its end-of-text token, or a stop string came."],
  length: ["reached max tokens", "The output has as many tokens as were asked for."],
  stopped: ["stopped", "You stopped it: the connection was closed and the engine dropped the request."],
  failed: ["failed", "The server ended it with an error."],
};

/** What an answer took, as this browser saw it. */
function showFacts(view, timing) {
  const facts = [
    [whole(view.numTokens), view.numTokens === 1 ? "token" : "tokens", "Tokens that the server counted for this answer."],
  ];
  if (timing.firstS !== null) {
    const seconds = timing.firstS;
    facts.push([time(seconds), "to the first", "Time to first token, measured in this browser from sending to the first text."]);
    const rest = timing.nowS - seconds;
    if (view.numTokens > 1 && rest > 0) {
      facts.push([figures((view.numTokens - 1) / rest), "tokens/s", "Tokens after the first, over the time that they took, measured in this browser."]);
    }
  }
  if (view.reason) {
    const [word, why] = REASONS[view.reason] ?? [view.reason, "Why it ended, as the server says."];
    facts.push(["", word, why]);
  }
  view.facts.replaceChildren(...facts.map(([number, word, why]) => {
    const fact = make("span", { "data-explain": why }, ...(number ? [make("b", {}, number), ` ${word}`] : [word]));
    return fact;
  }));
  if (view.reason) explainable(view.facts);
}
