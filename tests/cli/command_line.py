"""A tiny run as flags, and how a command line ended."""

from collections.abc import Callable
from dataclasses import dataclass

TINY = (
    *("train", "--no-fast", "--model", "test", "--layers", "1", "--context", "16", "--tokenizer", "char"),
    *("--batch", "4", "--steps", "6", "--checkpoint-every", "2", "--eval-every", "3", "--warmup-steps", "1"),
    *("--mesh", "data=1", "--precision", "float32", "--dispatch-steps", "2"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The line that says what is wrong: the last, and the only one of its kind."""
        assert self.status == 2, self.err
        lines = self.err.splitlines()
        assert lines[-1].startswith("error: "), self.err
        assert self.err.count("error: ") == 1, self.err
        assert "Traceback" not in self.err
        return lines[-1]


Command = Callable[..., Ended]
