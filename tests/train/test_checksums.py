"""A checkpoint of which one bit changed, that has another step's name, or that is of another run: each is noticed."""

import dataclasses
import errno
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import make_run

from gcompute.config.train import RunConfig
from gcompute.model.checksums import MANIFEST, verify, write_manifest
from gcompute.model.pretrained import CHECKPOINTS, load, saved_steps
from gcompute.train.checkpoint import ITEMS, Checkpoints
from gcompute.train.corpus import TokenizedCorpus
from gcompute.train.loop import train
from gcompute.train.programs import Programs, build_programs
from gcompute.train.step import TrainState

# Where one file cannot be read, Orbax leaves the tasks of the others behind, unfinished.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

RUN = make_run(steps=4, checkpoint_every=2, dispatch_steps=2)


@pytest.fixture(scope="module")
def programs() -> Programs:
    return build_programs(RUN)


@pytest.fixture(scope="module")
def saved(corpus: TokenizedCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with checkpoints 2 and 4."""
    out = tmp_path_factory.mktemp("saved") / "run"
    train(RUN, corpus, out=out)
    corpus.tokenizer.save(out / "tokenizer.json")
    return out


@pytest.fixture
def out(saved: Path, tmp_path: Path) -> Path:
    """That run directory, to damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def restore(out: Path, programs: Programs, run: RunConfig | None = None) -> tuple[TrainState, list[str]]:
    notices: list[str] = []
    with Checkpoints(out / CHECKPOINTS, keep=20) as checkpoints:
        restored = checkpoints.restore(programs.abstract_state, notices.append, run=run and run.to_dict())
    assert restored is not None
    return restored[0], notices


def contents(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def flip(path: Path, place: int) -> bytes:
    """Flip one bit, and give the content as it was."""
    before = path.read_bytes()
    changed = bytearray(before)
    changed[place // 8] ^= 1 << place % 8
    path.write_bytes(changed)
    return before


def test_a_bit_flipped_in_any_file_is_noticed(saved: Path, tmp_path: Path, programs: Programs):
    newest = saved / CHECKPOINTS / "4"
    good = contents(restore(saved, programs)[0])
    draw = random.Random(0)
    for index, path in enumerate(sorted(path for path in newest.rglob("*") if path.is_file())):
        copied = Path(shutil.copytree(saved, tmp_path / str(index)))
        name = path.relative_to(newest)
        flip(copied / CHECKPOINTS / "4" / name, draw.randrange(8 * path.stat().st_size))
        state, notices = restore(copied, programs)
        if len(name.parts) == 1 and name.name != MANIFEST and not notices:
            assert contents(state) == good, name  # Orbax's own notes, which hold nothing of the state
            continue
        assert int(state.step) == 2, name
        (notice,) = notices
        assert "checkpoint 4 in" in notice
        assert "trying the one before it" in notice
        assert "\n" not in notice
        if len(name.parts) > 1:
            assert f"{name} is damaged" in notice


def test_every_bit_of_the_largest_parameters_counts(out: Path):
    newest = out / CHECKPOINTS / "4"
    largest = max((newest / "params").rglob("*"), key=lambda path: path.stat().st_size)
    draw = random.Random(1)
    for _ in range(60):
        before = flip(largest, draw.randrange(8 * largest.stat().st_size))
        with pytest.raises(ValueError, match=f"{largest.name} is damaged"):
            verify(newest, ITEMS)
        largest.write_bytes(before)
    assert verify(newest, ITEMS)


def test_every_byte_of_the_manifest_counts(tmp_path: Path):
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "array").write_bytes(bytes(100))
    write_manifest(tmp_path, ["params"])
    path = tmp_path / MANIFEST
    for place in range(path.stat().st_size):
        before = flip(path, 8 * place + place % 7)
        with pytest.raises(ValueError, match=f"{MANIFEST} is damaged"):
            verify(tmp_path, ["params"])
        path.write_bytes(before)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_inference_reads_and_verifies_parameters_alone(out: Path):
    newest = out / CHECKPOINTS / "4"
    flip(max((newest / "optimizer").rglob("*"), key=lambda path: path.stat().st_size), 1000)
    notices: list[str] = []
    assert load(out, notice=notices.append).step == 4
    assert notices == []
    flip(max((newest / "params").rglob("*"), key=lambda path: path.stat().st_size), 1000)
    assert load(out, notice=notices.append).step == 2
    assert len(notices) == 1
    with pytest.raises(ValueError, match=r"checkpoint 4 in .* cannot be read \(.*is damaged") as caught:
        load(newest)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_gone_and_one_that_was_cut_short(out: Path):
    newest = out / CHECKPOINTS / "4"
    (newest / "params" / "manifest.ocdbt").rename(newest / "elsewhere")
    with pytest.raises(ValueError, match=r"params/manifest\.ocdbt is missing"):
        verify(newest, ITEMS)
    (newest / "params" / "manifest.ocdbt").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"manifest\.ocdbt has 4 bytes of \d+"):
        verify(newest, ITEMS)


def test_a_checkpoint_from_before_there_were_checksums_is_read_and_that_is_said(
    saved: Path, out: Path, programs: Programs
):
    (out / CHECKPOINTS / "4" / MANIFEST).unlink()
    state, notices = restore(out, programs, RUN)
    assert contents(state) == contents(restore(saved, programs)[0])
    (notice,) = notices
    assert "4 has no checksums" in notice
    assert load(out, notice=notices.append).step == 4
    assert len(notices) == 2


@pytest.mark.parametrize("checksums", [True, False], ids=["", "without checksums"])
def test_a_checkpoint_renamed_to_another_step_is_not_taken_for_it(checksums: bool, out: Path, programs: Programs):
    (out / CHECKPOINTS / "4").rename(out / CHECKPOINTS / "7")
    if not checksums:
        (out / CHECKPOINTS / "7" / MANIFEST).unlink()
    notices: list[str] = []
    assert load(out, notice=notices.append).step == 2
    assert "it is of step 4, and was renamed" in notices[-1]
    state, notices = restore(out, programs, RUN)
    assert int(state.step) == 2
    assert "it is of step 4, and was renamed" in notices[-1]


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("optimizer", {"learning_rate": 0.02}),
        ("optimizer", {"b2": 0.95}),
        ("train", {"seed": 1}),
        ("train", {"batch": 8}),
        ("data", {"val_fraction": 0.2}),
    ],
    ids=str,
)
def test_a_run_that_would_go_on_otherwise_is_refused(section: str, change: dict, out: Path, programs: Programs):
    other = dataclasses.replace(RUN, **{section: dataclasses.replace(getattr(RUN, section), **change)})
    ((name, value),) = change.items()
    was = getattr(getattr(RUN, section), name)
    with pytest.raises(ValueError, match=f"{name} is {was} there and {value} here"):
        restore(out, programs, other)
    anew = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, steps=9, keep=1, eval_every=2))
    assert int(restore(out, programs, anew)[0].step) == 4


def test_a_checkpoint_without_its_checksums_does_not_come_to_be(
    corpus: TokenizedCorpus, out: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(directory: Path, items: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    more = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, steps=6))
    with monkeypatch.context() as patch:
        patch.setattr("gcompute.train.checkpoint.write_manifest", full)
        with pytest.raises(OSError, match=r"could not be written \(No space left on device\)\. Checkpoint 4 stands"):
            train(more, corpus, out=out, resume=True)
    assert saved_steps(out / CHECKPOINTS) == [2, 4]
    assert train(more, corpus, out=out, resume=True).step == 6
    assert sorted(path.name for path in (out / CHECKPOINTS).iterdir()) == ["2", "4", "6"]
