"""Templates that never end or never fit, and the process that bounds them."""

import gc
import subprocess
import sys
import threading
import time

import psutil
import pytest

from gcompute.model.tokenizer import Tokenizer
from gcompute.serve.bounded_process import BoundedProcess
from gcompute.serve.chat_template import WORKER
from gcompute.serve.request import NotReady
from gcompute.serve.template import JinjaTemplate, Message

pytest.importorskip("jinja2")

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TIME_S = 1.0


def template_of(hostile: str, **more) -> JinjaTemplate:
    source = "{% if messages[0].content == 'bad' %}" + hostile + "{% else %}ok{% endif %}"
    return JinjaTemplate(source, {}, where="tokenizer_config.json", time_s=TIME_S, **more)


def say(template: JinjaTemplate, content: str, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(template.encode([Message(role="user", content=content)], tokenizer))


@pytest.mark.parametrize(
    ("hostile", "reason"),
    [
        (LOOP, "took longer"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "nested too deeply"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}", "took longer"),
        ("{{ 'a' * 10**10 }}", "memory"),
        ("{{ messages[0].content * 10**10 }}", "memory"),
        ("{{ '%9999999999s' % 'a' }}", "memory"),
        ("{{ '{:9999999999}'.format('a') }}", "memory"),
        ("{{ 'a' | center(10**10) }}", "memory"),
        ("{{ [0] * 10**10 }}", "memory"),
        ("{{ 9 ** (9 ** (8 + messages | length)) }}", "took longer"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "memory|longer",
        ),
        (
            "{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = n.x + range(9999)|list %}{% endfor %}",
            "memory|longer",
        ),
        ("{{ 'a' * 2 ** 25 }}", "characters"),
        ("{{ messages.x.y.z }}", "no attribute"),
        ("{{ raise_exception('no') }}", "no"),
        ("{{ ''.__class__.__mro__ }}{{ (messages | attr('__class__')).mro() }}", "unsafe|no attribute|undefined"),
    ],
)
def test_a_hostile_template_is_an_error_that_names_it_and_the_next_chat_is_served(hostile, reason, tokenizer):
    template = template_of(hostile)
    began_s = time.monotonic()
    with pytest.raises(ValueError, match=f"chat template of tokenizer_config.json .*({reason})"):
        say(template, "bad", tokenizer)
    assert time.monotonic() - began_s < TIME_S + 20
    assert say(template, "good", tokenizer) == "ok"


def workers() -> list[int]:
    gc.collect()
    children = psutil.Process().children()
    return [child.pid for child in children if WORKER in " ".join(child.cmdline())]


def test_what_is_stopped_is_gone(tokenizer):
    template = template_of(LOOP)
    assert say(template, "good", tokenizer) == "ok"
    (pid,) = workers()
    with pytest.raises(ValueError, match="was stopped: it took longer than 1 s"):
        say(template, "bad", tokenizer)
    assert not psutil.pid_exists(pid)


def test_a_template_that_is_not_needed_any_more_takes_its_process_with_it(tokenizer):
    template = template_of("")
    assert say(template, "good", tokenizer) == "ok"
    assert len(workers()) == 1
    del template
    assert not workers()


def test_many_threads_have_each_their_own_answer(tokenizer):
    template = JinjaTemplate("{{ messages[0].content }}", {})
    found: dict[str, str] = {}

    def ask(text: str) -> None:
        found[text] = say(template, text, tokenizer)

    texts = [str(at) * 1000 * at for at in range(1, 17)]
    threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {text: text for text in texts}


def test_whoever_waits_too_long_for_others_is_told_so(tokenizer):
    template = template_of("")
    busy = [template._pool._take() for _ in range(4)]
    assert len(workers()) == 4
    with pytest.raises(NotReady, match="busy"):
        say(template, "good", tokenizer)
    template._pool._idle.put(busy[0])
    assert say(template, "good", tokenizer) == "ok"


def test_others_do_not_wait_for_a_chat_that_takes_all_of_its_time(tokenizer):
    template = template_of(LOOP)
    template._time_s = 20.0
    prepared = template.prepare(tokenizer)
    stopped: list[str] = []

    def loop() -> None:
        try:
            say(template, "bad", tokenizer)
        except ValueError as error:
            stopped.append(str(error))

    slow = threading.Thread(target=loop)
    slow.start()
    time.sleep(0.3)
    began_s = time.monotonic()
    assert say(template, "good", tokenizer) == "ok"
    assert (time.monotonic() - began_s < 15, stopped) == (True, [])
    for pid in workers():
        psutil.Process(pid).kill()
    slow.join()
    assert "its process ended" in stopped[0]
    assert say(template, "good", tokenizer) == "ok"
    assert template.prepare(tokenizer) is prepared


PARENT = """
import sys, threading, time
from gcompute.serve.bounded_process import BoundedProcess
first = {"templates": {"default": %r}, "special": {}, "memory_bytes": 1 << 30}
process = BoundedProcess("gcompute.serve.chat_worker", first)
print(process.running.pid, flush=True)
if sys.argv[1] == "loop":
    question = {"template": "default", "variables": {"messages": []}, "time_s": 60, "max_chars": 1}
    process.ask(question, time_s=60)
time.sleep(60)
"""


@pytest.mark.parametrize("state", ["idle", "loop"])
def test_the_process_ends_with_the_one_that_started_it_however_that_ends(state, tmp_path):
    command = [sys.executable, "-c", PARENT % LOOP, state]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.2)
        assert worker.is_running()
        parent.kill()
        worker.wait(timeout=20)


@pytest.mark.oldest
def test_the_process_is_light_and_knows_no_jax():
    code = f"import {WORKER}, sys; print(sorted({{'jax', 'numpy', 'tokenizers'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_process_that_does_not_start_is_one_line(monkeypatch):
    with pytest.raises(ValueError, match=r"the process of no\.such\.module did not start: its process ended"):
        BoundedProcess("no.such.module", {})
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(ValueError, match=r"chat template of tokenizer_config\.json cannot be used: no process"):
        template_of("")
