"""The page in a browser: what is typed, streamed, stopped, loaded and drawn."""

import json
import math
import time

import pytest
from openai_calls import LOCAL, complete
from webdriver import chromium, needs_chromium

from gcompute.serve.request import Request, Sampling
from gcompute.serve.server import background

pytestmark = [pytest.mark.slow, needs_chromium]

READY = "document.querySelector('#status').textContent === 'ready'"
IDLE = "!document.querySelector('#send').disabled"
BUSY = "document.querySelectorAll('#slots .busy').length"
WAITING = "document.querySelectorAll('#queue .on').length"
USED = "Number(document.querySelector('#pages-used').textContent)"
DOT = "document.querySelector('#roofline .mark .dot').parentNode"
FOCUSED = """
    const at = document.activeElement;
    return [at.id || at.getAttribute("class") || "", at.dataset.explain ?? ""];"""
WIDTHS = """
    const chart = document.querySelector("#roofline svg");
    return [document.documentElement.scrollWidth, chart.viewBox.baseVal.width];"""
SET_HIDDEN = """
    Object.defineProperty(document, "hidden", {value: arguments[0], configurable: true});
    document.dispatchEvent(new Event("visibilitychange"));"""
# Where a chart has its ticks across and up, by value, its dot and its ring.
PLACES = """
    const chart = document.querySelector(arguments[0]);
    const sizes = {k: 1e3, M: 1e6, G: 1e9, T: 1e12, P: 1e15, "": 1};
    const ticks = [{}, {}];
    for (const text of chart.querySelectorAll("svg > g:first-child > text:not(.halo)")) {
        const found = text.textContent.match(/^([0-9.,]+) ?([kMGTP]?)(FLOP\\/s)?$/);
        if (!found) continue;
        const up = text.getAttribute("text-anchor") === "end";
        const place = up ? text.y.baseVal[0].value - 4 : text.x.baseVal[0].value;
        ticks[Number(up)][Number(found[1].replaceAll(",", "")) * sizes[found[2]]] = place;
    }
    const at = (name) => {
        const mark = chart.querySelector(`.mark > circle.${name}`).parentNode;
        return mark.style.transform.match(/[0-9.]+/g).map(Number);
    };
    return [ticks, at("dot"), at("ring")];"""
# Of each text: its contrast with what is behind it, its name, and how light the page is.
CONTRASTS = """
    const channel = (one) => (one /= 255) <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4;
    const luminance = (text) => {
        const [r, g, b] = text.match(/[0-9.]+/g).map(Number).map(channel);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const paper = (at) => {
        for (; at; at = at.parentElement) {
            const colour = getComputedStyle(at).backgroundColor;
            if (!/, 0\\)$|transparent/.test(colour)) return colour;
        }
        return getComputedStyle(document.body).backgroundColor;
    };
    const texts = document.querySelectorAll("h1, h2, h3, p, td, th, button.primary, .soft, summary, .what");
    return [...texts].map((one) => {
        const [a, b] = [getComputedStyle(one).color, paper(one)].map(luminance).sort((a, b) => b - a);
        const name = one.id || one.className || one.textContent;
        return [(a + 0.05) / (b + 0.05), name, luminance(paper(document.body))];
    });"""
# The page's own settings, but for the seed.
SETTINGS = {"temperature": 0.8, "top_p": 0.95, "top_k": 0, "max_tokens": 32}
# A decode dispatch takes so long more, so that a burst can be watched.
SLOWER_S = 0.1


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser, url):
    """The page, opened anew; at the end it must have logged nothing and asked for nothing elsewhere."""
    browser.open("about:blank")
    browser.log("browser")
    browser.requested()
    browser.open(url)
    browser.wait(READY)
    yield browser
    assert browser.log("browser") == []
    assert {asked.removeprefix(url).split("?")[0] for asked in browser.requested() if asked[:5] != "data:"} <= {
        *("/", "/engine/events", "/v1/completions", "/v1/chat/completions")
    }


def set_seed(page, seed: int) -> None:
    page.run("document.querySelector('#settings').open = true")
    page.type("#seed", str(seed))


def test_text_streams_in_and_is_the_apis_for_the_same_seed(page, http, engine, before_each):
    set_seed(page, 7)
    page.type("#prompt", "once upon")
    with before_each(engine, "decode", lambda: time.sleep(SLOWER_S)):
        page.click("#send")
        part = page.wait("document.querySelector('.answer.running .written').textContent")
        page.wait(f"{BUSY} === 1")
        page.wait(IDLE)
    whole = complete(http, prompt="once upon", seed=7, **SETTINGS)
    assert 0 < len(part) < len(whole["choices"][0]["text"])
    assert whole["choices"][0]["text"].startswith(part)
    assert page.text(".answer .written") == whole["choices"][0]["text"]
    assert page.text(".answer .text") == "once upon" + whole["choices"][0]["text"]
    facts = page.text(".answer .facts")
    assert facts.startswith("32 tokens")
    assert "to the first" in facts
    assert "tokens/s" in facts
    assert "reached max tokens" in facts


