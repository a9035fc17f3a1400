"""Progress bars on standard error: training with loss, tokens/s, MFU and time left; other long work with a count."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from gcompute.train.events import Evaluated, Event, Notice, Sampled, Saved, Started, Stepped


def duration(seconds: float) -> str:
    """A time as people say it.

    >>> duration(0.0123), duration(75), duration(7300)
    ('12.3 ms', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def share_of_ceiling(share: float) -> str:
    """A share of a measured ceiling; above 100 % it says what that means.

    >>> share_of_ceiling(0.431), share_of_ceiling(1.295)
    ('43.1%', '129.5% (the ceiling was measured too low: gcompute machine --again)')
    """
    remark = " (the ceiling was measured too low: gcompute machine --again)" if share > 1 else ""
    return f"{share:.1%}{remark}"


class Shown:
    """What shows a bar, its `progress`, inside a with block."""

    progress: Progress

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()


class WorkProgress(Shown):
    """A bar for work that reports (what, done, total)."""

    def __init__(self, console: Console):
        self.progress = Progress(
            TextColumn("{task.description:<24}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=total)
        self.progress.update(self.tasks[what], completed=done, total=total)


class TrainProgress(Shown):
    """Watches a training loop. On a terminal, one live bar; elsewhere, a line every `log_every` steps."""

    def __init__(self, console: Console, *, log_every: int):
        self.console, self.log_every = console, log_every
        self.live = console.is_terminal
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  val {task.fields[val]}  {task.fields[rate]}  {task.fields[left]}"),
            console=console,
            disable=not self.live,
        )
        self.task: TaskID | None = None
        self.logged = 0

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self.logged = event.first_step
                self.task = self.progress.add_task(
                    "", total=event.num_steps, completed=event.first_step, loss="-", val="-", rate="", left=""
                )
                resumed = f", resumed at step {event.first_step}" if event.first_step else ""
                self.console.print(
                    f"{event.num_params:,} parameters, {event.accumulation} microbatches a step, compiled in"
                    f" {duration(event.compile_s)}{resumed}"
                )
            case Stepped():
                rate = f"{event.tokens_per_s:,.0f} tokens/s"
                if event.mfu:
                    rate += f"  MFU {share_of_ceiling(event.mfu)}"
                left = f"{duration(event.eta_s)} left"
                if self.task is not None:
                    self.progress.update(
                        self.task, completed=event.step, loss=f"{event.loss:.4f}", rate=rate, left=left
                    )
                if not self.live and event.step - self.logged >= self.log_every:
                    self.logged = event.step
                    self.console.print(f"step {event.step:>6}  loss {event.loss:.4f}  {rate}  {left}")
            case Evaluated():
                if self.task is not None:
                    self.progress.update(self.task, val=f"{event.loss:.4f}")
                if event.num_batches == event.of_batches:
                    sample = "the whole split"
                else:
                    sample = f"{event.num_batches:,} of {event.of_batches:,} batches, spread over the split"
                self.console.print(f"step {event.step:>6}  validation loss {event.loss:.4f} over {sample}")
            case Sampled():
                # Quoted, a text is one line, and no control character in it reaches the terminal.
                said = f"step {event.step:>6}  sample {event.prompt!r} -> {event.text!r}"
                self.console.print(said, markup=False, highlight=False, soft_wrap=True)
            case Notice():
                self.console.print(f"notice: {event.text}", soft_wrap=True)
            case Saved():
                pass
