"""gcompute bench quality: what int8 weights and int8 keys and values cost, in nats a token of a text."""

import json
from pathlib import Path

import click

from gcompute.cli.environment import quiet_backends, restart_fast, use_compilation_cache
from gcompute.cli.flags import PATH, SectionedCommand

# Weights, keys and values; the first is what the others are set beside.
FORMATS = (("bfloat16", "bfloat16"), ("int8", "bfloat16"), ("bfloat16", "int8"), ("int8", "int8"))


class QualityCommand(SectionedCommand):
    examples = (
        "gcompute bench quality runs/first --text held_out.txt",
        "gcompute bench quality runs/first --text held_out.txt --most-tokens 20000 --json",
    )


@click.command(cls=QualityCommand)
@click.argument("checkpoint", type=PATH)
@click.option("--text", "text_file", type=PATH, required=True, help="UTF-8 text to predict.")
@click.option("--most-tokens", type=click.IntRange(2), default=50_000, help="Read no more of it.  [50000]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--fast/--no-fast", default=True, help="Restart once with huge pages where that is faster.  [fast]")
def command(checkpoint: Path, text_file: Path, most_tokens: int, as_json: bool, fast: bool) -> None:
    """Measure the loss of CHECKPOINT on a text as it is served: in bfloat16, and with int8 weights, int8 keys and
    values, and both. Give a text that it was not trained on."""
    try:
        text = text_file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{text_file} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{text_file} is not UTF-8 text.") from None
    restart_fast(fast)
    quiet_backends()
    use_compilation_cache()
    import numpy as np
    from rich.table import Table

    from gcompute.cli.consoles import plain_console
    from gcompute.model.pretrained import load
    from gcompute.serve.quality import validation_loss

    console = plain_console(stderr=True)
    model = load(checkpoint, notice=lambda said: console.print(f"notice: {said}", soft_wrap=True))
    tokens = np.array(model.tokenizer.encode(text)[:most_tokens])
    rows = []
    with console.status("measuring") as status:
        for weights, kv in FORMATS:
            status.update(f"{weights} weights, {kv} keys and values")
            nats = validation_loss(model.params, model.config, tokens, weights=weights, kv=kv)
            first = rows[0]["nats_a_token"] if rows else nats
            rows.append({"weights": weights, "kv": kv, "nats_a_token": nats, "difference": nats - first})
    if as_json:
        print(json.dumps({"model": model.name, "step": model.step, "num_tokens": len(tokens), "rows": rows}))
        return
    table = Table(title=f"{model.name}, {len(tokens):,} tokens of {text_file.name} (measured)")
    table.add_column("weights")
    table.add_column("keys and values")
    table.add_column("nats a token", justify="right")
    table.add_column("difference", justify="right")
    for row in rows:
        table.add_row(row["weights"], row["kv"], f"{row['nats_a_token']:.5f}", f"{row['difference']:+.5f}")
    plain_console().print(table)
