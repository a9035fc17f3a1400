"""gcompute certify serving: every token of the engine against a reference that decodes alone."""

import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import click

from gcompute.cli.environment import quiet_backends, use_compilation_cache
from gcompute.cli.flags import PATH, SectionedCommand
from gcompute.config.serve import ServeConfig

RED = 1
# Of differences and of violations; --json has all.
SHOWN = 40


class ServingCommand(SectionedCommand):
    examples = (
        "gcompute certify serving",
        "gcompute certify serving runs/first --requests 200 --precision bfloat16",
        "gcompute certify serving --deterministic --json",
    )


@click.command(cls=ServingCommand, name="serving")
@click.argument("checkpoint", type=PATH, required=False)
@click.option("--requests", type=click.IntRange(3), default=1000, help="Random requests, over all models.  [1000]")
@click.option("--deterministic", is_flag=True, help="Every bit the same, in every way of serving.")
@click.option("--precision", default="float32", show_default=True, type=click.Choice(("float32", "bfloat16")))
@click.option("--slots", type=click.IntRange(1), default=8, help="Requests decoded together.  [8]")
@click.option("--max-context", type=click.IntRange(16), help="Longest prompt plus output.  [the model's, at most 256]")
@click.option("--seed", default=0, show_default=True, help="Of the requests and of when they arrive.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    checkpoint: Path | None,
    requests: int,
    deterministic: bool,
    precision: str,
    slots: int,
    max_context: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Serve random requests and check every token against a reference without a cache, a batch or the engine's code.

    Greedy and seeded requests with every sampling setting arrive in bursts and trickles, share beginnings, and are
    called off. Each token must be the reference's choice; where it is not, the gap between the two candidates is shown,
    and must be below what rounding alone can do, which is measured on the reference. With --deterministic the same
    requests are served in several ways, and every id and log-probability must agree to the bit. CHECKPOINT is the --out
    directory of `gcompute train`; without it, small models of the three forms are served.

    Exit status 0: no violation; 1: there is one; 2: what was asked does not go together.
    """
    quiet_backends()
    use_compilation_cache()
    from gcompute.certify.serving.certificate import Subject, prove_default, prove_deterministic
    from gcompute.certify.serving.models import FORMS, small_params
    from gcompute.cli.consoles import plain_console
    from gcompute.cli.progress import WorkProgress

    console = plain_console(stderr=True)
    serve = ServeConfig(precision=precision, slots=slots)
    subjects = []
    if checkpoint is None:
        for name, config in FORMS.items():
            subjects.append((name, small_params(config), config, None))
    else:
        from gcompute.model.pretrained import load

        model = load(checkpoint, notice=lambda text: console.print(f"notice: {text}", soft_wrap=True))
        subjects.append((model.name, model.params, model.config, model.tokenizer))
    started, proofs = time.perf_counter(), []
    for number, (name, params, config, tokenizer) in enumerate(subjects):
        longest = min(max_context or min(config.context, 256), config.context)
        # Prompts of several chunks: only whole ones are found again in the deterministic mode.
        chunk = max(serve.page, longest // 4 // serve.page * serve.page)
        own = ServeConfig(precision=precision, slots=slots, max_context=longest, chunk=chunk)
        subject = Subject(name=name, params=params, config=config, tokenizer=tokenizer, serve=own)
        num = requests * (number + 1) // len(subjects) - requests * number // len(subjects)
        prove = prove_deterministic if deterministic else prove_default
        with WorkProgress(console) as bar:
            heard = (lambda done, bar=bar, name=name, num=num: bar(name, done, num)) if console.is_terminal else _quiet
            proofs.append(prove(subject, num, seed=seed + number, progress=heard))
    result = {
        "mode": "deterministic" if deterministic else "default",
        "precision": precision,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "violations": sum(proof["violations"] for proof in proofs),
        "seconds": round(time.perf_counter() - started, 1),
        "proofs": proofs,
    }
    print(json.dumps(result)) if as_json else show(result)
    if result["violations"]:
        raise SystemExit(RED)


def _quiet(done: int) -> None:
    pass


def show(result: dict[str, Any]) -> None:
    """Print counts, every token that differs, the ways of serving, and a verdict."""
    from rich.table import Table

    from gcompute.cli.certify import WIDTH
    from gcompute.cli.consoles import plain_console

    console = plain_console()
    if not console.is_terminal:
        console = plain_console(width=WIDTH)
    table = Table(title=f"{result['mode']} mode, {result['precision']}: tokens beside the reference's choices")
    columns = (
        "requests",
        "tokens",
        "equal",
        "within the bound",
        "violations",
        "bound / |logit|",
        "worst logprob / bound",
    )
    table.add_column("model")
    for name in columns:
        table.add_column(name, justify="right")
    for proof in result["proofs"]:
        counts = (f"{proof[name]:,}" for name in ("requests", "tokens", "equal", "within_bound", "violations"))
        worst = proof["logprob_error_over_bound"]["largest"]
        table.add_row(proof["model"], *counts, f"{proof['logit_bound']:.1e}", f"{worst:.2f}")
    console.print(table)
    for proof in result["proofs"]:
        if proof.get("ways"):
            _show_ways(proof, console)
    for proof in result["proofs"]:
        _show_lines(proof, console)
    violations = result["violations"]
    requests = sum(proof["requests"] for proof in result["proofs"])
    within = sum(proof["within_bound"] for proof in result["proofs"])
    red = f"{violations} VIOLATIONS" if violations else "no violation"
    console.print(
        f"{requests:,} requests, {red}; {within} tokens differ by less than rounding may do."
        f" JAX {result['versions']['jax']}, {result['seconds']:.0f} s.",
        style="red" if violations else "green",
        soft_wrap=True,
    )


def _show_ways(proof: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    table = Table(title=f"{proof['model']}: ids and log-probabilities beside the first way's", title_justify="left")
    table.add_column("way")
    table.add_column("compared", justify="right")
    table.add_column("equal to the bit", justify="right")
    for way in proof["ways"]:
        table.add_row(way["way"], f"{way['compared']:,}", f"{way['bitwise_equal']:,}")
    console.print(table)
    if "cost" in proof:
        cost = proof["cost"]
        console.print(
            f"{proof['model']}: {cost['deterministic_tokens_per_s']:,.0f} tokens/s in the deterministic mode,"
            f" {cost['default_tokens_per_s']:,.0f} in the default: {cost['speed_ratio']:.2f} of its speed.",
            soft_wrap=True,
        )


def _show_lines(proof: dict[str, Any], console: Any) -> None:
    lines = [
        f"{proof['model']}: request {one['request']}, output {one['position']}:"
        f" {'an end' if one['token'] is None else one['token']} for {one['expected']},"
        f" gap {float(one['gap']):.1e} of {one['bound']:.1e}"
        + (", a tie of the reference's own" if one["unstable"] else "")
        + ("" if one["within"] else "  VIOLATION")
        for one in sorted(proof["differences"], key=lambda one: one["within"])
    ]
    lines = [*(f"{proof['model']}: {fault}  VIOLATION" for fault in proof["faults"]), *lines]
    for line in lines[:SHOWN]:
        console.print(line, style="red" if line.endswith("VIOLATION") else None, soft_wrap=True)
    if len(lines) > SHOWN:
        console.print(f"{proof['model']}: and {len(lines) - SHOWN} more; --json has all.", soft_wrap=True)
