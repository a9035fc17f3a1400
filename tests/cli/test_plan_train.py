"""gcompute plan train: what it prints, its pictures and exit status, and every bad input in one line."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Command
from plan_answers import one_line, sound

DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "n_shared_experts": 1,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 2,
    "q_lora_rank": 512,
    "kv_lora_rank": 256,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
PLAN = ("plan", "train", "llama3-8b", "--on", "v5e:4x4")
CHUNKED = ("--pipeline-schedule", "interleaved", "--pipeline-chunks", "2")
MESH = (*PLAN, "--mesh", "fsdp=16", "--seq", "2048")


def test_json_of_a_given_mesh(gcompute: Command):
    document = sound(gcompute(*MESH, "--batch", "16", "--remat", "full", "--json"))
    assert document["mesh"] == "fsdp=16"
    assert (document["batch"], document["seq"], document["remat"]) == (16, 2048, "full")
    memory, time = document["memory"], document["time"]
    assert memory["verdict"] == "fits"
    assert memory["left_bytes"] == pytest.approx(memory["available_bytes"] - memory["total_bytes"])
    assert document["largest"]["batch"] >= 16
    assert document["largest"]["seq"] >= 2048
    assert time["tokens_per_s"] == pytest.approx(16 * 2048 / time["step_s"])
    assert 0 < time["mfu"] < 1
    assert document["proof"] is None
    assert "search" not in document
    assert sum(one["seconds"] for one in document["operations"]) < time["step_s"]
    cost = document["cost"]
    assert cost["tokens"] == 20 * document["params"]["total"]
    assert cost["usd"] == pytest.approx(cost["days"] * 24 * 16 * cost["usd_per_chip_hour"])
    assert cost["usd_per_million_tokens"] == pytest.approx(cost["usd"] / cost["tokens"] * 1e6)


def test_what_surely_fits_does_fit(gcompute: Command):
    for arguments in (MESH, ("plan", "train", "gpt2-xl", "--on", "v5e:2x2", "--mesh", "fsdp=4", "--seq", "1000")):
        document = sound(gcompute(*arguments, "--remat", "full", "--json"))
        batch = document["largest"]["batch"]
        assert batch > document["batch"]
        again = sound(gcompute(*arguments, "--remat", "full", "--batch", str(batch), "--json"))
        assert again["memory"]["verdict"] == "fits"
        assert again["largest"]["batch"] == batch


def test_the_table(gcompute: Command):
    shown = gcompute(*MESH, "--batch", "16", "--tokens", "1e12", "--usd-per-hour", "2")
    assert (shown.status, shown.err) == (0, "")
    for words in (
        "llama3-8b (8.03 G parameters): one train step on v5e:4x4 (16 devices), mesh fsdp=16, batch 16 x 2,048",
        "memory of one device (predicted)",
        "parameters, float32",
        "fits. Error of such predictions: median",
        "the most that surely fits: batch ",
        "time of one step (predicted)",
        "bound by",
        "communication of one step, a device (predicted)",
        "reduce-scatter",
        "operations of one step",
        "1 T tokens: ",
        "$2.00 a chip-hour (given).",
        "why: A step is ",
    ):
        assert words in shown.out, words
    assert "nan" not in shown.out
    assert "(found by search)" not in shown.out


def test_what_does_not_fit_says_what_lacks(gcompute: Command):
    document = sound(gcompute(*PLAN[:4], "v5e:1x1", "--json"), status=1)
    assert document["memory"]["verdict"] == "does not fit"
    assert document["memory"]["left_bytes"] < 0
    assert document["largest"] == {"batch": 0, "seq": 0}
    shown = gcompute(*PLAN[:4], "v5e:1x1")
    assert shown.status == 1
    assert "does not fit." in shown.out
    assert "lacking" in shown.out
    assert "the most that surely fits: nothing, on this mesh" in shown.out
    assert not re.search(r"-\d+\.\d+ [GM]iB", shown.out)
    assert "makes it fit" in shown.out


def test_search(gcompute: Command):
    document = sound(gcompute(*PLAN, "--search", "--top", "3", "--json"))
    assert len(document["search"]) == 3
    best = document["search"][0]
    assert {name: document[name] for name in ("mesh", "batch", "remat")} == {
        name: best[name] for name in ("mesh", "batch", "remat")
    }  # fmt: skip
    assert best["step_s"] == document["time"]["step_s"]
    speeds = [one["tokens_per_s"] for one in document["search"] if one["verdict"] == "fits"]
    assert speeds == sorted(speeds, reverse=True)
    shown = gcompute(*PLAN, "--search", "--top", "3")
    assert shown.status == 0
    assert re.search(r"llama3-8b on v5e:4x4: [\d,]+ ways fit; the best 3 \(predicted", shown.out)
    assert "(found by search)" in shown.out
    by_cost = sound(gcompute(*PLAN, "--search", "--by", "cost", "--json"))
    assert by_cost["memory"]["verdict"] in ("fits", "too close to call")


def test_no_remat_given_takes_the_least_that_fits(gcompute: Command):
    small = sound(gcompute("plan", "train", "demo", "--on", "v5e:2x2", "--mesh", "fsdp=4", "--json"))
    assert small["remat"] == "none"
    large = sound(gcompute(*PLAN, "--mesh", "fsdp=16", "--batch", "16", "--json"))
    assert large["remat"] == "full"


@pytest.mark.parametrize(
    "target",
    [
        *("v5e:1x1", "v5p:16x20x28", "2*v5e:16x16", "2*v5e:2x2", "v7x:4x4x4", "2*v7x:2x2x1", "v3:2x2", "v2:2x2"),
        *("h100:8", "h100:64", "gb200:72", "mi300x:8", "t4:1", "l4:8", "v6e:16x16"),
    ],
)
def test_every_kind_of_chip(gcompute: Command, target: str):
    document = sound(gcompute("plan", "train", "gpt2", "--on", target, "--json"))
    assert document["memory"]["verdict"] == "fits"
    assert 0 < document["time"]["mfu"] < 1
    assert all(one["hidden_s"] <= one["seconds"] for one in document["communication"])
    assert all(int(share) <= 100 for share in re.findall(r"(?<![+\d])(\d+)%", document["why"].split("What would")[0]))


@pytest.mark.parametrize("flags", [("--seq", "1", "--batch", "1"), ("--seq", "7"), ("--seq", "100", "--batch", "64")])
def test_odd_sizes(gcompute: Command, flags: tuple[str, ...]):
    document = sound(gcompute("plan", "train", "demo", "--on", "v5e:2x2", *flags, "--json"))
    assert document["largest"]["batch"] >= document["batch"]
    assert document["largest"]["seq"] >= document["seq"]


@pytest.mark.parametrize(
    ("preset", "mesh", "flags"),
    [
        ("test-moe", "expert=4", ()),
        ("demo", "stage=4", ("--accumulation", "8", "--pipeline-schedule", "zero-bubble")),
        (
            "demo",
            "stage=2,data=2",
            ("--pipeline-schedule", "interleaved", "--pipeline-chunks", "2", "--accumulation", "4"),
        ),
        ("demo", "context=2,tensor=2", ("--no-sequence-parallel",)),
        ("demo", "data=4", ("--zero", "2", "--optimizer", "muon")),
    ],
)
def test_every_axis(gcompute: Command, preset: str, mesh: str, flags: tuple[str, ...]):
    document = sound(gcompute("plan", "train", preset, "--on", "v5p:2x2x1", "--mesh", mesh, *flags, "--json"))
    assert document["communication"]


def test_pipelines_in_chunks_are_searched(gcompute: Command):
    assert "stage=" in sound(gcompute("plan", "train", "demo", "--on", "v5e:2x2", *CHUNKED, "--json"))["mesh"]


def test_a_hugging_face_file(gcompute: Command, tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**DEEPSEEK, "surprise": 1}))
    document = sound(gcompute("plan", "train", path, "--on", "v5p:2x2x2", "--json"))
    assert document["unknown_fields"] == ["surprise"]
    assert document["memory"]["verdict"] == "fits"
    assert "field 'surprise' is not known" in gcompute("plan", "train", path, "--on", "v5p:2x2x2").out
    assert sound(gcompute("plan", "train", tmp_path, "--on", "h100:8", "--json"))["mesh"]
    assert "not a model of the trainer" in one_line(gcompute("plan", "train", path, "--on", "v5p:2x2x2", "--prove"))


@pytest.mark.oldest
def test_this_machine(gcompute: Command):
    ended = gcompute("plan", "train", "demo", "--on", "this", "--batch", "4", "--json")
    assert ended.status == 0, ended.err
    document = json.loads(ended.out)
    assert (document["target"], document["mesh"]) == ("this:1", "data=1")
    assert document["time"]["accuracy"] is None
    assert 0 < document["time"]["tokens_per_s"] < math.inf
    assert "usd_per_hour" in document["cost"]
    assert document["cost"]["usd"] is None
    assert "joined was not measured" in gcompute("plan", "train", "demo", "--on", "this:4").error
    assert "not understood" in gcompute("plan", "train", "demo", "--on", "this:0").error


@pytest.mark.oldest(".html-<!doctype html>")
@pytest.mark.parametrize(("suffix", "starts"), [(".png", b"\x89PNG"), (".html", b"<!doctype html>")])
def test_pictures(gcompute: Command, tmp_path: Path, suffix: str, starts: bytes):
    path = tmp_path / f"roofline{suffix}"
    shown = gcompute(*MESH, "--plot", path)
    assert shown.status == 0
    assert f"drawn to {path}" in shown.out.replace("\n", "")
    assert path.read_bytes().startswith(starts)


def test_no_price(gcompute: Command):
    document = sound(gcompute("plan", "train", "gpt2", "--on", "mi300x:8", "--json"))
    assert document["cost"]["usd"] is document["cost"]["usd_per_chip_hour"] is None
    assert "no price in the catalogue" in gcompute("plan", "train", "gpt2", "--on", "mi300x:8").out
    spot = sound(gcompute(*MESH, "--spot", "--json"))
    assert "spot" in spot["cost"]["price_source"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan", "train", "llama3-8c", "--on", "v5e:4x4"), "Did you mean 'llama3-8b'"),
        (("plan", "train", "llama3-8b", "--on", "v5f:4x4"), "Did you mean 'v5p'"),
        (("plan", "train", "llama3-8b", "--on", "v5e:3x4"), "Nearest: v5e:2x4, v5e:4x4"),
        (("plan", "train", "llama3-8b", "--on", "v5e:64x64"), "is not a slice that exists"),
        (("plan", "train", "llama3-8b", "--on", "h100:12"), "not whole hosts of 8"),
        (("plan", "train", "llama3-8b", "--on", "cpu:8"), "no figures"),
        (("plan", "train", "llama3-8b", "--on", ""), "not understood"),
        (("plan", "train", "llama3-8b"), "--on"),
        (("plan", "train"), "MODEL"),
        (("plan", "trian"), "Did you mean 'train'"),
        ((*PLAN, "--mesh", "fsdp=8"), "mesh fsdp=8 is of 8 devices and v5e:4x4 has 16"),
        ((*PLAN, "--mesh", "fsdp=99999999999999999999"), "devices and v5e:4x4 has 16"),
        ((*PLAN, "--mesh", ""), "mesh data=1 is of 1 devices"),
        ((*PLAN, "--mesh", "fdsp=16"), "Did you mean 'fsdp'"),
        ((*PLAN, "--mesh", "fsdp=-16"), "whole number above 0"),
        ((*PLAN, "--mesh", "fsdp=4,fsdp=4"), "given twice"),
        ((*PLAN, "--mesh", "tensor=16"), "does not divide kv_heads=8"),
        ((*PLAN, "--mesh", "expert=16"), "needs a model with experts"),
        ((*PLAN, "--mesh", "stage=16", "--accumulation", "4"), "accumulation=16 or more"),
        ((*PLAN, "--mesh", "fsdp=16", "--batch", "24"), "use a multiple of 16"),
        ((*PLAN, "--batch", "0"), "--batch"),
        ((*PLAN, "--batch", "two"), "--batch"),
        ((*PLAN, "--batch", "99999999999"), "tokens a step"),
        ((*PLAN, "--seq", "-1"), "--seq"),
        ((*PLAN, "--seq", "99999999999"), "tokens a step"),
        ((*PLAN, "--accumulation", "0"), "--accumulation"),
        ((*PLAN, "--top", "0"), "--top"),
        ((*PLAN, "--zero", "3"), "zero must be 0, 1 or 2"),
        ((*PLAN, "--remat", "some"), "--remat"),
        ((*PLAN, "--precision", "float32"), "v5e has no peak for float32"),
        ((*PLAN, "--pipeline-schedule", "interleaved"), "do not go together"),
        ((*PLAN, "--tokens", "nan"), "--tokens nan must be a number above 0"),
        ((*PLAN, "--tokens", "-5"), "--tokens -5 must be"),
        ((*PLAN, "--tokens", "0"), "--tokens 0 must be"),
        ((*PLAN, "--tokens", "inf"), "--tokens inf must be"),
        ((*PLAN, "--usd-per-hour", "0"), "--usd-per-hour 0 must be"),
        ((*PLAN, "--usd-per-hour", "-2"), "--usd-per-hour -2 must be"),
        ((*PLAN, "--usd-per-hour", "nan"), "--usd-per-hour nan must be"),
        ((*PLAN, "--usd-per-hour", "700"), "--usd-per-hour"),
        ((*PLAN, "--search", "--mesh", "fsdp=16"), "--search chooses the mesh"),
        ((*PLAN, "--calibrate"), "use it with --on this"),
        ((*PLAN, "--plot", "roofline.pdf"), "must end in .png or .html"),
        ((*PLAN, "--plot", "nowhere/roofline.png"), "there is no directory"),
        ((*PLAN, "--chips", "nowhere.toml"), "cannot be read"),
        (("plan", "train", "demo", "--on", "mi300x:16"), "dcn_bytes_per_s is not in the catalogue"),
        (("plan", "train", "llama3-8b", "--on", "v2:2x2", "--prove"), "there is no compiler for v2"),
    ],
)
def test_bad_input(gcompute: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple, said: str):
    monkeypatch.chdir(tmp_path)
    assert said in one_line(gcompute(*arguments))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": None}, "hidden_size is absent"),
        ({"model_type": "deepseek"}, "Did you mean"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number"),
        ({"vocab_size": 1e9}, "vocab_size must be a whole number"),
        ({"vocab_size": 10**12}, "vocab_size must be a whole number"),
        ({"num_key_value_heads": 4}, "contradicts latent attention"),
        ({"num_experts_per_tok": 64}, "is more than n_routed_experts=32"),
        ({"first_k_dense_replace": 9}, "is more than num_hidden_layers=8"),
    ],
)
def test_bad_model_files(gcompute: Command, tmp_path: Path, changes: dict, said: str):
    path = tmp_path / "config.json"
    values = {name: value for name, value in {**DEEPSEEK, **changes}.items() if value is not None}
    path.write_text(json.dumps(values))
    assert said in one_line(gcompute("plan", "train", path, "--on", "v5p:2x2x2"))


@pytest.mark.parametrize("content", ["{", "[]", "null", "3", '{"model_type": 3}', '{"model": 3}'])
def test_files_that_are_no_model(gcompute: Command, tmp_path: Path, content: str):
    path = tmp_path / "config.json"
    path.write_text(content)
    assert str(path) in one_line(gcompute("plan", "train", path, "--on", "v5p:2x2x2"))


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        ('{ value = 700.0, unit = "USD/h", source = "list" }', "no price"),
        ('{ value = -1, unit = "USD/h", source = "none" }', "usd_per_hour"),
        ('{ value = 0.0, unit = "USD/h", source = "none" }', "usd_per_hour"),
        ('{ value = nan, unit = "USD/h", source = "list" }', "usd_per_hour"),
        ('{ value = 1.2, unit = "USD/month", source = "list" }', "USD/month"),
        ('{ value = 1.2, unit = "EUR/h", source = "list" }', "EUR/h"),
        ('{ value = "cheap", unit = "USD/h", source = "list" }', "usd_per_hour"),
        ("1.2", "usd_per_hour"),
    ],
)
def test_bad_price_files(gcompute: Command, tmp_path: Path, figure: str, said: str):
    prices = tmp_path / "prices.toml"
    prices.write_text(f"[chips.v5e]\nusd_per_hour = {figure}")
    assert said in one_line(gcompute(*MESH, "--chips", prices))


def test_a_price_file_of_ones_own(gcompute: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prices = tmp_path / "prices.toml"
    prices.write_text('[chips.v5e]\nusd_per_hour = { value = 0.5, unit = "USD/h", source = "our contract" }')
    for arguments in (("--chips", prices), ()):
        cost = sound(gcompute(*MESH, *arguments, "--json"))["cost"]
        assert (cost["usd_per_chip_hour"], "our contract" in cost["price_source"]) == (0.5, True)
        monkeypatch.setenv("GCOMPUTE_CHIPS", str(prices))


def test_proving_needs_the_compiler(gcompute: Command, monkeypatch: pytest.MonkeyPatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else find_spec(name, *rest)
    )
    assert "pip install gcompute[tpu-aot]" in one_line(gcompute(*MESH, "--prove"))


PROGRAM = """
import sys
{code}
loaded = sorted(name for name in sys.modules if name.split(".")[0] in ("jax", "jaxlib", "flax", "optax"))
assert not loaded, loaded
"""
RUN = """
from gcompute.cli.main import main
try:
    main([*"plan {command} --json".split()])
