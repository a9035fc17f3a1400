"""gcompute bench serve: put a load on an OpenAI-compatible server, ours or any other."""

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from gcompute.cli.api_key import FILE_HELP, VARIABLE, chosen_key
from gcompute.cli.flags import FILE, NameOrPath, SectionedCommand, config_options, given
from gcompute.config.bench import LoadConfig, PlanConfig, PromptConfig
from gcompute.config.serve import QUANTIZED, ServeConfig

NOTHING_SERVED = 1
# Where the server listens, what no benchmark should run into, and what is given to the plan.
SERVER_OWN = ("host", "port", "timeout_s", "max_body_bytes", "mesh", "weights", "kv")


class BenchServeCommand(SectionedCommand):
    examples = (
        "gcompute bench serve runs/first",
        "gcompute bench serve runs/first --sweep 1,2,4,8 --plot curve.png",
        "gcompute bench serve http://127.0.0.1:8000 --rate 2 --duration 60 --slo-ttft 0.5 --slo-tpot 0.05",
        "gcompute bench serve http://127.0.0.1:8000/v1 --chat --prompts questions.jsonl --concurrency 16",
        "gcompute bench serve http://my-host:8000 --model llama3-8b --on h100:1 --sweep rate=1,2,4 --out bench.json",
    )


