"""The `gcompute` command: lists its commands without importing them, and turns errors into one line."""

import importlib
import os
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import click

from gcompute import __version__
from gcompute.cli.streams import endure
from gcompute.config.fields import nearest

USAGE_ERROR = 2
INTERRUPTED = 130
# sysexits.h: an error that the program did not foresee.
FAULT = 70


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A command that has not been imported."""

    about: str
    example: str


COMMANDS = {
    "demo": Entry(
        about="Look at this machine, predict, train a model on real text, serve it, report.",
        example="gcompute demo",
    ),
    "train": Entry(
        about="Train a transformer on text.",
        example="gcompute train --model demo --data stdlib --steps 500 --out runs/first",
    ),
    "generate": Entry(
        about="Continue a prompt with a trained model.",
        example='gcompute generate runs/first "def main(" --max-tokens 40',
    ),
    "serve": Entry(
        about="Serve a trained model over HTTP, as the OpenAI completions API.",
        example="gcompute serve runs/first --port 8000",
    ),
    "bench": Entry(
        about="Put a load on a server: latency, throughput, goodput, cost, beside the plan's prediction.",
        example="gcompute bench serve runs/first --sweep 1,2,4,8 --plot curve.png",
    ),
    "plan": Entry(
        about="Predict: will it fit, what bounds it, what does it cost; on chips that need not be here.",
        example="gcompute plan train llama3-70b --on v5p:8x8x16 --mesh fsdp=256,tensor=4 --batch 1024",
    ),
    "exam": Entry(
        about="Ask the planner what is known, and say how far off it is.",
        example="gcompute exam",
    ),
    "compile": Entry(
        about="Compile a real program for chips that are not here: memory, collectives, fits or not.",
        example="gcompute compile train llama3-8b --on v5e:4x4 --mesh fsdp=16 --batch 16 --seq 2048 --remat full",
    ),
    "explain": Entry(
        about="Show what a mesh does to every tensor of a model: its piece, its bytes, its copies.",
        example="gcompute explain llama3-70b --mesh fsdp=64,tensor=4",
    ),
    "certify": Entry(
        about="Prove every parallel strategy equal to one device: values, gradients, collectives.",
        example="gcompute certify --html certificate.html",
    ),
    "chips": Entry(
        about="List chips and what they can do, every figure with its source and date.",
        example="gcompute chips v5p",
    ),
    "machine": Entry(
        about="Show the devices and memory here, and measure their roofline.",
        example="gcompute machine --json",
    ),
}


class LazyGroup(click.Group):
    """Finds commands in COMMANDS and imports gcompute.cli.NAME when one is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            raise click.UsageError(f"command {cmd_name!r} is not known. {nearest(cmd_name, COMMANDS)}")
        return importlib.import_module(f"gcompute.cli.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            for name, entry in COMMANDS.items():
                formatter.write(f"  {name:<10}{entry.about}\n  {'':<10}$ {entry.example}\n")


@click.group(cls=LazyGroup, invoke_without_command=True)
@click.version_option(__version__, prog_name="gcompute")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """A compute lab for generative AI in JAX: predict it, prove it with the real compiler, measure it."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def fail(message: str, *, status: int = USAGE_ERROR) -> NoReturn:
    """Print one line on standard error and leave, with the status of a user's error."""
    text = " ".join(message.split())
    print(f"error: {text}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def main(args: list[str] | None = None) -> Any:
    """Run the command line; always ends in SystemExit. GCOMPUTE_TRACEBACK=1 shows where an error came from."""
    endure()
    if "matplotlib" not in sys.modules:
        # Pictures are only ever saved; a notebook hands its own backend down, which may not be installed here.
        os.environ["MPLBACKEND"] = "agg"
    try:
        status = cli(args=args, prog_name="gcompute", standalone_mode=False)
        raise SystemExit(status if isinstance(status, int) else 0)
    except (click.ClickException, ValueError, OSError, FloatingPointError, MemoryError) as error:
        if os.environ.get("GCOMPUTE_TRACEBACK"):
            raise
        fail(_one_line(error))
    except (click.Abort, KeyboardInterrupt):
        print("interrupted.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except (SystemExit, GeneratorExit):
        raise
    # A panic of a library in Rust is no Exception.
    except BaseException as error:
        if os.environ.get("GCOMPUTE_TRACEBACK"):
            raise
        text = str(error)
        if "Unable to initialize backend" in text:
            chosen = os.environ.get("JAX_PLATFORMS")
            fail(f"{text.rstrip('.')}. Unset JAX_PLATFORMS={chosen}, or name what is here: cpu works everywhere.")
        if isinstance(error, RecursionError):
            fail("a file that was read nests too deep. Check what it holds.")
        what = f"{type(error).__name__}: {text.rstrip('.')}"
        fail(f"{what}. gcompute did not expect that: GCOMPUTE_TRACEBACK=1 shows where.", status=FAULT)


def _one_line(error: BaseException) -> str:
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}."
    if isinstance(error, MemoryError) and not str(error):
        return "the memory is not enough. Use a smaller model or batch."
    return str(error) or type(error).__name__