def test_coloured_tokens_make_the_same_text_and_say_their_chances(page, http):
    set_seed(page, 8)
    page.click("#logprobs")
    page.type("#prompt", "once upon")
    page.click("#send")
    page.wait(IDLE)
    whole = complete(http, prompt="once upon", seed=8, logprobs=3, **SETTINGS)["choices"][0]
    assert page.text(".answer .written") == whole["text"]
    tokens = page.run(
        "return [...document.querySelectorAll('.token')].map((one) => [one.textContent, one.dataset.explain])"
    )
    assert "".join(text for text, _ in tokens) == whole["text"]
    assert all("the model gave it" in words and "Likeliest" in words for _, words in tokens)


def test_several_answers_are_those_of_the_api(page, http):
    set_seed(page, 9)
    page.type("#n", "3")
    page.type("#prompt", "once")
    page.click("#send")
    page.wait(IDLE)
    shown = page.run("return [...document.querySelectorAll('.answer .written')].map((one) => one.textContent)")
    assert shown == [one["text"] for one in complete(http, prompt="once", seed=9, n=3, **SETTINGS)["choices"]]


def test_a_conversation_goes_on_from_what_was_said(page, http):
    page.click("input[value=chat] + span")
    set_seed(page, 3)
    page.type("#max-tokens", "4")
    messages = []
    for said in ("hi", "so"):
        page.type("#prompt", said + "\ue007")
        page.wait(IDLE)
        messages.append({"role": "user", "content": said})
        body = {**SETTINGS, "max_tokens": 4, "seed": 3, "messages": messages}
        answer = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        assert page.run("return [...document.querySelectorAll('.written')].at(-1).textContent") == answer
        messages.append({"role": "assistant", "content": answer})
    assert page.run("return [...document.querySelectorAll('.said')].map((one) => one.textContent)") == ["hi", "so"]


def test_stop_frees_the_slot(page, engine, gate):
    page.type("#prompt", "once upon")
    page.click("#send")
    page.wait(f"{BUSY} === 1 && {USED} > 0")
    assert gate.reached.is_set()
    page.click("#stop")
    page.wait(IDLE)
    gate.open.set()
    page.wait(f"{BUSY} === 0 && {USED} === 0")
    assert engine.stats().num_running == 0
    assert "stopped" in page.text(".answer .facts")


def test_a_burst_fills_slots_pages_and_queue_and_moves_the_dot(page, engine, before_each):
    page.type("#prompt", "once")
    page.click("#send")
    page.wait(IDLE)
    page.wait(f"{DOT}.getAttribute('aria-label')?.includes('1 request of')")
    at = page.run(f"return {DOT}.style.transform")
    assert page.run("return document.querySelector('#load-num').value") == "7"
    with before_each(engine, "decode", lambda: time.sleep(SLOWER_S)):
        page.click("#load-go")
        page.wait(f"{BUSY} === 3 && {WAITING} === 4")
        page.wait(f"{USED} >= 6 && document.querySelectorAll('#pages .used').length === {USED}")
        page.wait(f"{DOT}.getAttribute('aria-label').includes('3 requests of')")
        assert page.run(f"return {DOT}.style.transform") != at
        assert "3 requests decoded together" in page.text("#batch-line")
        assert "bound by memory" in page.text("#batch-line")
        page.wait(
            "document.querySelector('#load-note').textContent.startsWith('Done: 7 of 7 requests done, 224 tokens')"
        )
        page.wait(f"{BUSY} === 0 && {WAITING} === 0")
        page.click("#load-go")
        page.wait(f"{BUSY} === 3")
        page.click("#load-go")
        page.wait("document.querySelector('#load-note').textContent.startsWith('Cancelled')")
        page.wait(f"{BUSY} === 0 && {WAITING} === 0")
    assert engine.stats().num_waiting == 0
    assert float(page.text("#ttft")) > 0


def test_dots_and_rings_are_where_the_axes_say(page, http):
    page.type("#prompt", "once")
    page.click("#send")
    page.wait(IDLE)
    page.wait(f"{BUSY} === 0 && {DOT}.getAttribute('aria-label')")
    seen = http.get("/engine").json()
    step, measured = seen["decode"]["predicted"], seen["decode"]["measured"]
    label = "document.querySelector('#throughput .dot ~ text').textContent"
    page.wait(f"Math.abs(parseFloat({label}.replaceAll(',', '')) / given[0] - 1) < 0.006", measured["tokens_per_s"])
    for figure, x, name in (("#roofline", "intensity", "flops_per_s"), ("#throughput", "batch", "tokens_per_s")):
        ticks, dot, ring = page.run(PLACES, figure)
        across, up = (sorted(values.items()) for values in ticks)
        (x0, px0), (x1, px1) = ((math.log(float(value)), at) for value, at in (across[0], across[-1]))
        (y0, py0), (y1, py1) = ((math.log(float(value)), at) for value, at in (up[0], up[-1]))
        for (px, py), value in ((dot, measured[name]), (ring, step[name])):
            assert px == pytest.approx(px0 + (math.log(step[x]) - x0) / (x1 - x0) * (px1 - px0), abs=0.5)
            assert py == pytest.approx(py0 + (math.log(value) - y0) / (y1 - y0) * (py1 - py0), abs=0.5)


