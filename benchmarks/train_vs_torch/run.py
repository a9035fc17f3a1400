"""Train the same models with gcompute and with plain PyTorch, in turn (A B A B), and compare medians.

    python benchmarks/train_vs_torch/run.py                     steps of baby GPT and of the small setting
    python benchmarks/train_vs_torch/run.py --text input.txt    also 2,000 steps on a text, by character
    python benchmarks/train_vs_torch/run.py --startup           also the time to the first step, cold and warm

Each measurement is a process of its own. gcompute sets up its own environment, as `gcompute train` does; torch runs in
the environment it is given, eager and compiled, and the better of the two counts. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
MODELS = {
    "baby": {"layers": 6, "dim": 384, "heads": 6, "context": 256, "batch": 64, "vocab": 65},
    "small": {"layers": 4, "dim": 128, "heads": 4, "context": 64, "batch": 12, "vocab": 65},
}
STEPS = {"baby": 3, "small": 60}
TEXT_STEPS = 2000
TEXT_LEARNING_RATE = 3e-3


def say(text: str) -> None:
    print(text, flush=True)


def last_json(command: list[str], **environment: str) -> dict[str, Any]:
    """Run a command and read the JSON object that it ends with; `wall_s` is the whole process's time."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "wall_s": time.perf_counter() - started}


def sizes(model: dict[str, int]) -> list[str]:
    return [piece for name, value in model.items() for piece in (f"--{name}", str(value))]


def time_steps(name: str, rounds: int) -> dict[str, Any]:
    """Median step times of gcompute and of torch eager and compiled, in float32 and bfloat16."""
    ours, torch = (str(HERE / file) for file in ("ours.py", "torch_peer.py"))
    contenders = {}
    for precision in ("float32", "bfloat16"):
        shared = [*sizes(MODELS[name]), "--precision", precision, "--time-steps", str(STEPS[name])]
        contenders[f"gcompute {precision}"] = [sys.executable, ours, *shared]
        for mode in ("eager", "compiled"):
            contenders[f"torch {mode} {precision}"] = [sys.executable, torch, *shared, "--mode", mode]
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    share: dict[str, float] = {}
    for turn in range(rounds):
        for contender, command in contenders.items():
            result = last_json(command)
            times[contender].append(result["median_step_s"])
            if "roofline_share" in result:
                share[contender] = result["roofline_share"]
            say(f"{name}, round {turn + 1}: {contender:<24} {result['median_step_s'] * 1e3:9.2f} ms a step")
    medians = {contender: median(values) for contender, values in times.items()}

    def best(side: str, *precisions: str) -> float:
        return min(
            s for contender, s in medians.items() if contender.startswith(side) and contender.endswith(precisions)
        )

    return {
        "median_step_s": medians,
        "roofline_share": share,
        "float32_ratio": best("torch", "float32") / best("gcompute", "float32"),
        "best_precision_ratio": best("torch", "float32", "bfloat16") / best("gcompute", "float32", "bfloat16"),
    }


def train_text(text: Path, rounds: int) -> dict[str, Any]:
    """Validation loss over the whole split and wall time of 2,000 steps, both sides with one learning rate."""
    model = {name: value for name, value in MODELS["small"].items() if name not in ("vocab",)}
    rate = str(TEXT_LEARNING_RATE)
    results: dict[str, list[dict[str, Any]]] = {"gcompute": [], "torch eager": []}
    for turn in range(rounds):
        with tempfile.TemporaryDirectory() as out:
            ours = [sys.executable, "-m", "gcompute", "train", "--model", "nano-small", "--batch", str(model["batch"])]
            ours += ["--data", str(text), "--tokenizer", "char", "--steps", str(TEXT_STEPS), "--learning-rate", rate]
            ours += ["--eval-every", "0", "--checkpoint-every", "0", "--out", out, "--json"]
            result = last_json(ours)
        measured = result["measured"]
        results["gcompute"].append(
            {
                "val_loss": measured["val_loss"],
                "train_s": measured["train_s"] + measured["compile_s"],
                "wall_s": result["wall_s"],
            }
        )
        torch = [sys.executable, str(HERE / "torch_peer.py"), *sizes(model), "--data", str(text)]
        torch += ["--steps", str(TEXT_STEPS), "--learning-rate", rate, "--precision", "bfloat16", "--mode", "eager"]
        result = last_json(torch)
        results["torch eager"].append(
            {"val_loss": result["val_loss"], "train_s": result["train_wall_s"], "wall_s": result["wall_s"]}
        )
        for side, rows in results.items():
            row = rows[-1]
            say(
                f"text, round {turn + 1}: {side:<12} validation loss {row['val_loss']:.4f},"
                f" training {row['train_s']:.1f} s, process {row['wall_s']:.1f} s"
            )
    return {side: {key: median(row[key] for row in rows) for key in rows[0]} for side, rows in results.items()}


def startup() -> dict[str, float]:
    """Seconds from the start of `gcompute train` on the demo model to its first step, with empty caches and again."""
    seconds = {}
    with tempfile.TemporaryDirectory() as root:
        for name in ("cold", "warm"):
            command = [sys.executable, "-m", "gcompute", "train", "--model", "demo", "--batch", "16", "--steps", "2"]
            command += ["--eval-every", "0", "--out", f"{root}/{name}", "--json", "--eval-batches", "1"]
            result = last_json(command, GCOMPUTE_CACHE=f"{root}/cache")
            seconds[f"{name}_s"] = result["measured"]["time_to_first_step_s"]
            seconds[f"{name}_compile_s"] = result["measured"]["compile_s"]
            say(f"time to first step, {name}: {seconds[f'{name}_s']:.1f} s")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="times that each contender runs")
    parser.add_argument("--models", nargs="*", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--text", type=Path, help="a text file, such as tiny Shakespeare")
    parser.add_argument("--startup", action="store_true", help="measure the time to the first step too")
    options = parser.parse_args()
    if options.rounds < 1 or (options.text and not options.text.is_file()):
        parser.error("--rounds must be at least 1, and --text a file.")
    summary: dict[str, Any] = {"models": {name: time_steps(name, options.rounds) for name in options.models}}
    for name, result in summary["models"].items():
        say(
            f"{name}: float32 {result['float32_ratio']:.2f} times torch, best precision"
            f" {result['best_precision_ratio']:.2f} times torch; share of the measured roofline: "
            + ", ".join(f"{who} {share:.0%}" for who, share in result["roofline_share"].items())
        )
    if options.text:
        summary["text"] = train_text(options.text, options.rounds)
    if options.startup:
        summary["startup"] = startup()
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
