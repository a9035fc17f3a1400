"""The engine's state in numbers, read in one go. The caller holds the engine's lock."""

from collections.abc import Mapping

from gcompute.serve.runner import Runner
from gcompute.serve.scheduler import Scheduler
from gcompute.serve.stats import EngineStats, LastDecode, SlotStats, Status
from gcompute.serve.work import Sequence


def observe(
    runner: Runner, scheduler: Scheduler, status: Status, counts: Mapping[str, int], last: LastDecode
) -> EngineStats:
    """What the engine is doing. counts: what it has done, by the names of `EngineStats` without "num_"."""
    limits, running = runner.shape.limits, list(scheduler.running.values())
    return EngineStats(
        status=status,
        slots=limits.slots,
        num_running=len(running),
        num_waiting=scheduler.num_waiting,
        num_cells=limits.num_pages * limits.page,
        num_cells_used=sum(seq.cached for seq in running),
        num_programs=len(runner.compiled),
        num_late_compilations=runner.compilations.num,
        num_dispatches=runner.num_dispatches,
        num_decode_steps=counts["decode_steps"],
        num_prompt_tokens=counts["prompt_tokens"],
        num_output_tokens=counts["output_tokens"],
        page_tokens=limits.page,
        num_pages=limits.num_pages,
        num_pages_free=sum(blocks.num_free for blocks in scheduler.blocks),
        num_pages_cached=sum(blocks.num_cached for blocks in scheduler.blocks),
        num_pages_used=sum(blocks.num_used for blocks in scheduler.blocks),
        num_hit_tokens=scheduler.num_hit_tokens,
        num_preemptions=scheduler.num_preemptions,
        num_drafted=counts["drafted"],
        num_accepted=counts["accepted"],
        running=tuple(map(_slot_stats, running)),
        decode_batch=last.rows,
        decode_cells=last.cells,
        last_decode_step_s=last.step_s,
        decode_tokens_per_s=last.tokens_per_s,
        decode_speculated=last.speculated,
    )


def _slot_stats(seq: Sequence) -> SlotStats:
    assert seq.slot is not None
    return SlotStats(
        slot=seq.slot,
        request_id=seq.request_id,
        phase="decode" if seq.decodes else "prefill",
        num_prompt=seq.num_prompt,
        num_cached=seq.cached,
        num_output=seq.num_output,
        max_tokens=seq.max_tokens,
    )
