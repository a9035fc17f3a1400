"""What `gcompute generate` writes where the context is short."""

import json
from pathlib import Path

from command_line import Command


def test_the_defaults_stop_at_the_context(gcompute: Command, run_copy: Path):
    ended = gcompute("generate", "--no-fast", run_copy, "the ", "--json")
    assert ended.status == 0, ended.err
    (done,) = json.loads(ended.out)["completions"]
    assert (done["finish_reason"], done["completion_tokens"]) == ("length", 16 - 4)
    ended = gcompute("generate", "--no-fast", run_copy, "the and of that it for")
    assert "maximum context length is 16 tokens" in ended.error
