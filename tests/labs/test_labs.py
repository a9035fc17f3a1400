"""The labs run from top to bottom, their notebooks are current, and their exercises tell right from wrong."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gcompute.lab.record import Record

LABS = Path(__file__).resolve().parents[2] / "labs"
FOLDERS = sorted(path.parent for path in LABS.glob("*/lab.py"))
PNG = b"\x89PNG\r\n\x1a\n"


def run(script, *arguments, out, cwd=None):
    """Run a script as a learner would: none of the settings that only tests have."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    }
    environment |= {"GCOMPUTE_LAB_OUT": str(out), "MPLBACKEND": "Agg", "PYTHONPATH": str(LABS.parent)}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, env=environment, cwd=cwd or out, capture_output=True, text=True, timeout=900)


def results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def only(rows, what):
    return [row for row in rows if row["what"] == what]


def check_of(folder):
    spec = importlib.util.spec_from_file_location(f"check_{folder.name}", folder / "check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# Notebooks ------------------------------------------------------------------------------------------------------------


def test_notebooks_are_what_build_makes(tmp_path):
    done = run(LABS / "build.py", "--check", out=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_stale_or_missing_notebook_is_found_and_mended(tmp_path):
    shutil.copytree(LABS, tmp_path / "labs")
    folder = tmp_path / "labs" / FOLDERS[0].name
    script, notebook = folder / "lab.py", folder / "lab.ipynb"
    script.write_text(script.read_text() + "\n# %%\nprint(1)\n")
    done = run(tmp_path / "labs" / "build.py", "--check", out=tmp_path)
    assert done.returncode == 1
    assert str(notebook) in done.stderr
    assert str(FOLDERS[1].name) not in done.stderr
    notebook.unlink()
    assert run(tmp_path / "labs" / "build.py", "--check", out=tmp_path).returncode == 1
    assert run(tmp_path / "labs" / "build.py", out=tmp_path).returncode == 0
    first = notebook.read_text()
    assert "print(1)" in first
    notebook.unlink()
    run(tmp_path / "labs" / "build.py", out=tmp_path)
    assert notebook.read_text() == first


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_notebook_is_small_and_has_no_outputs(folder):
    path = folder / "lab.ipynb"
    assert path.stat().st_size < 300_000
    cells = json.loads(path.read_text())["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert "colab_setup.py" in "".join(code[0]["source"])
    # A notebook runs what the script runs: no comment has become a command, and no line is lost.
    statements = [statement for cell in code for statement in ast.parse("".join(cell["source"])).body]
    assert list(map(ast.dump, statements)) == list(map(ast.dump, ast.parse((folder / "lab.py").read_text()).body))


# Exercises ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_solution_passes_and_the_unsolved_exercise_says_that_it_is_meant_to_fail(folder, tmp_path):
    solved = run(folder / "solution.py", out=tmp_path)
    assert (solved.returncode, solved.stderr) == (0, "")
    assert solved.stdout.startswith("Right")
    unsolved = run(folder / "exercise.py", out=tmp_path)
    assert (unsolved.returncode, unsolved.stderr) == (1, "")
    assert "meant to fail until" in unsolved.stdout


def total(losses, gradients):
    return sum(losses), sum(gradients)


def weighted(losses, gradients, num_tokens):
    sums = [sum(n * one for n, one in zip(num_tokens, values, strict=True)) for values in (losses, gradients)]
    return sums[0], sums[1]


def by_tokens(losses, gradients, num_tokens):
    return tuple(value / sum(num_tokens) for value in weighted(losses, gradients, num_tokens))


@pytest.mark.parametrize(
    ("combine", "hint"),
    [
        (lambda ls, gs, ns: (np.mean(ls), np.mean(gs, axis=0)), "counts each piece alike"),
        (lambda ls, gs, ns: total(ls, gs), "grows with the number of pieces"),
        (weighted, "divide by how many"),
        (lambda ls, gs, ns: tuple(v / len(ns) for v in weighted(ls, gs, ns)), "not of pieces"),
        (lambda ls, gs, ns: (by_tokens(ls, gs, ns)[0], np.mean(gs, axis=0)), "gradient is not"),
        (lambda ls, gs, ns: (np.mean(ls), by_tokens(ls, gs, ns)[1]), "loss is not"),
        (lambda ls, gs, ns: (np.array(ls), by_tokens(ls, gs, ns)[1]), "must be one number"),
        (lambda ls, gs, ns: (by_tokens(ls, gs, ns)[0], np.array(gs)), "must have the shape"),
        (lambda ls, gs, ns: by_tokens(ls, gs, ns)[0], "two things"),
        (lambda ls, gs, ns: ("loss", None), "must be a number"),
        (lambda ls, gs, ns: ls[9], "stopped with IndexError"),
    ],
)
def test_exercise_04_names_the_mistake(combine, hint):
    assert hint in check_of(LABS / "04_training").check(combine)


def fit(config, *, num_params, memory_bytes, context, weight_bytes, cache_bytes, values=None, left=None):
    values = values or 2 * config.layers * config.num_kv_heads * config.head_size
    left = memory_bytes - num_params * weight_bytes if left is None else left
    return left / (values * context * cache_bytes)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda c, **k: fit(c, **k, values=c.layers * c.num_kv_heads * c.head_size) // 1, "a key and a value"),
        (lambda c, **k: int(fit(c, **k, values=2 * c.num_kv_heads * c.head_size)), "Every layer"),
        (lambda c, **k: int(fit(c, **k, values=2 * c.layers * c.heads * c.head_size)), "not config.heads"),
        (lambda c, **k: int(fit(c, **k, values=2 * c.layers * c.dim)), "not dim"),
        (lambda c, **k: int(fit(c, **k, left=k["memory_bytes"])), "weights take their share"),
        (lambda c, **k: int(fit(c, **{**k, "context": 1})), "multiply by context"),
        (lambda c, **k: int(fit(c, **{**k, "weight_bytes": k["cache_bytes"]})), "use both sizes"),
        (lambda c, **k: int(fit(c, **k)) + 1, "round down"),
        (lambda c, **k: fit(c, **k), "round 55"),
        (lambda c, **k: int(fit(c, **k) // 1), "requests cannot be"),
        (lambda c, **k: max(0.0, fit(c, **k) // 1), "but for its type"),
        (lambda c, **k: [1], "one whole number"),
        (lambda c, **k: c.no_such_field, "stopped with AttributeError"),
    ],
)
def test_exercise_05_names_the_mistake(answer, hint):
    assert hint in check_of(LABS / "05_inference").check(answer)


# The record of a lab --------------------------------------------------------------------------------------------------


@pytest.mark.oldest
def test_record_keeps_the_prediction_that_was_committed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GCOMPUTE_LAB_OUT", str(tmp_path))
    record = Record("lab")
    mine = 12.0
    record.predict(memory_mib=mine, step_ms=np.ones(3), ratio="fast")
    record.compare("memory_mib", planned=170, measured=140, mistakes={"the activations are missing": 12.8})
    record.compare("step_ms", planned=1, measured=2, mistakes={"half": 0.5})
    assert "the activations are missing" in capsys.readouterr().out
    compared = only(results(tmp_path / "lab"), "compared")
    assert [row["yours"] for row in compared] == [12.0, None]
    assert [row["mistake"] for row in compared] == ["the activations are missing", None]


def test_record_empties_only_what_a_lab_made(tmp_path, monkeypatch):
    monkeypatch.setenv("GCOMPUTE_LAB_OUT", str(tmp_path))
    record = Record("lab")
    record.note("first")
    assert Record("lab").directory == record.directory
    assert results(tmp_path / "lab") == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="no lab made"):
        Record("mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


# From top to bottom ---------------------------------------------------------------------------------------------------


def assert_picture(path):
    assert path.read_bytes().startswith(PNG)
    assert path.stat().st_size > 5000


def assert_inference_claims(folder):
    rows = results(folder)
    for name in ("batching.png", "stream.png"):
        assert_picture(folder / name)
    step_s = {row["model"]: row["step_s"] for row in only(rows, "measured")}
    assert 8 * step_s["large"][0] > 1.2 * step_s["large"][-1]  # 8 together make more tokens a second than one alone
    (read,) = only(rows, "read and written")
    assert read["num_prompt"] == 64
    assert read["written_s"] > 3 * read["read_s"]
    (cache,) = only(rows, "cache")
    assert cache["planned_bytes"] == cache["array_bytes"]
    (streamed,) = only(rows, "streamed")
    assert len(streamed["arrivals"]) > 3
    assert streamed["arrivals"][-1][1] > 30


@pytest.mark.slow
def test_labs_run_from_top_to_bottom(tmp_path):
    script = (LABS / "04_training" / "lab.py").read_text()
    for unset, learner in (("my_memory_mib = None", "12.8"), ("my_step_ms = None", "['soon']")):
        assert unset in script
        script = script.replace(unset, f"{unset.removesuffix('None')}{learner}")
    (tmp_path / "lab.py").write_text(script)
    done = run(tmp_path / "lab.py", out=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the activations are missing" in done.stdout
    folder = tmp_path / "04_training"
    for name in ("memory.png", "loss.png"):
        assert_picture(folder / name)
    rows = results(folder)
    planned, measured = only(rows, "planned"), only(rows, "measured")
    for row in measured[1:]:
        np.testing.assert_allclose(
            row["losses"], measured[0]["losses"], rtol=1e-4
        )  # sums of bfloat16 products, reordered
    memory = [row["memory_bytes"] for row in measured]
    assert memory == sorted(memory, reverse=True)
    for plan, seen in zip(planned, measured, strict=True):
        assert 0.6 < plan["memory"]["total_bytes"] / seen["memory_bytes"] < 1.7
    assert planned[0]["memory"]["activations_bytes"] > 0.8 * planned[0]["memory"]["total_bytes"]
    (trained,) = only(rows, "trained")
    assert trained["val_loss"] < trained["baselines"]["bigram"] - 0.3
    assert trained["baselines"]["bigram"] < trained["baselines"]["unigram"]

    done = run(LABS / "05_inference" / "lab.py", out=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Training for a few seconds" not in done.stdout
    assert_inference_claims(tmp_path / "05_inference")


@pytest.mark.slow
def test_lab_05_trains_its_own_model_where_lab_04_has_not_run(tmp_path):
    done = run(LABS / "05_inference" / "lab.py", out=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Training for a few seconds" in done.stdout
    assert_inference_claims(tmp_path / "05_inference")


@pytest.mark.slow
def test_pictures_appear_in_a_notebook(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("GCOMPUTE_LAB_OUT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(LABS.parent), prepend=os.pathsep)
    source = """
from matplotlib.figure import Figure
from gcompute.lab.record import Record
figure = Figure()
figure.subplots().plot([1, 2])
Record("lab").show(figure, "line.png")
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    assert any("image/png" in output.get("data", {}) for output in notebook.cells[0].outputs)
