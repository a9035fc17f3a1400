"""Serve one model with gcompute, llama.cpp and transformers in turn (A B C, A B C), and compare medians.

    python benchmarks/serve_vs_peers/run.py                          batches of 1, 8 and 32
    python benchmarks/serve_vs_peers/run.py --batches 1 --int8       also gcompute with int8 weights and cells
    python benchmarks/serve_vs_peers/run.py --peers-python PYTHON    peers in an environment of their own
    python benchmarks/serve_vs_peers/run.py --isa avx2               as on a processor without AVX-512

Each measurement is a process of its own. The last line of output is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from model import DIM, FFN, HEAD, HEADS, KV_HEADS, LAYERS, VOCAB

HERE = Path(__file__).parent
# What gcompute is to reach, as multiples of a peer's tokens a second.
TRANSFORMERS = {"decode": {1: 2.0, 8: 2.0, 32: 2.0}, "prefill": 2.0}
TARGETS = {
    "native": {"llama.cpp": {"decode": {1: 0.9, 8: 1.5, 32: 2.0}, "prefill": 1.0}, "transformers": TRANSFORMERS},
    "avx2": {"llama.cpp": {"decode": {1: 1.2, 8: 1.5, 32: 1.5}, "prefill": 1.0}, "transformers": TRANSFORMERS},
}
# What makes gcompute's kernels, XLA and torch leave AVX-512 alone. llama.cpp has to be built without it.
ENVIRONMENTS = {
    "native": {},
    "avx2": {
        "GCOMPUTE_NATIVE_FLAGS": "-mno-avx512f",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}
# Every number of the matrices is used once a token.
MATRIX_NUMBERS = LAYERS * (DIM * HEAD * (2 * HEADS + 2 * KV_HEADS) + 3 * DIM * FFN) + DIM * VOCAB


def say(text: str) -> None:
    print(text, flush=True)


def last_json(command: list[str], isa: str) -> dict[str, Any]:
    """Run a command with an instruction set and read the JSON object that it ends with."""
    environment = {**os.environ, **ENVIRONMENTS[isa]}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if isa == "avx2" and "AVX512 = 1" in found.get("system", ""):
        raise SystemExit(f"error: {command[0]} has a llama.cpp with AVX-512: build it as README.md says.")
    return found


def contenders(options: argparse.Namespace) -> dict[str, list[str]]:
    peer = options.peers_python
    commands = {"gcompute": [sys.executable, str(HERE / "ours.py"), "--fast"]}
    if options.int8:
        commands["gcompute int8"] = [*commands["gcompute"], "--weights", "int8", "--kv", "int8"]
    if options.float32:
        commands["gcompute float32"] = [*commands["gcompute"], "--precision", "float32"]
    threads = str(len(os.sched_getaffinity(0)))
    for precision in options.llama_precisions if "llama.cpp" in options.peers else ():
        command = [peer, str(HERE / "llama_cpp_peer.py"), "--threads", threads, "--precision", precision]
        commands[f"llama.cpp {precision}"] = command
    if "transformers" in options.peers:
        commands["transformers bfloat16"] = [peer, str(HERE / "transformers_peer.py"), "--precision", "bfloat16"]
    return commands


def roofline_share(ours: list[dict[str, Any]], batch: int) -> dict[str, float]:
    """How much of the measured ceilings the decode reaches: weights read a second, and operations of the products."""
    steps_per_s = median(run["decode_tokens_per_s"] for run in ours) / batch
    bytes_per_s = median(run["roofline_bytes_per_s"] for run in ours)
    flops_per_s = median(run["roofline_flops_per_s"] for run in ours)
    return {
        "memory": 2 * MATRIX_NUMBERS * steps_per_s / bytes_per_s,
        "matmul": 2 * MATRIX_NUMBERS * batch * steps_per_s / flops_per_s,
    }


def compare(batch: int, options: argparse.Namespace) -> dict[str, Any]:
    commands = contenders(options)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for turn in range(options.rounds):
        for name, command in commands.items():
            found = last_json([*command, "--batch", str(batch), "--repeats", str(options.repeats)], options.isa)
            runs[name].append(found)
            say(
                f"batch {batch}, turn {turn + 1}, {name}: decode {found['decode_tokens_per_s']:.0f},"
                f" prefill {found['prefill_tokens_per_s']:.0f} tokens/s"
            )
    result: dict[str, Any] = {"batch": batch, "roofline_share": roofline_share(runs["gcompute"], batch)}
    kinds = ("decode", "prefill")
    rates = {
        name: {kind: median(run[f"{kind}_tokens_per_s"] for run in found) for kind in kinds}
        for name, found in runs.items()
    }
    result["tokens_per_s"] = rates
    result["versions"] = {name: found[0]["version"] for name, found in runs.items()}
    result["first_tokens"] = {name: found[0]["first_tokens"] for name, found in runs.items()}
    for peer in options.peers:
        target = TARGETS[options.isa][peer]
        for kind in kinds:
            # The best of a peer's precisions counts.
            best = max(rate[kind] for name, rate in rates.items() if name.startswith(peer))
            wanted = target[kind][batch] if kind == "decode" and batch in target[kind] else target["prefill"]
            ratio = rates["gcompute"][kind] / best
            result[f"{kind} against {peer}"] = {"ratio": ratio, "target": wanted, "reached": ratio >= wanted}
            verdict = "reached" if ratio >= wanted else "not reached"
            say(f"batch {batch}: {kind} {ratio:.2f} times {peer} (target {wanted}: {verdict})")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3, help="turns of every engine")
    parser.add_argument("--repeats", type=int, default=3, help="generations a turn")
    parser.add_argument("--int8", action="store_true", help="also gcompute in int8; it counts against no target")
    parser.add_argument("--float32", action="store_true", help="also gcompute in float32; it counts against no target")
    parser.add_argument("--isa", choices=tuple(ENVIRONMENTS), default="native", help="avx2: leave AVX-512 alone")
    parser.add_argument("--peers", nargs="+", default=["llama.cpp", "transformers"], choices=tuple(TARGETS["native"]))
    parser.add_argument("--llama-precisions", nargs="+", default=["bf16"], choices=("f32", "f16", "bf16"))
    parser.add_argument("--peers-python", default=sys.executable, help="the interpreter that has the peers")
    options = parser.parse_args()
    say(json.dumps({"isa": options.isa, "results": [compare(batch, options) for batch in options.batches]}))


if __name__ == "__main__":
    main()
