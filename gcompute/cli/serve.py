"""gcompute serve: answer the OpenAI completions API with a trained model."""

from pathlib import Path
from typing import Any

import click

from gcompute.cli.api_key import FILE_HELP, VARIABLE, chosen_key
from gcompute.cli.environment import quiet_backends, restart_fast, use_compilation_cache
from gcompute.cli.flags import FILE, PATH, SectionedCommand, config_options, given
from gcompute.cli.signals import stop_signals
from gcompute.config.mesh import OpenMesh, mesh_over
from gcompute.config.serve import ServeConfig


class ServeCommand(SectionedCommand):
    examples = (
        "gcompute serve runs/first --port 8000",
        "gcompute serve runs/first --slots 32 --kv-tokens 20000 --preemption swap",
        "gcompute serve runs/large --speculate draft --draft runs/small",
        "gcompute serve runs/first --deterministic",
        "gcompute serve runs/first --mesh tensor=4,data=2 --slots 64",
        "gcompute serve runs/first --weights int8 --kv int8",
        'curl -s localhost:8000/v1/completions -d \'{"model": "first", "prompt": "def ", "max_tokens": 40}\'',
    )


@click.command(cls=ServeCommand)
@click.argument("checkpoint", type=PATH)
@click.option("--draft", type=PATH, default=None, help="Model that proposes tokens for --speculate draft.")
@click.option("--name", default=None, help="Model name that requests use.  [the run's name]")
@click.option(
    "--api-key",
    envvar=VARIABLE,
    show_envvar=True,
    help="Key that calls of /v1 and /engine must carry.  [none]",
)
@click.option("--api-key-file", type=FILE, help=FILE_HELP)
@click.option("--fast/--no-fast", default=True, help="Restart once with huge pages where that is faster.  [fast]")
@config_options(ServeConfig, "Serving")
def command(
    checkpoint: Path,
    draft: Path | None,
    name: str | None,
    api_key: str | None,
    api_key_file: Path | None,
    fast: bool,
    **values: Any,
) -> None:
    """Serve the model in CHECKPOINT, the --out directory of `gcompute train`: /v1/completions, /v1/chat/completions,
    /v1/models, /health, /metrics, and at / a page to talk to it and watch it work. Chats use the chat template
    there if jinja2 is installed, and "role: content" lines otherwise. SIGTERM, SIGHUP and Ctrl-C finish accepted
    requests first."""
    key = chosen_key(api_key, api_key_file)
    restart_fast(fast)
    quiet_backends()
    settings = given(ServeConfig, values)
    if isinstance(settings.get("mesh"), OpenMesh):
        import jax

        settings["mesh"] = mesh_over(settings["mesh"], len(jax.devices()))
    asked = ServeConfig(**settings)
    use_compilation_cache()
    import jax

    from gcompute.cli.chips import measured_chip
    from gcompute.cli.consoles import plain_console
    from gcompute.model.pretrained import load, locate
    from gcompute.serve.bounded_tokenizer import bounded
    from gcompute.serve.engine import Engine
    from gcompute.serve.native.build import why_not
    from gcompute.serve.position import decode_roofline
    from gcompute.serve.precision import settle
    from gcompute.serve.request import NotReady
    from gcompute.serve.server import serve
    from gcompute.serve.template import load_template

    console = plain_console(stderr=True)
    notice = lambda text: console.print(f"notice: {text}", soft_wrap=True)  # noqa: E731
    model = load(checkpoint, notice=notice)
    config, chosen = settle(asked)
    if chosen:
        console.print(f"precision {config.precision} ({chosen})", highlight=False)
    roofline = None
    if config.mesh is None or config.mesh.num_devices == 1:
        # Before the engine is there: nothing else runs while the machine is measured, once and for all. The batch of
        # several devices would not be that of one.
        roofline = decode_roofline(model.config, config, measured_chip())
    tokenizer = bounded(model.tokenizer, time_s=config.timeout_s)
    template = load_template(locate(checkpoint)[0], notice, tokenizer=tokenizer, time_s=config.timeout_s)
    model_name = name or model.name
    drafting = None
    if draft is not None:
        small = load(draft, notice=notice)
        drafting = (small.params, small.config)
    engine = Engine(model.params, model.config, tokenizer, config, draft=drafting)
    stats = engine.stats()
    console.print(
        f"{stats.num_cells:,} tokens of keys and values in {stats.num_pages:,} pages; "
        f"{config.slots} requests of {engine.max_context:,} need {config.slots * engine.max_context:,}",
        highlight=False,
    )
    reason = why_not() if jax.default_backend() == "cpu" and config.mesh is None else None
    if reason:
        notice(f"serving by XLA's own products, which are slower on CPU than gcompute's kernels: {reason}.")
    console.print(f"{model_name}: step {model.step}, compiling {len(engine.programs())} programs", highlight=False)
    try:
        serve(
            engine,
            config,
            model_name=model_name,
            template=template,
            api_key=key,
            roofline=roofline,
            signals=stop_signals(),
            announce=lambda url: console.print(f"serving {model_name} at {url} (Ctrl-C stops)", highlight=False),
        )
    except NotReady as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ValueError(f"the engine did not start: {reason}") from error