@click.command(cls=BenchServeCommand)
@click.argument("server", type=NameOrPath(urls=True), metavar="URL|CHECKPOINT")
@click.option("--name", default=None, help="Model name that requests use.  [the first that the server lists]")
@click.option("--api-key", envvar=VARIABLE, show_envvar=True, help="Key that the server wants.  [none]")
@click.option("--api-key-file", type=FILE, help=FILE_HELP)
@click.option("--chips", "chip_file", type=FILE, envvar="GCOMPUTE_CHIPS")
@click.option("--plot", type=FILE, help="Draw to .png or .html.")
@click.option("--out", type=FILE, help="Write all, every request too, as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@config_options(LoadConfig, "Load")
@config_options(PromptConfig, "Requests")
@config_options(PlanConfig, "Limits, price and plan")
@config_options(ServeConfig, "Server of a checkpoint", SERVER_OWN)
def command(
    server: str,
    name: str | None,
    api_key: str | None,
    api_key_file: Path | None,
    chip_file: Path | None,
    plot: Path | None,
    out: Path | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Put a load on the server at URL, or on one started for CHECKPOINT, the --out directory of `gcompute train`.

    Requests are streamed completions. Times are those that the client sees: TTFT to the first token, TPOT a token
    after it (mean of a request), ITL between arrivals, E2E in all; percentiles over requests that were served whole.
    Goodput counts requests a second that keep every limit. Beside them stands what the plan predicts for that load
    where model and chip are known: a checkpoint's own, or --model and --on. Ctrl-C shows what was measured so far.

    Exit status 0: requests were served; 1: none was, or the server died; 2: it cannot be benchmarked so; 130: Ctrl-C.
    """
    key = chosen_key(api_key, api_key_file)
    load = LoadConfig(**given(LoadConfig, values))
    prompts = PromptConfig(**given(PromptConfig, values))
    plan = PlanConfig(**given(PlanConfig, values))
    serve = {key: value for key, value in given(ServeConfig, values).items() if key not in SERVER_OWN}
    more = _more_fields(prompts.body)
    from gcompute.cli.planning import check_picture, check_positive
    from gcompute.serve.load_report import Slo

    slo = Slo(ttft_s=plan.slo_ttft, tpot_s=plan.slo_tpot, e2e_s=plan.slo_e2e)
    check_positive("--usd-per-hour", plan.usd_per_hour)
    check_picture(plot)
    if out is not None and not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: there is no directory {out.absolute().parent}.")
    if "://" in server and serve:
        flag = "--" + next(iter(serve)).replace("_", "-")
        raise ValueError(f"{flag} is for the server of a checkpoint, and {server} runs already: leave it out.")
    if "://" not in server:
        # A checkpoint's server keeps them as the plan is told to count them.
        both = (("weights", plan.weights), ("kv", plan.kv or plan.weights))
        serve |= {name: dtype for name, dtype in both if dtype in QUANTIZED}
    ServeConfig(**serve)
    from gcompute.cli.bench_plan import make_planner
    from gcompute.cli.bench_server import CheckpointServer, checkpoint_server
    from gcompute.cli.bench_session import INTERRUPTED, Bench, Session
    from gcompute.cli.bench_show import LoadProgress, show_bench
    from gcompute.cli.consoles import plain_console
    from gcompute.serve.load_client import Address

    console = plain_console(stderr=True)

    def bench_at(url: str, served: Any, name: str | None, key: str | None) -> Bench:
        with LoadProgress(console) as progress:
            session = Session(
                address=Address.parse(url),
                api_key=key or None,
                name=name,
                load=load,
                prompts=prompts,
                more=more,
                planner=make_planner(plan, served, chip_file),
                slo=slo,
                watch=progress.watch,
            )
            session.arrivals()
            return asyncio.run(session.run())

    child: CheckpointServer | None = None
    if "://" in server:
        Address.parse(server)
        bench = bench_at(server, None, name, key)
    else:
        _check_checkpoint(server)
        with (
            checkpoint_server(Path(server), serve, measure=plan.on in (None, "this")) as child,
            _doing(console) as doing,
        ):
            served = child.wait_ready(doing)
            doing("")
            bench = bench_at(served.url, served, None, None)
            if child.process.poll() is not None:
                console.print(f"the server's process ended: {child.last_words()}")
    document = {**bench.to_dict(), "engine": child.stats if child is not None else None}
    if out is not None:
        full = {**document, **bench.to_dict(with_requests=True)}
        out.write_text(json.dumps(full, allow_nan=False) + "\n", encoding="utf-8")
    drawn = plot is not None and bench.points and _drawn(bench, plot, console)
    if as_json:
        print(json.dumps(document, allow_nan=False))
    else:
        show_bench(bench)
        for path, what in ((plot if drawn else None, "drawn"), (out, "written")):
            if path is not None:
                print(f"{what} to {path}")
    if bench.stopped == INTERRUPTED:
        raise KeyboardInterrupt
    if bench.stopped or not any(point.measured.num_ok for point in bench.points):
        raise SystemExit(NOTHING_SERVED)


def _drawn(bench: Any, plot: Path, console: Any) -> bool:
    from gcompute.cli.pictures import try_to_draw

    def draw() -> None:
        from gcompute.cli.bench_plot import plot_bench

        plot_bench(bench, plot)

    return try_to_draw(draw, plot, lambda text: console.print(f"notice: {text}", soft_wrap=True))


@contextmanager
def _doing(console: Any) -> Iterator[Any]:
    """A line on a terminal that says what the server does while it starts."""
    with console.status("starting the server") as status:

        def say(text: str) -> None:
            if text.startswith("notice: "):
                console.print(text, soft_wrap=True)
            elif text:
                status.update(text)
            else:
                status.stop()

        yield say


def _more_fields(body: str | None) -> dict[str, Any]:
    if body is None:
        return {}
    try:
        more = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--body is not JSON: {error}.") from None
    if not isinstance(more, dict):
        raise ValueError(f"--body must be a JSON object, got {body[:40]}.")
    fixed = sorted(more.keys() & {"stream", "stream_options", "prompt", "messages", "max_tokens", "n"})
    if fixed:
        raise ValueError(f"--body cannot set {', '.join(fixed)}: that is what is measured.")
    return more


def _check_checkpoint(text: str) -> None:
    path = Path(text)
    if path.is_dir():
        return
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", text) and not path.exists():
        raise ValueError(f"{text} is not a directory. A server's URL begins with http://: http://{text}")
    what = "is not a directory" if path.exists() else "does not exist"
    raise ValueError(f"{text} {what}. Give a server's URL, or the --out directory of a `gcompute train` run.")