except SystemExit as ended:
    assert ended.code == 0, ended.code
"""


@pytest.mark.parametrize(
    "code",
    [
        "import gcompute.plan.search, gcompute.plan.serving, gcompute.plan.why, gcompute.cli.plan_train",
        RUN.format(command="train llama3-8b --on v5e:4x4 --batch 16"),
        RUN.format(command="serve llama3-8b --on v5e:2x2"),
    ],
    ids=["imports", "train", "serve"],
)
def test_no_jax_is_loaded(code: str):
    """In a process of its own: this one has JAX already."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(code=code)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.oldest
def test_several_targets_ranked_by_cost(gcompute: Command):
    asked = (
        "plan",
        "train",
        "llama3-8b",
        "--on",
        "v5e:4x4,v6e:2x4",
        "--seq",
        "4096",
        "--search",
        "--by",
        "cost",
        "--json",
    )
    document = json.loads(gcompute(*asked).out)
    sure = [one["usd_per_million_tokens"] for one in document["search"] if one["verdict"] == "fits"]
    assert sure == sorted(sure)
    assert document["target"] == document["search"][0]["target"]
    shown = gcompute(*asked[:-1], "--top", "4").out
    assert "v5e:4x4, v6e:2x4" in shown or "v6e:2x4, v5e:4x4" in shown


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--on", "v5e:4x4,v6e:2x4", "--mesh", "fsdp=16"), "--mesh is for one target and --on names 2"),
        (("--on", "v5e:4x4,v7x:2x2x1", "--by", "cost"), "--by cost: v7x:2x2x1 has no price"),
        (("--on", "v5e:4x4,v5e:3x3"), "v5e:3x3 is not a slice that exists"),
    ],
)
def test_several_targets_refused(gcompute: Command, flags: tuple[str, ...], said: str):
    ended = gcompute("plan", "train", "llama3-8b", *flags)
    assert ended.status == 2
    assert said in ended.err
    assert ended.err.count("\n") == 1