def test_markup_is_text(page):
    markup = "<img src=x onerror=alert(1)><b>x"
    page.type("#prompt", markup)
    page.click("#send")
    page.wait(IDLE)
    assert page.text(".answer .ask") == markup
    assert page.run("return document.querySelectorAll('#answers img, #answers b:not(.facts b)').length") == 0


def test_a_full_queue_is_said_in_words(browser, page, engine, gate):
    asked = Request(prompt=(1, 2), sampling=Sampling(max_tokens=4, temperature=0, ignore_eos=True))
    streams = engine.submit_all([asked] * engine.max_choices)
    assert gate.reached.wait(30)
    page.type("#prompt", "one more")
    page.click("#send")
    page.wait("!document.querySelector('#talk-error').hidden")
    said = page.text("#talk-error")
    assert "queue is full (429)" in said
    assert "try again in 1 s" in said
    assert page.run("return document.querySelectorAll('.answer').length") == 0
    gate.open.set()
    for stream in streams:
        stream.result()
    logged = browser.log("browser")
    assert [("429" in one["message"], one["source"]) for one in logged] == [(True, "network")]


def test_a_refused_setting_is_said_in_words(browser, page):
    page.run("document.querySelector('#settings').open = true")
    page.type("#temperature", "-1")
    page.type("#prompt", "x")
    # Past the form's own check.
    page.run("document.querySelector('#ask').noValidate = true")
    page.click("#send")
    page.wait("!document.querySelector('#talk-error').hidden")
    assert "temperature must be" in page.text("#talk-error")
    assert len(browser.log("browser")) == 1


def test_a_key_is_asked_for_and_used(browser, engine):
    with background(engine, LOCAL, model_name="tiny", api_key="open sesame") as url:
        browser.open(url)
        browser.wait("document.querySelector('#status').textContent === 'API key needed'")
        assert browser.run("return document.querySelector('#key-box').open")
        browser.type("#key", "wrong")
        browser.click("#key-form button")
        browser.wait("document.querySelector('#key-box').open")
        browser.type("#key", "open sesame")
        browser.click("#key-form button")
        browser.wait(READY)
        browser.type("#prompt", "once")
        browser.click("#send")
        browser.wait(f"{IDLE} && document.querySelector('.answer .written').textContent")
        browser.open("about:blank")


def test_the_keyboard_reaches_and_explains(page):
    page.cdp("Page.bringToFront")
    press = lambda key, code: [  # noqa: E731
        page.cdp("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)
        for kind in ("keyDown", "keyUp")
    ]
    page.run("document.activeElement.blur()")
    seen = []
    for _ in range(80):
        press("Tab", 9)
        seen.append(page.run(FOCUSED))
        if seen[-1][1]:
            shown = page.run("const tip = document.querySelector('#tip'); return tip.hidden ? '' : tip.textContent")
            assert shown == seen[-1][1]
    reached = [name for name, _ in seen]
    assert {"skip", "prompt", "send", "load-num", "load-go", "tile", "mark"} <= set(reached)
    assert reached.index("prompt") < reached.index("load-go") < reached.index("tile") < reached.index("mark")
    page.run("document.querySelector('.tile').focus()")
    press("Escape", 27)
    assert page.run("return document.querySelector('#tip').hidden")


def test_dark_and_light_are_legible(page):
    papers = {}
    for scheme in ("light", "dark"):
        page.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        measured = page.run(CONTRASTS)
        papers[scheme] = measured[0][2]
        # Source: WCAG 2.2, success criterion 1.4.3.
        assert [one for one in measured if one[0] < 4.5] == []
    assert papers["dark"] < 0.05 < 0.9 < papers["light"]


@pytest.mark.parametrize("width", [320, 390, 800])
def test_narrow_screens_scroll_one_way(page, width):
    page.cdp("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=True)
    try:
        page.wait("document.documentElement.clientWidth === given[0]", width)
        page.wait("Number(document.querySelector('#roofline svg').getAttribute('height')) > 0")
        sizes = page.run(WIDTHS)
        assert sizes[0] <= width
        assert 200 < sizes[1] < width
    finally:
        page.cdp("Emulation.clearDeviceMetricsOverride")


def test_a_hidden_page_does_not_watch(page, http, url):
    page.run(SET_HIDDEN, True)
    before = page.text("#finished")
    complete(http, prompt="a", max_tokens=2)
    assert json.loads(http.get("/engine").text)["totals"]["num_finished"] > 0
    page.run("return new Promise((done) => setTimeout(done, 600))")
    assert page.text("#finished") == before
    page.run(SET_HIDDEN, False)
    page.wait("document.querySelector('#finished').textContent !== given[0]", before)
