"""Plans against the compilers of chips that are not here, through the command that a user calls."""

import json
import subprocess
import sys

import pytest

from gcompute.exam.report import MEMORY_LIMITS

pytestmark = pytest.mark.slow


def prove(*args: str) -> dict:
    ended = subprocess.run(
        [sys.executable, "-m", "gcompute", "plan", *args, "--prove", "--json"],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr + ended.stdout
    return json.loads(ended.stdout)["proof"]


# None of them is among the records that the prediction was fitted to.
@pytest.mark.parametrize(
    "args",
    [
        ("tinyllama-1.1b", "--on", "v5e:2x2", "--mesh", "fsdp=2,tensor=2", "--batch", "16", "--seq", "1024"),
        ("qwen3-0.6b", "--on", "v6e:2x2", "--mesh", "data=2,fsdp=2", "--batch", "8", "--seq", "2048"),
        ("tinyllama-1.1b", "--on", "a100-80:8", "--mesh", "data=2,fsdp=4", "--batch", "16", "--seq", "1024"),
    ],
    ids=lambda args: args[2],
)
def test_a_train_step(args: tuple[str, ...]):
    proof = prove("train", *args, "--remat", "full")
    total = proof["memory"][-1]
    assert total["part"] == "total"
    assert abs(total["residual"]) <= MEMORY_LIMITS[1]
    arguments = proof["memory"][0]
    assert abs(arguments["residual"]) <= 0.01
    for row in proof["collectives"]:
        if row["expected_bytes"] > 2**28:
            assert 0.5 <= row["found_bytes"] / row["expected_bytes"] <= 2, row


def test_serving():
    args = ("tinyllama-1.1b", "--on", "v5e:2x2", "--mesh", "tensor=4", "--concurrency", "16")
    proof = prove("serve", *args, "--prompt", "512", "--output", "128")
    assert [one["name"] for one in proof["programs"]] == ["prefill", "decode"]
    assert all(abs(one["memory"][-1]["residual"]) <= MEMORY_LIMITS[1] for one in proof["programs"])
