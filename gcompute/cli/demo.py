"""gcompute demo: the main job from end to end, on this machine, with real text."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import click

from gcompute.cli.demo_size import LADDER, DemoSize, size_demo
from gcompute.cli.environment import quiet_backends, restart_fast, use_compilation_cache
from gcompute.cli.flags import PATH, SectionedCommand
from gcompute.config.serve import ServeConfig
from gcompute.config.train import RunConfig
from gcompute.measure.cache import cache_directory, writable_cache

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
    examples = (
        "gcompute demo",
        "gcompute demo --minutes 10 --out runs/longer",
        "gcompute demo --steps 2000 --out runs/long",
        "gcompute demo --json",
    )


@click.command(cls=DemoCommand)
@click.option("--out", type=PATH, default=Path("runs/demo"), show_default=True, help="Run directory.")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    help="Time to train for, by the prediction: decides the model and its steps.",
)
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps.  [as many as the minutes allow]")
@click.option("--again", is_flag=True, help="Serve and report anew, though a report is there.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on standard output.")
@click.option("--fast/--no-fast", default=True, help="Restart once with huge pages where that is faster.  [fast]")
def command(out: Path, minutes: float, steps: int | None, again: bool, as_json: bool, fast: bool) -> None:
    """Look at this machine, predict, train on the source text of Python's standard library, serve, report.

    The model and its steps are sized by the prediction for about two minutes of training on this machine. Running it
    again continues from its last checkpoint; what is finished is reused.
    """
    started = time.monotonic()
    restart_fast(fast)
    quiet_backends()
    from gcompute.cli.consoles import plain_console

    console = plain_console(stderr=True)
    console.rule("1  this machine")
    from gcompute.cli.machine import show_machine
    from gcompute.cli.pictures import try_to_draw
    from gcompute.cli.progress import duration
    from gcompute.cli.session import make_directory, measured_roofline
    from gcompute.measure.machine import look

    make_directory(out)
    writable_cache()
    use_compilation_cache()
    machine = look().to_dict()
    roofline = measured_roofline(cache_directory(), console)
    show_machine(machine, roofline.to_dict(), console)
    console.rule("2, 3  predict and train")
    run = _stored(out, steps)
    if run is None:
        size = _sized(roofline, minutes=minutes, steps=steps)
        run = size.run
        about = f"{size.preset}, {run.train.steps} steps: about {duration(size.predicted_s)} of training (predicted)"
        larger = f"; {LADDER[0][0]} would take longer" if size.preset != LADDER[0][0] else ""
        console.print(f"{about}{larger}", highlight=False)
    session, baselines = _trained(run, out, started, roofline, console)
    console.rule("4  serve")
    serving = _served(out, console, again=again)
    console.rule("5  report")
    path = out / REPORT
    reported = try_to_draw(
        lambda: _report(machine, session, baselines, serving, path),
        path,
        lambda text: console.print(f"notice: {text}", soft_wrap=True),
    )
    val_loss = session["measured"]["val_loss"]
    for name, loss in baselines.items():
        console.print(f"validation loss, {name}: {loss:.4f} nats a token; this model: {val_loss:.4f}")
    if reported:
        console.print(f"report: {path.absolute()}", soft_wrap=True)
    if as_json:
        print(
            json.dumps(
                {**session, "baselines": baselines, "serving": serving, "report": str(path) if reported else None}
            )
        )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None


def _sized(roofline: Any, *, minutes: float, steps: int | None) -> DemoSize:
    """What to train, by what the planner says of this machine."""
    import jax

    from gcompute.cli.session import predict
    from gcompute.train.automatic import settle
    from gcompute.train.resolve import default_mesh

    def step_s(run: RunConfig) -> float:
        settled, _ = settle(run, default_mesh(), jax.default_backend(), roofline.matmul_flops_per_s)
        return predict(settled, roofline).step.step_s

    return size_demo(step_s, seconds=60 * minutes, steps=steps)


def _stored(out: Path, steps: int | None) -> RunConfig | None:
    """The run that was begun in `out`, with `steps` where they are given; None where there is none to go on with."""
    from gcompute.cli.run_directory import run_from_plain

    stored = _read(out / "run.json")
    if stored is None or not any((out / "checkpoints").glob("[0-9]*")):
        return None
    run = run_from_plain(stored, source=str(out / "run.json"))
    return run.lasting(steps or run.train.steps)


def _trained(
    run: RunConfig, out: Path, started: float, roofline: Any, console: Any
) -> tuple[dict[str, Any], dict[str, float]]:
    """The session's plain values and the baselines: kept ones if training is finished, else after finishing it."""
    from gcompute.cli.session import corpus_directory, train_session
    from gcompute.cli.train import stop_on_interrupt
    from gcompute.measure.whole_file import write_whole
    from gcompute.train.corpus import prepare
    from gcompute.train.loop import open_data
    from gcompute.train.ngram import bigram_loss, unigram_loss

    resume = _read(out / "run.json") is not None and any((out / "checkpoints").glob("[0-9]*"))
    kept = _read(out / "session.json")
    if resume and kept and kept["measured"]["step"] >= run.train.steps:
        console.print(f"{out} is trained: {kept['measured']['step']} steps, reused")
        return kept, kept["baselines"]
    with stop_on_interrupt() as asked:
        session = train_session(
            run,
            out=out,
            cache=writable_cache(),
            resume=resume,
            profile=False,
            vocab_given=resume,
            console=console,
            stopped=lambda: bool(asked),
            started=started,
            inexact=True,
            roofline=roofline,
        )
    if not session.result.finished:
        console.print(f"stopped at step {session.result.step}; the same command goes on from there.")
        raise SystemExit(130)
    corpus = prepare(run.data, corpus_directory(cache_directory(), run))
    _, windows = open_data(session.run, corpus)
    # The n-gram models are judged on the very tokens that the trained model was judged on.
    stretches = windows.stretches(session.result.val_batches or len(windows))
    sides = (corpus.train, corpus.val, corpus.tokenizer.vocab_size, stretches)
    baselines = {"unigram": unigram_loss(*sides), "bigram": bigram_loss(*sides)}
    values = {**session.to_dict(), "baselines": baselines}
    write_whole(out / "session.json", json.dumps(values, indent=2) + "\n")
    return values, baselines


def _served(out: Path, console: Any, *, again: bool) -> dict[str, Any]:
    """Serve the checkpoint on this machine, send it prompts together, and print what came back."""
    from gcompute.cli.progress import WorkProgress, duration
    from gcompute.measure.whole_file import write_whole
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
    write_whole(out / "serving.json", json.dumps(serving, indent=2) + "\n")
    return serving


def _report(
    machine: dict[str, Any], session: dict[str, Any], baselines: dict[str, float], serving: dict[str, Any], path: Path
) -> None:
    from gcompute.cli.report import ReportData, write_report
    from gcompute.train.curve import plot_loss
    from gcompute.train.loop import METRICS
    from gcompute.train.metrics_log import read_metrics

    curve = path.with_name("loss.png")
    plot_loss(read_metrics(path.with_name(METRICS)), curve, title="gcompute demo: loss by step", baselines=baselines)
    write_report(ReportData(machine=machine, session=session, baselines=baselines, serving=serving), curve, path)
