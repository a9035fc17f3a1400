"""gcompute plan serve: memory, time to first token, time per token, throughput and cost of serving a model."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from gcompute.cli.flags import FILE, MODEL, SectionedCommand
from gcompute.cli.planning import (
    check_picture,
    check_positive,
    checked_json,
    dollars,
    gib,
    known_chips,
    planning_target,
    seconds,
    two_columns,
    wide_console,
)
from gcompute.config.mesh import MeshShape
from gcompute.config.models import PlannedModel, planned_model
from gcompute.hardware.target import Target
from gcompute.plan.accuracy import Accuracy, accuracy_of
from gcompute.plan.cost import Price, known_price, usd_per_million_tokens
from gcompute.plan.serve_search import serving_meshes
from gcompute.plan.serving import (
    STORED_BYTES,
    Load,
    ServeRun,
    StepTime,
    critical_batch,
    curve,
    decode_time,
    load_of,
    most_concurrency,
    prefill_time,
    serve_memory,
    within_slo,
)
from gcompute.plan.sizes import cache_bytes, sizes
from gcompute.plan.train_plan import CLOSE, FITS, SHARED, TOO_LARGE
from gcompute.plan.why import why_serve

DOES_NOT_FIT = 1
DTYPES = tuple(STORED_BYTES)
STYLES = {FITS: "green", CLOSE: "yellow"}


class PlanServeCommand(SectionedCommand):
    examples = (
        "gcompute plan serve llama3-70b --on v5e:4x4 --weights int8 --kv int8 --prompt 2048 --output 512",
        "gcompute plan serve llama3-8b --on v5e:2x4 --mesh tensor=8 --context 8192 --concurrency 32",
        "gcompute plan serve path/to/config.json --on h100:8 --slo-ttft 0.5 --slo-tpot 0.03 --plot curve.png",
        "gcompute plan serve tinyllama-1.1b --on v5e:2x2 --mesh tensor=4 --concurrency 16 --prove",
    )


@click.command(cls=PlanServeCommand)
@click.argument("model", type=MODEL)
@click.option("--on", "target_text", required=True, help="v5e:4x4, h100:8, or this (measured).")
@click.option("--mesh", help="tensor, data and expert sizes, as in tensor=8.  [the best one found]")
@click.option("--context", type=click.IntRange(1), help="Tokens each request has room for.  [prompt + output]")
@click.option("--concurrency", type=click.IntRange(1), help="Requests at once.  [the most that fit]")
@click.option("--prompt", type=click.IntRange(1), default=1024, help="Tokens of a prompt.  [1024]")
@click.option("--output", type=click.IntRange(1), default=256, help="Tokens of an answer.  [256]")
@click.option("--weights", type=click.Choice(DTYPES), default="bfloat16", help="Weights in memory.  [bfloat16]")
@click.option("--kv", type=click.Choice(DTYPES), default="bfloat16", help="Keys and values in memory.  [bfloat16]")
@click.option("--slo-ttft", type=float, help="Most seconds to the first token.")
@click.option("--slo-tpot", type=float, help="Most seconds a token after it.")
@click.option("--usd-per-hour", type=float, help="Price of a chip.  [the catalogue's]")
@click.option("--spot", is_flag=True, help="Use the spot price.")
@click.option("--chips", "chip_file", type=FILE, envvar="GCOMPUTE_CHIPS")
@click.option("--prove", is_flag=True, help="Compile prefill and decode with the target's own compiler, and compare.")
@click.option("--plot", type=FILE, help="Latency-throughput to .png or .html.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str,
    target_text: str,
    mesh: str | None,
    context: int | None,
    concurrency: int | None,
    prompt: int,
    output: int,
    weights: str,
    kv: str,
    slo_ttft: float | None,
    slo_tpot: float | None,
    usd_per_hour: float | None,
    spot: bool,
    chip_file: Path | None,
    prove: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Predict how MODEL is served: a preset, our config, or a Hugging Face config.json.

    Requests are batched continuously. Every number is predicted from formulae unless it says compiled. Exit status 0:
    it fits; 1: it does not, or no load keeps the limits; 2: what was asked does not go together.
    """
    for name, value in (("--usd-per-hour", usd_per_hour), ("--slo-ttft", slo_ttft), ("--slo-tpot", slo_tpot)):
        check_positive(name, value)
    check_picture(plot)
    planned = planned_model(model)
    target = planning_target(target_text, known_chips(chip_file))
    if prompt + output > planned.architecture.context:
        raise ValueError(
            f"--prompt {prompt} and --output {output} are longer than the context of {planned.name},"
            f" {planned.architecture.context}."
        )
    if context is not None and context > planned.architecture.context:
        raise ValueError(
            f"--context {context} is longer than the context of {planned.name}, {planned.architecture.context}."
        )
    run = ServeRun(
        model=planned.architecture,
        prompt=prompt,
        output=output,
        concurrency=concurrency or 1,
        context=context,
        mesh=MeshShape.parse(mesh, target.num_devices) if mesh is not None else MeshShape(),
        weights=weights,
        cache=kv,
    )
    if mesh is None:
        run = _best(run, target, concurrency, slo_ttft, slo_tpot)
    elif run.mesh.num_devices != target.num_devices:
        raise ValueError(
            f"mesh {run.mesh} is of {run.mesh.num_devices} devices and {target} has {target.num_devices}. Give axes"
            f" whose product is {target.num_devices}, as in --mesh tensor={target.num_devices}."
        )
    most = most_concurrency(run, target)
    if concurrency is None:
        run = dataclasses.replace(run, concurrency=max(1, most))
    if prove:
        from gcompute.cli.prove import check_provable_serve

        check_provable_serve(planned, run, target)
    told = ServeAnswer(planned, run, target, usd_per_hour=usd_per_hour, spot=spot, ttft_s=slo_ttft, tpot_s=slo_tpot)
    proof = None
    if prove:
        from gcompute.cli.prove import prove_serve

        proof = prove_serve(planned, run, target)
    if plot:
        from gcompute.cli.plan_plot import plot_loads

        if not told.loads:
            raise ValueError(f"--plot has nothing to draw: no request fits {target}.")
        plot_loads(told.loads, target, plot, title=f"{planned.name} on {target}", critical=told.critical)
    if as_json:
        print(checked_json({**told.to_dict(), "proof": proof}))
    else:
        told.show()
        if proof is not None:
            from gcompute.cli.prove import show_proof

            show_proof(proof)
        if plot:
            print(f"drawn to {plot}")
    kept = told.kept is not None or (slo_ttft is None and slo_tpot is None)
    fits = proof["fits"] if proof is not None else told.verdict != TOO_LARGE
    if not (fits and kept):
        raise SystemExit(DOES_NOT_FIT)


