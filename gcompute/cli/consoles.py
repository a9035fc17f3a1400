"""Consoles that show text as it is: square brackets in a name or a prompt are not rich's markup."""

from typing import Any

from rich.console import Console

# What reads a file or a pipe has no width, whatever COLUMNS says of the terminal that started it.
LEAST_WIDTH_OF_A_LOG = 80


def plain_console(*, stderr: bool = False, **settings: Any) -> Console:
    """A rich console that neither reads markup nor colours numbers, whatever else `settings` say."""
    console = Console(stderr=stderr, **{"markup": False, "highlight": False, **settings})
    if not console.is_terminal and "width" not in settings:
        console.width = max(console.width, LEAST_WIDTH_OF_A_LOG)
    return console
