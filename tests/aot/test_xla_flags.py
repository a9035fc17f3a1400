"""Flags and options of the compiler: the unknown are left out, and each is asked for once per jaxlib."""

import json
from importlib.metadata import version

import jax
import pytest

from gcompute.aot.target import target_environment
from gcompute.aot.xla_flags import ANSWERS, FAST_COMPILES, add_flags, known_flags, known_options
from gcompute.hardware.target import Target
from gcompute.serve import few_rows

pytestmark = pytest.mark.oldest

UNKNOWN = "--xla_this_flag_was_never_there=1"


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """The file of kept answers, in a cache of this test's own."""
    monkeypatch.setenv("GCOMPUTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / ANSWERS


def no_process(flag):
    raise AssertionError(f"asked for {flag}")


def test_jaxlib_is_asked_once_and_an_unknown_flag_ends_only_the_process_that_asks(answers):
    assert known_flags(FAST_COMPILES, UNKNOWN) == (FAST_COMPILES,)
    assert json.loads(answers.read_text()) == {version("jaxlib"): {FAST_COMPILES: True, UNKNOWN: False}}
    assert known_flags(UNKNOWN, FAST_COMPILES, knows=no_process) == (FAST_COMPILES,)


def test_without_flags_nothing_is_asked_or_written(answers):
    assert known_flags(knows=no_process) == ()
    assert add_flags("--xla_a=1 --xla_b", "--xla_a=2", "--xla_b=false") == "--xla_a=1 --xla_b"
    assert not answers.exists()


def test_answers_of_another_jaxlib_are_kept_and_not_used(answers):
    answers.parent.mkdir()
    answers.write_text(json.dumps({"0.0.1": {FAST_COMPILES: False}}))
    assert known_flags(FAST_COMPILES, knows=lambda flag: True) == (FAST_COMPILES,)
    assert json.loads(answers.read_text()) == {
        "0.0.1": {FAST_COMPILES: False},
        version("jaxlib"): {FAST_COMPILES: True},
    }


def test_a_flag_that_could_not_be_tried_is_left_out_and_asked_for_again(answers):
    assert known_flags(FAST_COMPILES, knows=lambda flag: None) == ()
    assert known_flags(FAST_COMPILES, knows=lambda flag: True) == (FAST_COMPILES,)


@pytest.mark.parametrize("damaged", ["", "{", "[1]", '{"0.1": 3}', "null", "\x00"])
def test_a_damaged_file_is_made_anew(answers, damaged):
    answers.parent.mkdir()
    answers.write_text(damaged)
    assert known_flags(UNKNOWN, knows=lambda flag: False) == ()
    assert json.loads(answers.read_text()) == {version("jaxlib"): {UNKNOWN: False}}
    assert list(answers.parent.iterdir()) == [answers]


def test_where_the_cache_cannot_be_written_the_answer_still_counts(answers):
    answers.parent.write_text("a file where the directory should be")
    assert known_flags(FAST_COMPILES, knows=lambda flag: True) == (FAST_COMPILES,)


def test_the_environment_of_a_gpu_target_holds_only_what_is_known(answers, monkeypatch):
    monkeypatch.setattr("gcompute.aot.xla_flags.jaxlib_knows", lambda flag: False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_mine=1")
    assert target_environment(Target.parse("h100-sxm:8"))["XLA_FLAGS"] == "--xla_mine=1"


def test_an_unknown_option_of_a_compilation_is_left_out():
    device = jax.devices()[0]
    assert known_options({"xla_nonsense": "1", "xla_cpu_prefer_vector_width": "256"}, device) == {
        "xla_cpu_prefer_vector_width": "256"
    }
    assert known_options({"xla_cpu_prefer_vector_width": "wide"}, device) == {}
    assert "xla_cpu_prefer_vector_width" in few_rows.compiler_options()
