"""gcompute bench: measure a server, and what its numbers cost."""

import click

from gcompute.cli.bench_quality import command as quality
from gcompute.cli.bench_serve import command as serve
from gcompute.cli.flags import ExampleGroup


@click.group(cls=ExampleGroup, invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Put a load on a server, or measure what int8 costs in quality."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


command.add_command(serve, "serve")
command.add_command(quality, "quality")
