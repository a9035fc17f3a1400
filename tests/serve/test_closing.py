"""A server that closes: it finishes what it accepted, and waits for no client for ever."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from openai_calls import LOCAL

import gcompute.serve.server as server_module
from gcompute.serve.server import background


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_takes_nothing_does_not_keep_a_server_from_closing(engine, monkeypatch, wait_until, streamed):
    monkeypatch.setattr(server_module, "STALLED_S", 0.2)
    real_bind = server_module.bind

    def bind(host: str, port: int) -> socket.socket:
        listening = real_bind(host, port)
        # Connections have what their listener has: less than the answer.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listening

    monkeypatch.setattr(server_module, "bind", bind)
    prompts = [[1, 2, 3]] * 7
    content = json.dumps({"prompt": prompts, "max_tokens": 60, "ignore_eos": True, "logprobs": 20, "stream": streamed})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        with background(engine, LOCAL, model_name="tiny") as url:
            host, port = url.removeprefix("http://").split(":")
            stalled.connect((host, int(port)))
            stalled.sendall((head + content).encode())
            wait_until(engine, lambda: engine.stats().num_running > 0)
            wait_until(engine, lambda: engine.stats().num_running == engine.stats().num_waiting == 0)
        received = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while part := stalled.recv(1 << 16):
                received += part
    assert b"HTTP/1.1 200" in received
    assert not received.endswith((b"[DONE]\n\n\r\n0\r\n\r\n", b"}"))


SERVER = """
    import sys
    sys.path.insert(0, {tests!r})
    from conftest import CONFIG, SERVE
    import jax
    from gcompute.model.tokenizer import Tokenizer
    from gcompute.model.transformer import init
    from gcompute.serve.engine import Engine
    from gcompute.serve.server import serve

    engine = Engine(init(CONFIG, jax.random.key(0)), CONFIG, Tokenizer.from_spec("byte", list), SERVE)
    serve(engine, SERVE, model_name="tiny", announce=lambda url: print(url, flush=True))
    print(engine.stats().status, engine.stats().num_running, flush=True)
"""


@pytest.mark.slow
def test_sigterm_under_load_finishes_what_was_accepted_in_a_process_of_its_own():
    script = textwrap.dedent(SERVER).format(tests=str(__file__).rsplit("/", 1)[0])
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    body = {"prompt": "a", "max_tokens": 60, "ignore_eos": True, "stream": True}
    begun = [threading.Event() for _ in range(7)]

    def follow(index: int) -> list:
        lines = []
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60, trust_env=False) as response:
            assert response.status_code == 200
            begun[index].set()
            lines += [line for line in response.iter_lines() if line]
        return lines

    with ThreadPoolExecutor(7) as pool:
        followed = [pool.submit(follow, index) for index in range(7)]
        for one in begun:
            assert one.wait(60)
        process.send_signal(signal.SIGTERM)
        for future in followed:
            lines = future.result()
            assert lines[-1] == "data: [DONE]"
            made = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
            assert made[-1]["choices"][0]["finish_reason"] == "length"
    assert process.wait(60) == 0
    assert process.stdout.read().split() == ["closed", "0"]
    process.stdout.close()
