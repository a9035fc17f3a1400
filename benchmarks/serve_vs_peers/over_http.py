"""gcompute over HTTP beside its bare engine, and beside llama.cpp's server, under Poisson load at 80 % of capacity.

    python benchmarks/serve_vs_peers/over_http.py
    python benchmarks/serve_vs_peers/over_http.py --llama-server build/bin/llama-server --peers-python PYTHON

Capacity is what the bare engine serves of requests that are all there at once. At 80 % of that rate the same requests
then come at the same moments to the bare engine, to gcompute's server and to llama.cpp's, in turn (A B C, A B C); the
servers are loaded by `gcompute bench serve`. Then all come at once, to the bare engine and over HTTP. llama.cpp's
server is also measured at 80 % of its own capacity. The last line of output is one JSON object; medians of the turns
count.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from model import GENERATED, PROMPT, VOCAB
from run import last_json, say

HERE = Path(__file__).parent
LOAD = 0.8
START_S = 120
# gcompute's throughput over HTTP as a share of its bare engine's.
TARGET = 0.9

Figures = dict[str, float]


@contextlib.contextmanager
def server(command: list[str], url: str | None = None) -> Iterator[str]:
    """Run a server and yield its URL: the first line that it prints, unless it is known."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        if url is None:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
        wait_until_ready(process, url)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def wait_until_ready(process: subprocess.Popen[str], url: str) -> None:
    for _ in range(START_S * 10):
        if process.poll() is not None or not url:
            raise SystemExit(f"error: a server ended with {process.poll()} instead of starting.")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"error: a server was not ready after {START_S} s.")


def ours(options: argparse.Namespace) -> tuple[list[str], str | None]:
    command = [sys.executable, str(HERE / "ours_load.py"), "--slots", str(options.slots)]
    return [*command, "--requests", str(options.requests), "--listen"], None


def llama(options: argparse.Namespace, file: Path) -> tuple[list[str], str | None]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    threads = str(len(os.sched_getaffinity(0)))
    command = [options.llama_server, "-m", str(file), "--port", str(port), "-np", str(options.slots)]
    command += ["-c", str(options.slots * (PROMPT + GENERATED)), "--no-kv-unified", "-t", threads, "-tb", threads]
    return command, f"http://127.0.0.1:{port}"


def over_http(url: str, rate: float, options: argparse.Namespace, seed: int) -> Figures:
    command = [str(Path(sys.executable).parent / "gcompute"), "bench", "serve", url, "--rate", str(rate), "--json"]
    command += ["--requests", str(options.requests), "--seed", str(seed), "--vocab", str(VOCAB)]
    found = last_json([*command, "--prompt", str(PROMPT), "--output", str(GENERATED)])["runs"][0]["measured"]
    if found["num_ok"] != options.requests or found["num_short"]:
        raise SystemExit(f"error: {url} served {found['num_ok']} of {options.requests}: {found['errors']}")
    return figures(found["wall_s"], options.requests, found["ttft"], found["tpot"])


def bare(rate: float, options: argparse.Namespace, seed: int) -> Figures:
    command = [sys.executable, str(HERE / "ours_load.py"), "--slots", str(options.slots), "--rate", str(rate)]
    found = last_json([*command, "--requests", str(options.requests), "--seed", str(seed)])
    return figures(found["wall_s"], options.requests, found["ttft_s"], found["tpot_s"])


def figures(wall_s: float, num: int, ttft_s: dict[str, float], tpot_s: dict[str, float]) -> Figures:
    return {
        "requests_per_s": num / wall_s,
        "tokens_per_s": num * GENERATED / wall_s,
        "ttft_p50_s": ttft_s["p50"],
        "ttft_p99_s": ttft_s["p99"],
        "tpot_p50_s": tpot_s["p50"],
    }


def tell(name: str, rate: float, found: Figures) -> Figures:
    asked = name if rate == float("inf") else f"{name}, {rate:.2f} requests/s"
    say(
        f"{asked}: {found['tokens_per_s']:.0f} tokens/s, TTFT p50 {1e3 * found['ttft_p50_s']:.0f} ms,"
        f" p99 {1e3 * found['ttft_p99_s']:.0f} ms, TPOT p50 {1e3 * found['tpot_p50_s']:.1f} ms"
    )
    return found


def measure(options: argparse.Namespace, gguf: Path | None) -> dict[str, Any]:
    everything = float("inf")
    capacity = tell("bare engine, all at once", everything, bare(everything, options, seed=0))["requests_per_s"]
    rate = LOAD * capacity
    result: dict[str, Any] = {"capacity_requests_per_s": capacity, "rate_requests_per_s": rate}
    runs: dict[str, list[Figures]] = {}

    def add(name: str, at: float, found: Figures) -> None:
        runs.setdefault(name, []).append(tell(name, at, found))

    own_rate = 0.0
    if gguf is not None:
        with server(*llama(options, gguf)) as url:
            found = tell("llama.cpp, all at once", everything, over_http(url, everything, options, seed=0))
        own_rate = LOAD * found["requests_per_s"]
        result["llama.cpp_capacity_requests_per_s"] = found["requests_per_s"]
    for turn in range(1, 1 + options.rounds):
        add("bare engine", rate, bare(rate, options, turn))
        add("bare engine, all at once", everything, bare(everything, options, turn))
        with server(*ours(options)) as url:
            add("gcompute over HTTP", rate, over_http(url, rate, options, turn))
            add("gcompute over HTTP, all at once", everything, over_http(url, everything, options, turn))
            if gguf is not None:
                add("gcompute over HTTP at llama.cpp's rate", own_rate, over_http(url, own_rate, options, turn))
        if gguf is not None:
            with server(*llama(options, gguf)) as url:
                add("llama.cpp at its own rate", own_rate, over_http(url, own_rate, options, turn))
            with server(*llama(options, gguf)) as url:
                add("llama.cpp", rate, over_http(url, rate, options, turn))
    result["medians"] = {
        name: {key: median(run[key] for run in some) for key in some[0]} for name, some in runs.items()
    }
    result["target"] = TARGET
    for load, key in (("", "over_http_share"), (", all at once", "over_http_share_at_once")):
        over, engine = (result["medians"][name + load] for name in ("gcompute over HTTP", "bare engine"))
        ratio = result[key] = over["tokens_per_s"] / engine["tokens_per_s"]
        reached = "reached" if ratio >= TARGET else "not reached"
        say(f"over HTTP{load}: {ratio:.3f} of the bare engine (target {TARGET}: {reached})")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=32, help="requests decoded together, by every server")
    parser.add_argument("--requests", type=int, default=300, help="requests of a load")
    parser.add_argument("--rounds", type=int, default=2, help="turns of every contender")
    parser.add_argument("--llama-server", help="llama.cpp's server, built for this processor")
    parser.add_argument("--peers-python", default=sys.executable, help="the interpreter that has gguf")
    options = parser.parse_args()
    if options.llama_server and not shutil.which(options.llama_server):
        parser.error(f"--llama-server {options.llama_server}: there is no such program; build llama-server first.")
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "model.gguf" if options.llama_server else None
        if gguf is not None:
            subprocess.run([options.peers_python, str(HERE / "gguf_file.py"), str(gguf)], check=True)
        say(json.dumps(measure(options, gguf)))


if __name__ == "__main__":
    main()
