"""Train the same models with gcompute and with plain PyTorch, in turn (A B A B), and compare medians.

    python benchmarks/train_vs_torch/run.py                     steps of baby GPT and of the small setting
    python benchmarks/train_vs_torch/run.py --text input.txt    also 2,000 steps on a text, by character
    python benchmarks/train_vs_torch/run.py --startup           also the time to the first step, cold and warm
    python benchmarks/train_vs_torch/run.py --isa avx2          both sides without what the processor has beyond AVX2

Each measurement is a process of its own. gcompute sets up its own environment, as `gcompute train` does; torch runs in
the environment it is given, eager and compiled, and the better of the two counts. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from gcompute.measure.cache import cache_directory
from gcompute.measure.machine import cpu_model, data_caches, usable_cores

HERE = Path(__file__).parent
MODELS = {
    "baby": {"layers": 6, "dim": 384, "heads": 6, "context": 256, "batch": 64, "vocab": 65},
    "small": {"layers": 4, "dim": 128, "heads": 4, "context": 64, "batch": 12, "vocab": 65},
}
STEPS = {"baby": 3, "small": 60}
# What holds each side to an instruction set: XLA's compiler and kernels; torch's own, oneDNN's and MKL's.
ISAS = {
    "native": {},
    "avx2": {
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
PRECISIONS = ("float32", "bfloat16")
MODES = ("eager", "compiled")
TEXT_STEPS = 2000
TEXT_LEARNING_RATE = 3e-3


def say(text: str) -> None:
    print(text, flush=True)


def environment_of(isa: str) -> dict[str, str]:
    """This process's environment with the settings of an instruction set; XLA_FLAGS that are set stay.

    Each instruction set has a cache of its own: the measured roofline in it is that of what XLA may use.
    """
    if isa == "native":
        return dict(os.environ)
    flags = f"{os.environ.get('XLA_FLAGS', '')} {ISAS[isa]['XLA_FLAGS']}".strip()
    return {**os.environ, **ISAS[isa], "XLA_FLAGS": flags, "GCOMPUTE_CACHE": str(cache_directory() / isa)}


def last_json(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a command and read the JSON object that it ends with; `wall_s` is the whole process's time."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "wall_s": time.perf_counter() - started}


def sizes(model: dict[str, int]) -> list[str]:
    return [piece for name, value in model.items() for piece in (f"--{name}", str(value))]


def time_steps(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Median step times of gcompute and of torch eager and compiled, in float32 and bfloat16."""
    environment = environment_of(options.isa)
    ours, torch = (str(HERE / file) for file in ("ours.py", "torch_peer.py"))
    contenders = {}
    for precision in options.precisions:
        shared = [*sizes(MODELS[name]), "--precision", precision, "--time-steps", str(STEPS[name])]
        contenders[f"gcompute {precision}"] = [sys.executable, ours, *shared]
        for mode in options.modes:
            contenders[f"torch {mode} {precision}"] = [options.torch_python, torch, *shared, "--mode", mode]
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    share: dict[str, float] = {}
    accumulation: dict[str, int] = {}
    versions: dict[str, str] = {}
    for turn in range(options.rounds):
        for contender, command in contenders.items():
            result = last_json(command, environment)
            versions[contender.split()[0]] = result["version"]
            times[contender].append(result["median_step_s"])
            if "roofline_share" in result:
                share[contender] = result["roofline_share"]
                accumulation[contender] = result["accumulation"]
            say(f"{name}, round {turn + 1}: {contender:<24} {result['median_step_s'] * 1e3:9.2f} ms a step")
    medians = {contender: median(values) for contender, values in times.items()}

    def best(side: str, *precisions: str) -> float:
        return min(
            s for contender, s in medians.items() if contender.startswith(side) and contender.endswith(precisions)
        )

    ratios = {
        f"{precision}_ratio": best("torch", precision) / best("gcompute", precision) for precision in options.precisions
    }
    return {
        "median_step_s": medians,
        "accumulation": accumulation,
        "roofline_share": share,
        "versions": versions,
        **ratios,
        "best_precision_ratio": best("torch", *options.precisions) / best("gcompute", *options.precisions),
    }


def train_text(options: argparse.Namespace, text: Path) -> dict[str, Any]:
    """Validation loss over the whole split and wall time of 2,000 steps, both sides with one learning rate."""
    model = {name: value for name, value in MODELS["small"].items() if name not in ("vocab",)}
    rate, environment = str(TEXT_LEARNING_RATE), environment_of(options.isa)
    results: dict[str, list[dict[str, Any]]] = {"gcompute": [], "torch eager": []}
    for turn in range(options.rounds):
        with tempfile.TemporaryDirectory() as out:
            ours = [sys.executable, "-m", "gcompute", "train", "--model", "nano-small", "--batch", str(model["batch"])]
            ours += ["--data", str(text), "--tokenizer", "char", "--steps", str(TEXT_STEPS), "--learning-rate", rate]
            ours += ["--eval-every", "0", "--checkpoint-every", "0", "--out", out, "--json"]
            result = last_json(ours, environment)
        measured = result["measured"]
        results["gcompute"].append(
            {
                "val_loss": measured["val_loss"],
                "train_s": measured["train_s"] + measured["compile_s"],
                "wall_s": result["wall_s"],
            }
        )
        torch = [options.torch_python, str(HERE / "torch_peer.py"), *sizes(model), "--data", str(text)]
        torch += ["--steps", str(TEXT_STEPS), "--learning-rate", rate, "--precision", "bfloat16", "--mode", "eager"]
        result = last_json(torch, environment)
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


def startup(isa: str) -> dict[str, float]:
    """Seconds from the start of `gcompute train` on the demo model to its first step, with empty caches and again."""
    seconds = {}
    with tempfile.TemporaryDirectory() as root:
        for name in ("cold", "warm"):
            command = [sys.executable, "-m", "gcompute", "train", "--model", "demo", "--batch", "16", "--steps", "2"]
            command += ["--eval-every", "0", "--out", f"{root}/{name}", "--json", "--eval-batches", "1"]
            result = last_json(command, {**environment_of(isa), "GCOMPUTE_CACHE": f"{root}/cache"})
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
    parser.add_argument("--isa", choices=tuple(ISAS), default="native", help="instruction set that both sides may use")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of torch")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torch (default: this one)")
    options = parser.parse_args()
    if options.rounds < 1 or (options.text and not options.text.is_file()):
        parser.error("--rounds must be at least 1, and --text a file.")
    measured_on = {
        "processor": cpu_model(),
        "cores": usable_cores(),
        "isa": options.isa if options.isa == "native" else f"emulated {options.isa}",
        "caches": [dataclasses.asdict(cache) for cache in data_caches()],
        "python": platform.python_version(),
    }
    say(f"on {measured_on['processor']}, {measured_on['cores']} cores, instruction set: {measured_on['isa']}")
    summary: dict[str, Any] = {
        "measured_on": measured_on,
        "models": {name: time_steps(options, name) for name in options.models},
    }
    for name, result in summary["models"].items():
        say(
            f"{name}: "
            + ", ".join(f"{precision} {result[f'{precision}_ratio']:.2f}" for precision in options.precisions)
            + f", best precision {result['best_precision_ratio']:.2f} times torch; share of the measured roofline: "
            + ", ".join(f"{who} {share:.0%}" for who, share in result["roofline_share"].items())
            + "; versions: "
            + ", ".join(f"{who} {version}" for who, version in result["versions"].items())
        )
    if options.text:
        summary["text"] = train_text(options, options.text)
    if options.startup:
        summary["startup"] = startup(options.isa)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