def _best(
    run: ServeRun, target: Target, concurrency: int | None, ttft_s: float | None, tpot_s: float | None
) -> ServeRun:
    """The mesh of most tokens a second at this concurrency, or at the most that fits, within the limits if any is."""
    best: tuple[tuple[bool, float], ServeRun] | None = None
    for mesh in serving_meshes(run.model, target):
        tried = dataclasses.replace(run, mesh=mesh)
        most = most_concurrency(tried, target)
        wanted = concurrency or most
        if wanted > most or wanted < 1:
            continue
        tried = dataclasses.replace(tried, concurrency=wanted)
        loads = (load_of(tried, target, wanted),) if concurrency else curve(tried, target)
        found = within_slo(loads, ttft_s=ttft_s, time_per_token_s=tpot_s)
        load = found or loads[-1]
        rank = (found is not None, load.tokens_per_s)
        if best is None or rank > best[0]:
            best = (rank, dataclasses.replace(tried, concurrency=load.concurrency))
    if best is not None:
        return best[1]
    # Nothing fits: show what lacks least, everything split as far as it goes.
    return dataclasses.replace(run, mesh=max(serving_meshes(run.model, target), key=lambda m: m.tensor * m.expert))


class ServeAnswer:
    """All that is predicted of one way to serve."""

    def __init__(
        self,
        planned: PlannedModel,
        run: ServeRun,
        target: Target,
        *,
        usd_per_hour: float | None,
        spot: bool,
        ttft_s: float | None,
        tpot_s: float | None,
    ):
        assert target.known is not None
        self.planned, self.run, self.target = planned, run, target
        self.memory = serve_memory(run, target)
        self.most = most_concurrency(run, target)
        self.loads: tuple[Load, ...] = curve(run, target) if self.most else ()
        self.load = load_of(run, target, run.concurrency)
        self.prefill: StepTime = prefill_time(run, target, run.prompt)
        self.step: StepTime = decode_time(run, target, run.concurrency, run.prompt + run.output / 2)
        self.critical = critical_batch(run, target) * run.replicas
        self.limits = (ttft_s, tpot_s)
        self.kept = within_slo(self.loads, ttft_s=ttft_s, time_per_token_s=tpot_s)
        self.price: Price | None = known_price(target.known, given=usd_per_hour, spot=spot)
        self.accuracy: Accuracy | None = None
        if target.backend == "tpu":
            self.accuracy = accuracy_of("serve memory, TPU compiler", {"chip": target.chip})
        self.time_accuracy = accuracy_of(
            "serving times, worked problems", {}, unseen=f"serving, {target.backend.upper()}"
        )

    @property
    def verdict(self) -> str:
        """ "fits" only where it would even if the prediction were too small by as much as any examined."""
        if self.memory.available_bytes is None:
            return SHARED
        if not self.memory.fits:
            return TOO_LARGE
        low = self.accuracy.low if self.accuracy else 0.0
        return FITS if self.memory.total_bytes * (1 + low) <= self.memory.available_bytes else CLOSE

    def usd_per_million(self, load: Load) -> float | None:
        if self.price is None:
            return None
        return usd_per_million_tokens(self.price.usd_per_chip_hour * self.target.num_chips, load.tokens_per_s)

    def to_dict(self) -> dict[str, Any]:
        run = self.run
        return {
            "model": self.planned.name,
            "target": str(self.target),
            "mesh": str(run.mesh),
            "weights": run.weights,
            "kv": run.cache,
            "prompt": run.prompt,
            "output": run.output,
            "context": run.room,
            "concurrency": run.concurrency,
            "params": dataclasses.asdict(sizes(self.planned.architecture)),
            "unknown_fields": list(self.planned.unused),
            "memory": {**self.memory.to_dict(), "verdict": self.verdict},
            "memory_accuracy": dataclasses.asdict(self.accuracy) if self.accuracy else None,
            "kv_bytes_per_token": cache_bytes(run.model, 1, value_bytes=run.cache_bytes),
            "most_concurrency": self.most,
            "longest_context": self.longest_context(),
            "critical_batch": self.critical,
            "prefill": {"seconds": self.prefill.seconds, "bound": self.prefill.bound},
            "decode_step": {"seconds": self.step.seconds, "bound": self.step.bound},
            "load": self.load_json(self.load),
            "curve": [self.load_json(one) for one in self.loads],
            "slo": {"ttft_s": self.limits[0], "tpot_s": self.limits[1]},
            "best_within_slo": self.load_json(self.kept) if self.kept else None,
            "time_accuracy": dataclasses.asdict(self.time_accuracy),
            "usd_per_chip_hour": self.price.usd_per_chip_hour if self.price else None,
            "price_source": str(self.price) if self.price else None,
            "why": why_serve(run, self.target),
        }

    def load_json(self, load: Load) -> dict[str, Any]:
        return {
            **dataclasses.asdict(load),
            "tokens_per_s_per_chip": load.tokens_per_s / self.target.num_chips,
            "usd_per_million_tokens": self.usd_per_million(load),
        }

    def longest_context(self) -> int:
        """The most tokens a request could have room for at this concurrency; 0 where this one's do not fit."""
        least, most = self.run.prompt + self.run.output, self.planned.architecture.context

        def fits(room: int) -> bool:
            return serve_memory(dataclasses.replace(self.run, context=room), self.target).fits

        if not fits(least):
            return 0
        low, high = least, most + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def show(self) -> None:
        console = wide_console()
        run, load = self.run, self.load
        console.print(
            f"{self.planned.name} on {self.target} ({self.target.num_devices:,} devices), mesh {run.mesh}: weights"
            f" {run.weights}, keys and values {run.cache}, {run.concurrency:,} requests of {run.prompt:,} +"
            f" {run.output:,} tokens, room for {run.room:,} each. Predicted.",
            soft_wrap=True,
        )
        for name in self.planned.unused:
            console.print(f"note: field {name!r} is not known to the planner, and changes nothing here.")
        memory = self.memory.to_dict()
        rows = {
            name.removesuffix("_bytes").replace("_", " "): gib(value)
            for name, value in memory.items()
            if isinstance(value, float | int) and not isinstance(value, bool) and value
        }
        two_columns("memory of one device (predicted)", rows, console, bold="total")
        console.print(
            f"{self.verdict}. Error of such predictions: {self.accuracy or 'not examined on such chips'}.",
            style=STYLES.get(self.verdict, "red"),
            soft_wrap=True,
        )
        per_token = gib(cache_bytes(run.model, 1, value_bytes=run.cache_bytes))
        console.print(
            f"cache: {per_token} a token; room runs out after {self.most:,} requests; at {run.concurrency:,} the"
            f" longest context is {self.longest_context():,}",
            soft_wrap=True,
        )
        shown = {
            "prefill of one prompt": f"{seconds(self.prefill.seconds)} ({self.prefill.bound})",
            "time to first token": seconds(load.ttft_s),
            "decode step": f"{seconds(self.step.seconds)} ({self.step.bound})",
            "time per token, prefills between": seconds(load.time_per_token_s),
            "tokens/s": f"{load.tokens_per_s:,.0f}",
            "tokens/s a chip": f"{load.tokens_per_s / self.target.num_chips:,.1f}",
            "critical batch": f"{self.critical:,.0f} requests",
        }
        usd = self.usd_per_million(load)
        if usd is not None and self.price is not None:
            shown["a million tokens"] = dollars(usd)
        two_columns("time (predicted)", shown, console, bold="tokens/s")
        console.print(f"error of such equations: {self.time_accuracy}.", soft_wrap=True)
        if self.price is not None:
            console.print(f"price: {dollars(self.price.usd_per_chip_hour)} a chip-hour ({self.price})")
        else:
            console.print(f"{self.target.chip} has no price in the catalogue: give --usd-per-hour.")
        self._show_curve(console)
        if any(limit is not None for limit in self.limits):
            if self.kept is None:
                console.print("no load keeps the limits.", style="red")
            else:
                console.print(
                    f"within the limits: {self.kept.concurrency:,} requests, {self.kept.tokens_per_s:,.0f} tokens/s",
                    style="green",
                )
        console.print(f"why: {why_serve(run, self.target)}", soft_wrap=True)

    def _show_curve(self, console: Any) -> None:
        from rich.table import Table

        if not self.loads:
            return
        table = Table(title="throughput against latency (predicted)", title_justify="left")
        for name in ("requests", "step", "per token", "first token", "tokens/s", "a chip", "$/M"):
            table.add_column(name, justify="right", no_wrap=True)
        for one in self.loads:
            usd = self.usd_per_million(one)
            table.add_row(
                f"{one.concurrency:,}",
                seconds(one.step_s),
                seconds(one.time_per_token_s),
                seconds(one.ttft_s),
                f"{one.tokens_per_s:,.0f}",
                f"{one.tokens_per_s / self.target.num_chips:,.1f}",
                dollars(usd) if usd is not None else "-",
            )
        console.print(table)
