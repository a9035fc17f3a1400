"""gcompute generate: continue a prompt with a trained model."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from gcompute.cli.environment import quiet_backends, restart_fast, use_compilation_cache
from gcompute.cli.flags import PATH, SectionedCommand
from gcompute.config.serve import ServeConfig
from gcompute.config.train import AUTO, PRECISIONS

MAX_TOKENS = 100


class GenerateCommand(SectionedCommand):
    examples = (
        'gcompute generate runs/first "def main("',
        'gcompute generate runs/first "import " --max-tokens 80 --temperature 0.7 --seed 1',
        'gcompute generate runs/first "class " --num 4 --json',
        'gcompute generate runs/first/checkpoints/best "def "',
    )


@click.command(cls=GenerateCommand)
@click.argument("checkpoint", type=PATH)
@click.argument("prompt")
@click.option("--max-tokens", type=int, help=f"Most tokens to write.  [{MAX_TOKENS}, or what the context has room for]")
@click.option("--temperature", default=0.8, show_default=True, help="0 takes the likeliest token each time.")
@click.option("--top-k", default=0, show_default=True, help="Draw from the k likeliest tokens; 0: from all.")
@click.option("--top-p", default=1.0, show_default=True, help="Draw from the likeliest tokens that hold this mass.")
@click.option("--seed", default=0, show_default=True, help="Seed; the n-th continuation takes seed + n.")
@click.option("--num", default=1, show_default=True, help="Continuations.")
@click.option("--stop", multiple=True, help="Stop before this text; may be repeated.")
@click.option("--precision", default=AUTO, show_default=True, type=click.Choice((AUTO, *PRECISIONS)))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--fast/--no-fast", default=True, help="Restart once with huge pages where that is faster.  [fast]")
def command(
    checkpoint: Path, prompt: str, num: int, seed: int, precision: str, as_json: bool, fast: bool, **sampling: Any
) -> None:
    """Continue PROMPT with the model in CHECKPOINT, the --out directory of `gcompute train`, or OUT/checkpoints/STEP,
    where best stands for the step that --keep-best kept."""
    restart_fast(fast)
    quiet_backends()
    if num < 1:
        raise ValueError(f"--num must be at least 1, got {num}.")
    use_compilation_cache()
    from gcompute.cli.consoles import plain_console
    from gcompute.cli.progress import WorkProgress
    from gcompute.model.pretrained import load
    from gcompute.serve.engine import Engine
    from gcompute.serve.request import Sampling

    console = plain_console(stderr=True)
    model = load(checkpoint, notice=lambda text: console.print(f"notice: {text}", soft_wrap=True))
    sampling["stop"] = tuple(sampling["stop"])
    if sampling["max_tokens"] is None:
        # At least one, so that a prompt that fills the context is refused for what it is.
        room = model.config.context - len(model.tokenizer.encode(prompt))
        sampling["max_tokens"] = max(1, min(MAX_TOKENS, room))
    samplings = [Sampling(**sampling, seed=seed + i) for i in range(num)]
    config = ServeConfig(slots=min(num, 8), precision=precision)
    engine = Engine(model.params, model.config, model.tokenizer, config)
    with WorkProgress(console) as progress:
        engine.start(lambda done, total, what: progress("compiling", done, total))
        engine.wait_ready()
    try:
        done = engine.generate([prompt] * num, samplings)
    finally:
        engine.close()
    if as_json:
        rows = [
            {"text": one.text, "finish_reason": str(one.reason), "completion_tokens": one.usage.completion_tokens}
            for one in done
        ]
        print(json.dumps({"prompt": prompt, "completions": rows}))
        return
    for one in done:
        sys.stdout.write(prompt + one.text + "\n" + ("---\n" if num > 1 else ""))
