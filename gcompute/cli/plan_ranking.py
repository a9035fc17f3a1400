"""What a search found, over one target or several, ranked by time or by dollars, and how it is shown."""

import math
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from gcompute.cli.planning import dollars, gib, seconds, wide_console
from gcompute.config.models import PlannedModel
from gcompute.plan.cost import usd_per_million_tokens
from gcompute.plan.search import Candidate
from gcompute.plan.train_plan import CLOSE, FITS, SHARED

ORDER = {FITS: 0, SHARED: 0, CLOSE: 1}
MARKS = {FITS: "", SHARED: "", CLOSE: " ?"}


@dataclass(frozen=True, slots=True)
class Ranked:
    """One way to train, and what its chips cost an hour, where that is known."""

    candidate: Candidate
    usd_per_hour: float | None

    @property
    def usd_per_million_tokens(self) -> float | None:
        if self.usd_per_hour is None:
            return None
        return usd_per_million_tokens(self.usd_per_hour, self.candidate.time.tokens_per_s)

    def rank(self, by: str) -> tuple[float, ...]:
        """What surely fits first; then tokens a second, or dollars a token; of what does not fit, the smallest."""
        order = ORDER.get(self.candidate.verdict, 2)
        if order == 2:
            return order, self.candidate.total_bytes
        usd = self.usd_per_million_tokens
        return order, (math.inf if usd is None else usd) if by == "cost" else -self.candidate.time.tokens_per_s

    def to_dict(self) -> dict[str, Any]:
        run, time = self.candidate.run, self.candidate.time
        return {
            "target": str(self.candidate.question.target),
            "mesh": str(run.mesh),
            "batch": run.batch,
            "accumulation": run.accumulation,
            "remat": run.remat,
            "verdict": self.candidate.verdict,
            "total_bytes": self.candidate.total_bytes,
            "step_s": time.step_s,
            "tokens_per_s": time.tokens_per_s,
            "usd_per_million_tokens": self.usd_per_million_tokens,
            "mfu": time.mfu,
            "bound": time.bound,
        }


def show_search(planned: PlannedModel, ranked: list[Ranked], top: int) -> None:
    """The best ways, ranked."""
    fitting = sum(one.candidate.verdict in ORDER for one in ranked)
    targets = list(dict.fromkeys(str(one.candidate.question.target) for one in ranked))
    table = Table(
        title=f"{planned.name} on {', '.join(targets)}: {fitting:,} ways fit; the best {min(top, len(ranked))}"
        " (predicted; ? is too close to call)",
        title_justify="left",
    )
    for name in ([] if len(targets) == 1 else ["on"]) + ["mesh", "remat"]:
        table.add_column(name, no_wrap=True)
    for name in ("batch", "micro", "memory", "step", "tokens/s", "$/M", "MFU"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    for one in ranked[:top]:
        run, time, usd = one.candidate.run, one.candidate.time, one.usd_per_million_tokens
        table.add_row(
            *([] if len(targets) == 1 else [str(one.candidate.question.target)]),
            str(run.mesh),
            str(run.remat),
            f"{run.batch:,}",
            str(run.accumulation),
            gib(one.candidate.total_bytes) + MARKS.get(one.candidate.verdict, " no"),
            seconds(time.step_s),
            f"{time.tokens_per_s:,.0f}",
            "-" if usd is None else dollars(usd),
            f"{time.mfu:.1%}",
            time.bound,
        )
    wide_console().print(table)
