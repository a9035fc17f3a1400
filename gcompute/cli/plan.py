"""gcompute plan: will it fit, what bounds it, what does it cost; training, serving, and buying instead of renting."""

import click

from gcompute.cli.flags import ExampleGroup
from gcompute.cli.plan_cost import command as cost
from gcompute.cli.plan_serve import command as serve
from gcompute.cli.plan_train import command as train


@click.group(cls=ExampleGroup, invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Predict memory, time and cost on chips that need not be here, and say what bounds them."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


command.add_command(train, "train")
command.add_command(serve, "serve")
command.add_command(cost, "cost")
