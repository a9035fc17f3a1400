"""gcompute plan: will it fit, what bounds it, what does it cost; training, serving, and buying instead of renting."""

import click

from gcompute.cli.plan_cost import command as cost
from gcompute.cli.plan_serve import command as serve
from gcompute.cli.plan_train import command as train
from gcompute.config.fields import nearest


class PlanGroup(click.Group):
    """Shows the examples of its commands, and names the legal ones where one is not known."""

    @property
    def examples(self) -> tuple[str, ...]:
        return tuple(example for one in self.commands.values() for example in getattr(one, "examples", ()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"  $ {example}\n")

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands:
            raise click.UsageError(f"plan {cmd_name!r} is not known. {nearest(cmd_name, self.commands)}")
        return super().get_command(ctx, cmd_name)


@click.group(cls=PlanGroup, invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Predict memory, time and cost on chips that need not be here, and say what bounds them."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


command.add_command(train, "train")
command.add_command(serve, "serve")
command.add_command(cost, "cost")
