"""`gcompute compile serve --attention`: programs over pages by the command, without a TPU's compiler."""

import json

import pytest

from gcompute.aot.hlo import count_kernels
from gcompute.cli.main import main

SERVE = ("compile", "serve", "test", "--on", "cpu:4", "--slots", "4", "--precision", "float32")


def status(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_compiles_a_mixed_step_and_decoding_over_pages(capsys):
    # More tensor than the two key/value heads: each is kept on two devices.
    assert status(*SERVE, "--mesh", "tensor=4", "--attention", "xla", "--tokens", "8", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["attention"], answer["tokens"]) == ("xla", 8)
    # Keys and values of 2 layers: 2 pages of 16 cells for each of 4 slots and page 0, one head of 8 floats a device.
    pool_bytes = 2 * 2 * (4 * 2 + 1) * 16 * 8 * 4
    assert list(answer["programs"]) == ["mixed", "decode"]
    for report in answer["programs"].values():
        assert report["fits"]
        assert report["memory"]["aliased_bytes"] == pool_bytes
        assert report["kernels"] == {}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--attention", "paged", "--program", "mixed"], "--program mixed is none of decode"),
        (["--program", "mixed"], "--program mixed is none of prefill, decode, which there are with --attention left"),
        (["--tokens", "8"], "--tokens is of a mixed step"),
        (["--attention", "xla", "--tokens", "3"], "tokens=3 are fewer than slots=4"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(args: list[str], said: str, capsys):
    assert status(*SERVE, *args) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.oldest
def test_counts_kernels_by_name():
    text = """HloModule m, num_partitions=1

ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %attend.3 = f32[8,128]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", metadata={op_name="a"}
  %attend.4.1 = f32[8,128]{1,0} custom-call(%attend.3), custom_call_target="tpu_custom_call"
  ROOT %other = f32[8,128]{1,0} custom-call(%attend.4.1), custom_call_target="Sharding"
}
"""
    assert count_kernels(text) == {"attend": 2}
