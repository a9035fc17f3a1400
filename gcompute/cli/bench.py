"""gcompute bench: put a load on something that runs, and set what is measured beside what was predicted."""

import click

from gcompute.cli.bench_serve import command as serve
from gcompute.cli.flags import ExampleGroup


@click.group(cls=ExampleGroup, invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Put a load on a server and report latency, throughput, goodput and cost beside the plan's prediction."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


command.add_command(serve, "serve")
