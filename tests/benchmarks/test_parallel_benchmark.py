"""The parallel benchmark: exact where the textbook is exact, and loud where a byte has no explanation."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "parallel"


@pytest.fixture(scope="module", autouse=True)
def modules():
    """The benchmark's own modules, which are no package, importable as its command has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARK)
        yield


@pytest.fixture(scope="module")
def programs():
    import explicit
    import trainer

    return {f"{one.name} {one.mesh}": one for one in (*explicit.programs(), *trainer.programs())}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, BENCHMARK / "run.py", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("sequence parallel MLP tensor=8", {"all-gather", "reduce-scatter"}),
        ("collective matmul MLP, both ways tensor=8", {"collective-permute"}),
        ("vocab parallel cross-entropy tensor=8", {"all-reduce"}),
        ("gathered attention context=8", {"all-gather", "reduce-scatter"}),
    ],
)
def test_bytes_are_those_of_the_textbook(programs, name, kinds):
    from account import PLACES, account

    sent = account(programs[name], jax.devices()).sent
    # JAX 0.7 sends a few integers beside, which are accounted for.
    assert all(row.ratio == 1 for row in sent if PLACES not in row.reasons)
    assert {row.kind for row in sent if row.ratio is not None} == kinds
    assert not any(row.unexplained_bytes for row in sent)


@pytest.mark.slow
def test_the_trainer_on_the_data_axis_sends_its_gradient_once_and_the_loss(programs):
    from account import account

    (row,) = account(programs["train data=8"], jax.devices()).sent
    assert (row.axes, row.kind, row.runs) == (("data",), "all-reduce", 1)
    assert row.sent_bytes - row.textbook_bytes == 2 * 7 / 8 * 4
    assert row.unexplained_bytes == 0


def test_a_byte_too_many_and_one_too_few_are_unexplained(programs):
    import textbook
    from account import account

    program = programs["ring all-reduce, one way context=8"]
    axes = ("context",)
    right = program.textbook[axes][textbook.PERMUTE]
    wrong = dataclasses.replace(program, textbook={axes: {textbook.PERMUTE: right + 1, textbook.ALL_GATHER: 5.0}})
    missing, short = account(wrong, jax.devices()).sent
    assert (missing.kind, missing.num_instructions, missing.unexplained_bytes) == ("all-gather", 0, -5)
    assert (short.kind, short.unexplained_bytes, short.reasons) == ("collective-permute", -1, ())


def test_scalars_are_counted_up_to_their_number_and_no_further(programs):
    from account import compare

    from gcompute.aot.hlo import Collective

    def reduced(operand_bytes: int) -> Collective:
        return Collective(
            kind="all-reduce",
            name="",
            dtype="f32",
            operand_bytes=operand_bytes,
            result_bytes=operand_bytes,
            group_size=8,
            groups=(),
            pairs=(),
            axes=("data",),
            loops=(),
            source="",
        )

    program = programs["data parallel, 1 microbatch data=8"]
    size = round(program.textbook["data",]["all-reduce"] / (2 * 7 / 8))
    one, two, half = (compare(program, [reduced(size + more)], "cpu")[0] for more in (4, 8, 2))
    assert (one.unexplained_bytes, one.reasons) == (0, ("1 scalar: the loss",))
    assert (two.unexplained_bytes, half.unexplained_bytes) == (14, 3.5)


def test_every_schedule_idles_as_its_formula_says():
    from bubbles import bubbles

    found = list(bubbles())
    assert len(found) == 36
    assert all(one.agrees for one in found)
    assert {one.idle_slots for one in found if one.stages == 8} == {2 * 8 * 7}


def test_the_command_prints_tables_and_ends_with_one_json_object(tmp_path):
    file = tmp_path / "all.json"
    done = run("--only", "cross-entropy", "--only", "bubbles", "--json", str(file))
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["summary"]["as_the_textbook"], last["summary"]["unexplained"]) == (1, 0)
    assert last["versions"]["jax"] == jax.__version__
    (program,) = json.loads(file.read_text(encoding="utf-8"))["programs"]
    assert program["memory"]["arguments_bytes"] > 0
    assert "| vocab parallel cross-entropy | tensor=8 |" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--only", "nothing-of-the-kind"), "is in no name. Names: data parallel, 1 microbatch;"),
        (("--on", "cpu:4"), "cpu:4 has 4 devices and the programs are for 8."),
        (("--on", "v5e:3x3"), "v5e:3x3 is not a slice that exists."),
        (("--json", "no/such/directory.json"), "there is no directory"),
    ],
)
def test_bad_input_is_one_line(arguments, told):
    done = run(*arguments)
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
