"""gcompute demo: the main job from end to end, on this machine, with real text."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import click

from gcompute.cli.environment import quiet_backends, restart_fast, use_compilation_cache
from gcompute.cli.flags import SectionedCommand
from gcompute.config.presets import PRESETS
from gcompute.config.serve import ServeConfig
from gcompute.config.train import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from gcompute.measure.cache import cache_directory

PROMPTS = (
    "def __init__(self",
    "import os\nimport ",
    "class TestCase(",
    "    for i in range(",
    "    if not isinstance(",
    '    """Return the ',
    "try:\n    ",
    "    raise ValueError(",
)
MAX_TOKENS = 64
TEMPERATURE = 0.7
REPORT = "report.html"


class DemoCommand(SectionedCommand):
    examples = ("gcompute demo", "gcompute demo --steps 2000 --out runs/longer", "gcompute demo --json")


def demo_run(steps: int) -> RunConfig:
    """What the demo trains: sized for about two minutes on two cores."""
    return RunConfig(
        model=PRESETS["demo"],
        optimizer=OptimizerConfig(
            optimizer="muon", learning_rate=4e-3, warmup_steps=20, schedule="linear", final_fraction=0.05
        ),
        train=TrainConfig(batch=16, steps=steps, eval_every=100, checkpoint_every=100),
        data=DataConfig(data="stdlib", tokenizer="bpe:4096"),
    )


