"""Two benchmarks that others wrote, run against the server without a network: they must find every request served.

Each is a program with a thousand megabytes of dependencies, so it lives in an environment of its own:

    python -m venv aiperf && aiperf/bin/pip install aiperf
    python -m venv guidellm && guidellm/bin/pip install torch==2.13.0 guidellm
    PATH="$PATH:$PWD/aiperf/bin:$PWD/guidellm/bin" python -m pytest -m slow tests/serve/test_real_clients.py
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
REQUESTS, PROMPT, OUTPUT, CONCURRENCY = 12, 24, 8, 3
TIMEOUT_S = 300


@pytest.fixture
def tokenizer_folder(tokenizer, tmp_path: Path) -> Path:
    """The tokenizer as Hugging Face's libraries read it: a snapshot in a cache, for aiperf takes no path offline."""
    repository = tmp_path / "hub" / "models--local--tiny"
    revision = "0" * 40
    folder = repository / "snapshots" / revision
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    tokenizer.save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not on the PATH: the top of {Path(__file__).name} says how to install it.")
    return found


def run(command: list[str], home: Path) -> None:
    """Run offline, with nothing of this project or of the user's caches in its environment."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "COLUMNS": "200"}
    ended = subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]


def test_aiperf(url: str, engine, tokenizer_folder: Path, tmp_path: Path):
    before = engine.stats()
    command = [
        *(program("aiperf"), "profile", "-m", "tiny", "--url", url, "--endpoint-type", "completions", "--streaming"),
        *("--tokenizer", "local/tiny", "--concurrency", str(CONCURRENCY), "--request-count", str(REQUESTS)),
        *("--synthetic-input-tokens-mean", str(PROMPT), "--output-tokens-mean", str(OUTPUT)),
        *("--extra-inputs", "ignore_eos:true", "--use-server-token-count", "--use-legacy-max-tokens"),
        *("--ui", "none", "--artifact-dir", str(tmp_path / "out")),
    ]
    run(command, tmp_path)
    report = json.loads((tmp_path / "out" / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == REQUESTS
    assert report["request_error_rate"]["avg"] == 0
    assert report["output_sequence_length"]["min"] == report["output_sequence_length"]["max"] == OUTPUT
    assert report["input_sequence_length"]["avg"] == pytest.approx(PROMPT, abs=1)
    assert 0 < report["time_to_first_token"]["p50"] < report["request_latency"]["p99"]
    assert engine.stats().num_output_tokens - before.num_output_tokens >= REQUESTS * OUTPUT


def test_guidellm(url: str, engine, tokenizer_folder: Path, tmp_path: Path):
    before = engine.stats()
    out = tmp_path / "out.json"
    command = [
        *(program("guidellm"), "run", "--disable-progress", "--output", f"kind=json,path={out}"),
        *("--backend", f"kind=openai_http,target={url},model=tiny,request_format=/v1/completions"),
        *("--tokenizer", f"kind=huggingface_auto,model={tokenizer_folder}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}"),
        *("--profile", f"kind=concurrent,streams={CONCURRENCY}", "--constraint", f"kind=max_requests,count={REQUESTS}"),
    ]
    run(command, tmp_path)
    (benchmark,) = json.loads(out.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (REQUESTS, 0)
    requests = benchmark["requests"]["successful"]
    assert {one["output_tokens"] for one in requests} == {OUTPUT}
    assert engine.stats().num_output_tokens - before.num_output_tokens >= REQUESTS * OUTPUT
