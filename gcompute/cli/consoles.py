"""Consoles that show text as it is: square brackets in a name or a prompt are not rich's markup."""

from typing import Any

from rich.console import Console


def plain_console(*, stderr: bool = False, **settings: Any) -> Console:
    """A rich console that neither reads markup nor colours numbers, whatever else `settings` say."""
    return Console(stderr=stderr, **{"markup": False, "highlight": False, **settings})