@click.command(cls=DemoCommand)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, help="Run directory."
)
@click.option("--steps", default=400, show_default=True, help="Optimizer steps.")
@click.option("--again", is_flag=True, help="Serve and report anew, though a report is there.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on standard output.")
@click.option("--fast/--no-fast", default=True, help="Restart once with huge pages where that is faster.  [fast]")
def command(out: Path, steps: int, again: bool, as_json: bool, fast: bool) -> None:
    """Look at this machine, predict, train on the source text of Python's standard library, serve, report.

    Running it again goes on from where it was; what is finished is reused.
    """
    started = time.time()
    restart_fast(fast)
    quiet_backends()
    from rich.console import Console

    from gcompute.cli.machine import show_machine
    from gcompute.cli.session import make_directory, measured_roofline
    from gcompute.measure.machine import look

    console = Console(stderr=True)
    make_directory(out)
    use_compilation_cache()
    console.rule("1  this machine")
    machine = look().to_dict()
    show_machine(machine, measured_roofline(cache_directory(), console).to_dict(), console)
    console.rule("2, 3  predict and train")
    session, baselines = _trained(demo_run(steps), out, started, console)
    console.rule("4  serve")
    serving = _served(out, console, again=again)
    console.rule("5  report")
    path = _reported(machine, session, baselines, serving, out)
    val_loss = session["measured"]["val_loss"]
    for name, loss in baselines.items():
        console.print(f"validation loss, {name}: {loss:.4f} nats a token; this model: {val_loss:.4f}")
    console.print(f"report: {path.absolute()}", soft_wrap=True)
    if as_json:
        print(json.dumps({**session, "baselines": baselines, "serving": serving, "report": str(path)}))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _trained(run: RunConfig, out: Path, started: float, console: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """The session's plain values and the baselines: kept ones if training is finished, else after finishing it."""
    from gcompute.cli.session import corpus_directory, train_session, write_atomically
    from gcompute.cli.train import run_from_plain, stop_on_interrupt
    from gcompute.train.corpus import prepare
    from gcompute.train.ngram import bigram_loss, unigram_loss

    stored = _read(out / "run.json")
    resume = stored is not None and any((out / "checkpoints").glob("[0-9]*"))
    if resume and stored is not None:
        previous = run_from_plain(stored, source=str(out / "run.json"))
        run = dataclasses.replace(previous, train=dataclasses.replace(previous.train, steps=run.train.steps))
    kept = _read(out / "session.json")
    if resume and kept and kept["measured"]["step"] >= run.train.steps:
        console.print(f"{out} is trained: {kept['measured']['step']} steps, reused")
        return kept, kept["baselines"]
    with stop_on_interrupt() as asked:
        session = train_session(
            run,
            out=out,
            cache=cache_directory(),
            resume=resume,
            profile=False,
            vocab_given=resume,
            console=console,
            stopped=lambda: bool(asked),
            started=started,
        )
    if not session.result.finished:
        console.print(f"stopped at step {session.result.step}; the same command goes on from there.")
        raise SystemExit(130)
    corpus = prepare(run.data, corpus_directory(cache_directory(), run))
    vocab = corpus.tokenizer.vocab_size
    baselines = {
        "unigram": unigram_loss(corpus.train, corpus.val, vocab),
        "bigram": bigram_loss(corpus.train, corpus.val, vocab),
    }
    values = {**session.to_dict(), "baselines": baselines}
    write_atomically(out / "session.json", json.dumps(values, indent=2) + "\n")
    return values, baselines


def _served(out: Path, console: Any, *, again: bool) -> dict[str, Any]:
    """Serve the checkpoint on this machine, send it prompts together, and print what came back."""
    from gcompute.cli.progress import WorkProgress, duration
    from gcompute.cli.session import write_atomically
    from gcompute.model.pretrained import load
    from gcompute.serve.client import measure
    from gcompute.serve.engine import Engine
    from gcompute.serve.server import background

    model = load(out, notice=console.print)
    kept = _read(out / "serving.json")
    if kept and kept["step"] == model.step and not again:
        console.print(f"served before at step {model.step}, reused (--again serves anew)")
        return kept
    config = ServeConfig(port=0, slots=len(PROMPTS))
    with Engine(model.params, model.config, model.tokenizer, config) as engine:
        with WorkProgress(console) as progress:
            engine.start(lambda done, total, what: progress("compiling", done, total))
            engine.wait_ready()
        with background(engine, config, model_name=model.name) as url:
            console.print(f"serving {model.name} at {url}; sending {len(PROMPTS)} prompts together", highlight=False)
            load_ = measure(url, PROMPTS, model=model.name, max_tokens=MAX_TOKENS, temperature=TEMPERATURE, seed=1)
    for done in load_.completions:
        console.print(done.prompt, style="bold", end="", markup=False, highlight=False)
        console.print(done.text, markup=False, highlight=False)
        console.rule(style="dim")
    completions = [dataclasses.asdict(done) for done in load_.completions]
    ttft = sorted(done.first_token_s for done in load_.completions)
    per_token = sorted(done.per_token_s for done in load_.completions if done.per_token_s is not None)
    summary = {
        "requests together": str(len(completions)),
        "TTFT, median": duration(ttft[len(ttft) // 2]),
        "TTFT, worst": duration(ttft[-1]),
        "time per token, median": duration(per_token[len(per_token) // 2]),
        "tokens/s, all requests": f"{load_.tokens_per_s:,.0f}",
    }
    for name, value in summary.items():
        console.print(f"{name:<26}{value}", highlight=False)
    serving = {"step": model.step, "requests": completions, "summary": summary, "wall_s": load_.wall_s}
    write_atomically(out / "serving.json", json.dumps(serving, indent=2) + "\n")
    return serving


def _reported(
    machine: dict[str, Any], session: dict[str, Any], baselines: dict[str, float], serving: dict[str, Any], out: Path
) -> Path:
    from gcompute.cli.report import ReportData, write_report
    from gcompute.train.curve import plot_loss
    from gcompute.train.loop import METRICS
    from gcompute.train.metrics_log import read_metrics

    curve = out / "loss.png"
    plot_loss(read_metrics(out / METRICS), curve, title="gcompute demo: loss by step", baselines=baselines)
    path = out / REPORT
    write_report(ReportData(machine=machine, session=session, baselines=baselines, serving=serving), curve, path)
    return path
