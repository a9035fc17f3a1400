"""gcompute plan serve: what it prints, its pictures and exit status, and every bad input in one line."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from command_line import Command
from plan_answers import one_line, sound

from gcompute.plan.accuracy import RECORD

PLAN = ("plan", "serve", "llama3-8b", "--on", "v5e:2x4")
MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "sliding_window": 512,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
}
LATENT = {
    "model_type": "deepseek_v2",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 256,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


def test_json_of_a_given_mesh(gcompute: Command):
    document = sound(gcompute(*PLAN, "--mesh", "tensor=8", "--concurrency", "32", "--json"))
    assert (document["mesh"], document["concurrency"]) == ("tensor=8", 32)
    assert (document["prompt"], document["output"], document["context"]) == (1024, 256, 1280)
    assert document["memory"]["fits"]
    assert document["most_concurrency"] >= 32
    # Keys and values of 32 layers of 8 heads of 128, in two bytes.
    assert document["kv_bytes_per_token"] == 2 * 32 * 8 * 128 * 2
    load = document["load"]
    assert load["tokens_per_s"] == pytest.approx(32 / load["time_per_token_s"])
    assert load["ttft_s"] > load["step_s"] > 0
    speeds = [one["tokens_per_s"] for one in document["curve"]]
    assert speeds == sorted(speeds)
    assert [one["concurrency"] for one in document["curve"]] == sorted(
        {one["concurrency"] for one in document["curve"]}
    )
    assert all(one["fits"] for one in document["curve"])
    hourly = 8 * document["usd_per_chip_hour"]
    assert load["usd_per_million_tokens"] == pytest.approx(hourly / 3600 / load["tokens_per_s"] * 1e6)


def test_narrow_caches_hold_more(gcompute: Command):
    most = {
        kv: sound(gcompute(*PLAN, "--mesh", "tensor=8", "--kv", kv, "--json"))["most_concurrency"]
        for kv in ("float32", "bfloat16", "int8")
    }
    assert 1.8 < most["bfloat16"] / most["float32"] < 2.2
    assert 1.8 < most["int8"] / most["bfloat16"] < 2.2


def test_the_table(gcompute: Command):
    shown = gcompute(*PLAN, "--mesh", "tensor=8", "--concurrency", "32", "--usd-per-hour", "2", "--slo-tpot", "0.02")
    assert (shown.status, shown.err) == (0, "")
    for words in (
        "llama3-8b on v5e:2x4 (8 devices), mesh tensor=8",
        "memory of one device",
        "Error of such predictions: median",
        "time to first token",
        "a million tokens",
        "throughput against latency (predicted)",
        "within the limits: ",
        "why: A decode step waits for ",
    ):
        assert words in shown.out, words
    assert "nan" not in shown.out


def test_limits(gcompute: Command):
    kept = sound(gcompute(*PLAN, "--slo-ttft", "0.5", "--slo-tpot", "0.03", "--json"))
    best = kept["best_within_slo"]
    assert best["ttft_s"] <= 0.5
    assert best["time_per_token_s"] <= 0.03
    for one in kept["curve"]:
        if one["ttft_s"] <= 0.5 and one["time_per_token_s"] <= 0.03:
            assert one["tokens_per_s"] <= best["tokens_per_s"]
    none = sound(gcompute(*PLAN, "--slo-tpot", "1e-9", "--json"), status=1)
    assert none["best_within_slo"] is None
    assert "no load keeps the limits" in gcompute(*PLAN, "--slo-tpot", "1e-9").out


def test_what_does_not_fit(gcompute: Command):
    document = sound(gcompute("plan", "serve", "llama3-405b", "--on", "v5e:1x1", "--json"), status=1)
    assert not document["memory"]["fits"]
    assert (document["most_concurrency"], document["curve"]) == (0, [])
    shown = gcompute("plan", "serve", "llama3-405b", "--on", "v5e:1x1")
    assert shown.status == 1
    assert "does not fit" in shown.out
    many = sound(gcompute(*PLAN, "--mesh", "tensor=8", "--concurrency", "1000000", "--json"), status=1)
    assert not many["memory"]["fits"]
    assert many["most_concurrency"] < 1000000


@pytest.mark.oldest("v7x:2x2x1")
@pytest.mark.parametrize(
    "target",
    ["v5e:1x1", "v5e:4x4", "v5p:2x2x1", "v7x:2x2x1", "v3:2x2", "h100:8", "gb200:72", "mi300x:8", "t4:1", "l4:8"],
)
def test_every_kind_of_chip(gcompute: Command, target: str):
    document = sound(gcompute("plan", "serve", "gpt2", "--on", target, "--prompt", "512", "--json"))
    assert document["memory"]["fits"]
    assert document["load"]["concurrency"] <= document["most_concurrency"]


@pytest.mark.parametrize("fields", [MISTRAL, LATENT], ids=["windows", "latent"])
def test_a_hugging_face_file(gcompute: Command, tmp_path: Path, fields: dict):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    document = sound(gcompute("plan", "serve", path, "--on", "v5e:2x2", "--prompt", "2000", "--json"))
    assert document["memory"]["fits"]
    values = 2 * 4 * 64 * 8 if fields is MISTRAL else (256 + 32) * 6
    assert document["kv_bytes_per_token"] == 2 * values
    error = one_line(gcompute("plan", "serve", path, "--on", "v5e:2x2", "--prove"))
    assert "not a model of the trainer" in error


def test_this_machine(gcompute: Command):
    ended = gcompute("plan", "serve", "demo", "--on", "this", "--prompt", "16", "--output", "16", "--json")
    assert ended.status == 0, ended.err
    document = json.loads(ended.out)
    assert document["mesh"] == "data=1"
    assert document["usd_per_chip_hour"] is None
    assert document["load"]["tokens_per_s"] > 0


@pytest.mark.oldest(".png-\\x89PNG")
@pytest.mark.parametrize(("suffix", "starts"), [(".png", b"\x89PNG"), (".html", b"<!doctype html>")])
def test_pictures(gcompute: Command, tmp_path: Path, suffix: str, starts: bytes):
    path = tmp_path / f"curve{suffix}"
    shown = gcompute(*PLAN, "--mesh", "tensor=8", "--plot", path)
    assert shown.status == 0
    assert f"drawn to {path}" in shown.out.replace("\n", "")
    assert path.read_bytes().startswith(starts)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan", "serve", "llama3-8c", "--on", "v5e:4x4"), "Did you mean 'llama3-8b'"),
        (("plan", "serve", "llama3-8b", "--on", "v5f:4x4"), "Did you mean 'v5p'"),
        (("plan", "serve", "llama3-8b", "--on", "v5e:3x4"), "Nearest: v5e:2x4, v5e:4x4"),
        (("plan", "serve", "llama3-8b", "--on", "cpu:8"), "no figures"),
        (("plan", "serve", "llama3-8b"), "--on"),
        ((*PLAN, "--mesh", "tensor=4"), "mesh tensor=4 is of 4 devices and v5e:2x4 has 8"),
        ((*PLAN, "--mesh", "tensor=3"), "does not divide heads=32"),
        ((*PLAN, "--mesh", "stage=8"), "does not serve"),
        ((*PLAN, "--mesh", "context=8"), "does not serve"),
        ((*PLAN, "--mesh", "expert=8"), "needs a model with experts"),
        ((*PLAN, "--mesh", "tenser=8"), "Did you mean 'tensor'"),
        ((*PLAN, "--prompt", "99999999999"), "longer than the context of llama3-8b, 8192"),
        ((*PLAN, "--prompt", "0"), "--prompt"),
        ((*PLAN, "--output", "-1"), "--output"),
        ((*PLAN, "--concurrency", "0"), "--concurrency"),
        ((*PLAN, "--context", "100"), "Use a larger --context"),
        ((*PLAN, "--context", "0"), "--context"),
        ((*PLAN, "--weights", "int4"), "'int4' is not one of"),
        ((*PLAN, "--kv", "fp8"), "'fp8' is not one of"),
        ((*PLAN, "--slo-ttft", "nan"), "--slo-ttft nan must be a number above 0"),
        ((*PLAN, "--slo-tpot", "-1"), "--slo-tpot -1 must be"),
        ((*PLAN, "--slo-tpot", "inf"), "--slo-tpot inf must be"),
        ((*PLAN, "--usd-per-hour", "0"), "--usd-per-hour 0 must be"),
        ((*PLAN, "--usd-per-hour", "700"), "--usd-per-hour"),
        ((*PLAN, "--usd-per-hour", "nan"), "--usd-per-hour nan must be"),
        ((*PLAN, "--plot", "curve.pdf"), "must end in .png or .html"),
        ((*PLAN, "--plot", "nowhere/curve.png"), "there is no directory"),
        ((*PLAN, "--chips", "nowhere.toml"), "cannot be read"),
        ((*PLAN, "--prove", "--weights", "int8"), "--weights bfloat16"),
        (("plan", "serve", "llama3-405b", "--on", "v5e:1x1", "--plot", "curve.png"), "nothing to draw"),
        (
            ("plan", "serve", "demo", "--on", "v2:2x2", "--prompt", "9", "--output", "9", "--prove"),
            "no compiler for v2",
        ),
    ],
)
def test_bad_input(gcompute: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple, said: str):
    monkeypatch.chdir(tmp_path)
    assert said in one_line(gcompute(*arguments))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "figure",
    [
        '{ value = 700.0, unit = "USD/h", source = "list" }',
        '{ value = -1, unit = "USD/h", source = "none" }',
        '{ value = 1.2, unit = "USD/month", source = "list" }',
    ],
)
def test_bad_price_files(gcompute: Command, tmp_path: Path, figure: str):
    prices = tmp_path / "prices.toml"
    prices.write_text(f"[chips.v5e]\nusd_per_hour = {figure}")
    assert "v5e" in one_line(gcompute(*PLAN, "--chips", prices))


@pytest.mark.oldest
def test_proving_needs_the_compiler(gcompute: Command, monkeypatch: pytest.MonkeyPatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else find_spec(name, *rest)
    )
    error = one_line(gcompute(*PLAN, "--mesh", "tensor=8", "--concurrency", "4", "--prove"))
    assert "pip install gcompute[tpu-aot]" in error
    assert not re.search(r"\s{2}", error)


def test_one_verdict_where_memory_is_all_but_full(gcompute: Command):
    # 173 requests need less than all of an h100's memory and more than what is kept free of it.
    asked = ("plan", "serve", "llama3-8b", "--on", "h100:1", "--concurrency", "173", "--json")
    document = sound(gcompute(*asked), status=1)
    memory = document["memory"]
    assert memory["total_bytes"] < memory["available_bytes"]
    assert (memory["fits"], memory["verdict"]) == (False, "does not fit")
    assert document["most_concurrency"] < 173


@pytest.mark.parametrize(("chip", "kind"), [("h100:1", "GPU"), ("v5e:1x1", "TPU")])
def test_the_error_where_no_fit_looked_is_said(gcompute: Command, chip: str, kind: str):
    asked = ("plan", "serve", "qwen3-0.6b", "--on", chip, "--concurrency", "8")
    recorded = json.loads(RECORD.read_text())["unseen"][f"serving, {kind}"]
    unseen = sound(gcompute(*asked, "--json"))["time_accuracy"]["unseen"]
    assert unseen == recorded
    said = f"median {recorded['median']:.0%}, worst {recorded['worst']:.0%} of {recorded['num']} published"
    assert said in " ".join(gcompute(*asked).out.split())
