"""gcompute bench serve: what it prints and writes, its pictures and exit status, Ctrl-C, and bad input in one line."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest
from command_line import Command
from plan_answers import one_line

from gcompute.config.model import ModelConfig
from gcompute.config.serve import ServeConfig
from gcompute.model.tokenizer import Tokenizer
from gcompute.model.transformer import init
from gcompute.serve.engine import Engine
from gcompute.serve.server import background

MODEL = ModelConfig(vocab=257, layers=1, dim=16, heads=2, kv_heads=1, ffn=32, context=64)
SERVE = ServeConfig(slots=2, max_queue=2, max_context=32, decode_steps=2, precision="float32", port=0)
SMALL = ("--prompt", "8", "--output", "4", "--warmup", "1")


@pytest.fixture(scope="module")
def engine():
    with Engine(init(MODEL, jax.random.key(0)), MODEL, Tokenizer.from_spec("byte", list), SERVE) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine):
    with background(engine, SERVE, model_name="tiny") as url:
        yield url


@pytest.fixture(scope="module")
def locked_url(engine):
    with background(engine, SERVE, model_name="tiny", api_key="secret") as url:
        yield url


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.json"
    fields = {"vocab": 257, "layers": 1, "dim": 16, "heads": 2, "kv_heads": 1, "ffn": 32, "context": 64}
    path.write_text(json.dumps(fields))
    return path


def test_one_load_as_json_and_file_and_picture(gcompute: Command, url: str, model_file: Path, tmp_path: Path):
    paths = {"--out": tmp_path / "out.json", "--plot": tmp_path / "one.png"}
    files = [part for pair in paths.items() for part in pair]
    load = ("--concurrency", "2", "--requests", "6", "--slo-e2e", "100", "--usd-per-hour", "2")
    ended = gcompute("bench", "serve", url, *SMALL, *load, "--model", model_file, "--on", "v5e:1x1", "--json", *files)
    assert ended.status == 0, ended.err
    document = json.loads(ended.out)
    (run,) = document["runs"]
    measured, predicted = run["measured"], run["predicted"]
    assert (measured["num_sent"], measured["num_ok"], measured["num_good"]) == (6, 6, 6)
    # The model's vocabulary is known, so the prompts are of token ids and their length is exact.
    assert (measured["prompt_tokens"], measured["output_tokens"]) == (48, 24)
    assert measured["output_tokens_per_s"] == pytest.approx(24 / measured["wall_s"])
    assert predicted["together"] == 2
    assert predicted["ttft_s"] > 0
    usd = run["usd_per_million_output_tokens"]
    assert usd["measured"] == pytest.approx(2 / 3600 / measured["output_tokens_per_s"] * 1e6)
    assert usd["predicted"] == pytest.approx(2 / 3600 / predicted["output_tokens_per_s"] * 1e6)
    assert (document["model"], document["plan"]["target"], document["engine"]) == ("tiny", "v5e:1x1", None)
    written = json.loads(paths["--out"].read_text())
    assert len(written["runs"][0]["requests"]) == 6
    assert written["runs"][0]["measured"] == measured
    assert paths["--plot"].read_bytes().startswith(b"\x89PNG")


def test_one_load_as_tables(gcompute: Command, url: str):
    ended = gcompute("bench", "serve", url, *SMALL, "--vocab", "99", "--rate", "50", "--requests", "5")
    assert ended.status == 0, ended.err
    for said in ("TTFT", "TPOT", "ITL", "E2E", "p99", "output tokens/s", "of 50", "(measured)", "no prediction: give"):
        assert said in ended.out
    assert "load: 50 requests/s" in ended.err


def test_a_sweep_with_words_and_a_page(gcompute: Command, url: str, tmp_path: Path):
    path = tmp_path / "sweep.html"
    ended = gcompute("bench", "serve", url, *SMALL, "--sweep", "1,2,8", "--requests", "8", "--plot", path)
    # Words of several bytes: at this length a prompt is of one or two.
    assert ended.status == 0, ended.err
    assert "8 at a time: " in ended.out
    assert "failed with HTTP 429" in ended.out
    assert [line.split()[1] for line in ended.out.splitlines() if line.startswith("│ ")] == ["1", "2", "8"] * 2
    assert path.read_bytes().startswith(b"<!doctype html>")


def test_chat_and_a_file_of_prompts(gcompute: Command, url: str, tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "hi", "max_tokens": 3}\n{"prompt": "you"}\n')
    load = ("--chat", "--prompts", path, "--output", "2", "--requests", "4", "--concurrency", "1", "--warmup", "0")
    ended = gcompute("bench", "serve", url, *load, "--json")
    assert ended.status == 0, ended.err
    measured = json.loads(ended.out)["runs"][0]["measured"]
    assert (measured["num_ok"], measured["output_tokens"]) == (4, 2 * (3 + 2))


def test_a_key_that_is_right(gcompute: Command, locked_url: str):
    load = (*SMALL, "--vocab", "99", "--requests", "2", "--json")
    assert gcompute("bench", "serve", locked_url, *load, "--api-key", "secret").status == 0


def test_ctrl_c_shows_what_was_measured(gcompute: Command, url: str, monkeypatch: pytest.MonkeyPatch):
    from gcompute.cli.bench_show import LoadProgress

    watch = LoadProgress.watch

    def interrupting(self, arrivals, num):
        show = watch(self, arrivals, num)

        def tell(now) -> None:
            show(now)
            if now.done == 3:
                os.kill(os.getpid(), signal.SIGINT)

        return tell

    monkeypatch.setattr(LoadProgress, "watch", interrupting)
    load = (*SMALL, "--vocab", "99", "--requests", "5000", "--concurrency", "1", "--json")
    ended = gcompute("bench", "serve", url, *load)
    assert ended.status == 130
    document = json.loads(ended.out)
    assert document["stopped"] == "interrupted"
    assert 3 <= document["runs"][0]["measured"]["num_ok"] < 100
    assert ended.err.splitlines()[-1] == "interrupted."
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_server_that_dies_is_reported_with_what_it_served(gcompute: Command, tmp_path: Path):
    """It answers three requests, then closes its socket and every connection in the middle of an answer."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    token = b'data: {"choices": [{"text": "x", "finish_reason": null}]}\n\n'

    def answer() -> None:
        for number in range(5):
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                if not number:
                    connection.sendall(b"HTTP/1.1 404 No\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                elif number < 4:
                    connection.sendall(head + token + token + b"data: [DONE]\n\n")
                else:
                    listener.close()
                    connection.sendall(head.replace(b"close", b"keep-alive") + token)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")

    thread = threading.Thread(target=answer)
    thread.start()
    load = ("--vocab", "9", *SMALL, "--warmup", "0", "--concurrency", "1", "--requests", "400", "--json")
    ended = gcompute("bench", "serve", f"http://127.0.0.1:{port}", *load)
    thread.join()
    assert ended.status == 1
    document = json.loads(ended.out)
    measured = document["runs"][0]["measured"]
    assert document["stopped"].startswith("the server is gone")
    assert measured["num_ok"] == 3
    assert measured["errors"]["cannot connect"] == 20
    assert sum(measured["errors"].values()) + measured["num_unfinished"] + 3 == measured["num_sent"]
    assert not measured["counted"]


BAD = [
    (("nowhere",), "nowhere does not exist"),
    (("localhost:8000",), "URL begins with http://: http://localhost:8000"),
    (("ftp://a",), "not the URL of a server"),
    (("http://127.0.0.1:1",), "nothing listens there"),
    (("{url}", "--rate", "0"), "--rate 0 must be above 0"),
    (("{url}", "--rate", "nan"), "--rate nan must be above 0"),
    (("{url}", "--rate", "1", "--burstiness", "0"), "--burstiness 0 must be"),
    (("{url}", "--concurrency", "0"), "--concurrency 0 must be at least 1"),
    (("{url}", "--rate", "inf", "--duration", "1", "--requests", "0"), "requests must be above 0"),
    (("{url}", "--sweep", "1,two"), "--sweep '1,two' is not understood"),
    (("{url}", "--sweep", "1", "--rate", "2"), "leave out --rate"),
    (("{url}", "--prompt", "0"), "prompt must be above 0"),
    (("{url}", "--prompt", "30", "--output", "30"), "come to 60 tokens, and the server's context is 32"),
    (("{url}", "--prompt", "20", "--output", "4", "--spread", "0.9"), "with --spread 0.9"),
    (("{url}", "--spread", "1"), "--spread 1 must be from 0"),
    (("{url}", "--shared-prefix", "99"), "--shared-prefix 99 must be below"),
    (("{url}", "--prompts", "none.txt"), "--prompts none.txt cannot be read"),
    (("{url}", "--prompts", "empty.txt"), "holds no prompt"),
    (("{url}", "--name", "tinny", *SMALL), "has no model 'tinny'. Did you mean 'tiny'?"),
    (("{url}", "--vocab", "5000", *SMALL), "refuses the first requests with HTTP 400: prompt holds token id"),
    (("{url}", "--body", "[]"), "--body must be a JSON object"),
    (("{url}", "--body", "{"), "--body is not JSON"),
    (("{url}", "--body", '{"stream": false}'), "--body cannot set stream"),
    (("{url}", "--body", '{"colour": 1}', "--vocab", "9", *SMALL), "Unknown parameter: 'colour'"),
    (("{url}", "--slots", "4"), "--slots is for the server of a checkpoint"),
    (("{url}", "--slo-ttft", "-1"), "--slo-ttft -1 must be"),
    (("{url}", "--usd-per-hour", "0"), "--usd-per-hour 0 must be"),
    (("{url}", "--on", "v5f:1"), "Did you mean"),
    (("{url}", "--model", "llama3-8c"), "Did you mean 'llama3-8b'"),
    (("{url}", "--mesh", "tensor=2"), "give --on a target of as many"),
    (("{url}", "--plot", "curve.pdf"), "must end in .png or .html"),
    (("{url}", "--out", "nowhere/out.json"), "there is no directory"),
    (("{locked}",), "answers 401: The API key is missing or wrong"),
    (("{locked}", "--api-key", "wrong"), "Give --api-key"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_input(
    gcompute: Command, url: str, locked_url: str, tmp_path: Path, monkeypatch, arguments: tuple[str, ...], said: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    places = {"{url}": url, "{locked}": locked_url}
    ended = gcompute("bench", "serve", *(places.get(part, part) for part in arguments))
    assert said in one_line(ended)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_a_directory_that_is_no_checkpoint(gcompute: Command, tmp_path: Path):
    assert "holds no checkpoint" in gcompute("bench", "serve", tmp_path).error


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (("--weights", "int8", "--kv", "int8", "--slots", "2"), {"weights": "int8", "kv": "int8", "slots": 2}),
        (("--weights", "int8"), {"weights": "int8", "kv": "int8"}),
        (("--weights", "int8", "--kv", "bfloat16"), {"weights": "int8"}),
        (("--weights", "bfloat16"), {}),
    ],
)
def test_the_server_of_a_checkpoint_keeps_what_the_plan_counts(
    gcompute: Command, tmp_path: Path, monkeypatch, given: tuple[str, ...], kept: dict[str, object]
):
    asked = []

    def start(checkpoint: Path, serve: dict[str, object], *, measure: bool):
        asked.append(serve)
        raise ValueError("that is all.")

    monkeypatch.setattr("gcompute.cli.bench_serve._check_checkpoint", lambda server: None)
    monkeypatch.setattr("gcompute.cli.bench_server.checkpoint_server", start)
    assert gcompute("bench", "serve", tmp_path, *given).error == "error: that is all."
    assert asked == [kept]


@pytest.mark.slow
def test_a_checkpoint_is_served_by_a_process_of_its_own(gcompute: Command, finished: Path):
    load = ("--prompt", "6", "--output", "4", "--requests", "12", "--concurrency", "3", "--slots", "2", "--kv", "int8")
    ended = gcompute("bench", "serve", finished, *load, "--json")
    assert ended.status == 0, ended.err
    document = json.loads(ended.out)
    assert document["engine"]["num_late_compilations"] == 0
    # The counted requests, and the four before them.
    assert document["engine"]["num_output_tokens"] == 4 * (12 + 4)
    assert document["plan"]["target"] == "this:1"
    assert document["runs"][0]["predicted"]["together"] == 2


@pytest.mark.slow
def test_ctrl_c_ends_the_servers_process_too(environment, finished: Path, tmp_path: Path):
    import psutil

    command = [sys.executable, "-m", "gcompute", "bench", "serve", str(finished), "--prompt", "6", "--output", "4"]
    process = subprocess.Popen(
        [*command, "--requests", "1000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    while "load: 4 at a time" not in line:
        assert line
        line = process.stderr.readline()
    (child,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped before its end: interrupted" in out or "interrupted." in err
    assert not child.is_running()
