import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest
from backend_logs import without_backend_logs

SCRIPT = Path(__file__).parents[2] / "tpu_scripts" / "colab_setup.py"
spec = importlib.util.spec_from_file_location("colab_setup", SCRIPT)
colab_setup = importlib.util.module_from_spec(spec)
sys.modules["colab_setup"] = colab_setup
spec.loader.exec_module(colab_setup)

JAX_ON_CPU = """
def default_backend(): return "cpu"
def local_device_count(): return 1
class Device: device_kind = "cpu"
def devices(): return [Device()]
"""
UPGRADING_BACKEND = """
import os, subprocess, sys, zipfile
def build_wheel(folder, config_settings=None, metadata_directory=None):
    # -I leaves pip's isolated build environment: the install lands in the environment itself.
    subprocess.run([sys.executable, "-I", "-m", "pip", "install", "--no-deps", "jax==9.0"], check=True)
    name = "upgrader-1.0-py3-none-any.whl"
    info = "upgrader-1.0.dist-info"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: upgrader\\nVersion: 1.0\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""


def write_wheel(folder: Path, name: str, version: str, *, requires: str = "", source: str = "") -> None:
    info = f"{name}-{version}.dist-info"
    requirement = f"Requires-Dist: {requires}\n" if requires else ""
    files = {
        f"{name}/__init__.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requirement}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


class Notebook:
    """An environment with jax 0.7.2, and a package index where a newer jax waits to be pulled in."""

    def __init__(self, root: Path) -> None:
        self.wheels = root / "wheels"
        self.wheels.mkdir()
        for version in ("0.7.2", "9.0"):
            write_wheel(self.wheels, "jax", version, source=JAX_ON_CPU)
        write_wheel(self.wheels, "numpy", "2.1.0")
        write_wheel(self.wheels, "layers", "1.0", requires="jax>=0.7")
        write_wheel(self.wheels, "layers", "2.0", requires="jax>=9")
        write_wheel(self.wheels, "app", "1.0", requires="layers")
        write_wheel(self.wheels, "demanding", "1.0", requires="jax>=9")
        upgrader = root / "a folder" / "upgrader"
        upgrader.mkdir(parents=True)
        (upgrader / "backend.py").write_text(UPGRADING_BACKEND)
        (upgrader / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
            '[project]\nname = "upgrader"\nversion = "1.0"\n'
        )
        self.upgrader = upgrader
        venv.create(root / "env", with_pip=True)
        self.python = root / "env" / "bin" / "python"
        self.pip("jax==0.7.2", "numpy==2.1.0")

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON", "JAX_"))}
        return kept | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CACHE_DIR": str(self.wheels)}

    def pip(self, *arguments: str) -> str:
        command = [str(self.python), "-m", "pip", "install", *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, env=self.environment(), timeout=120
        ).stdout

    def version(self, name: str) -> str:
        code = f"import importlib.metadata as m; print(m.version({name!r}))"
        return subprocess.run([self.python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()

    def setup(self, *arguments: str) -> tuple[int, dict, str]:
        command = [str(self.python), str(SCRIPT), "--json", *arguments]
        run = subprocess.run(command, capture_output=True, text=True, env=self.environment(), timeout=120)
        return run.returncode, json.loads(run.stdout), run.stderr


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Notebook:
    return Notebook(tmp_path_factory.mktemp("notebook"))


def test_install_keeps_the_jax_that_pip_alone_would_replace(notebook: Notebook):
    assert "jax-9.0" in notebook.pip("--dry-run", "app")
    status, report, _ = notebook.setup("app")
    assert (status, report["versions"]["ok"]) == (0, True)
    assert (notebook.version("jax"), notebook.version("app"), notebook.version("layers")) == ("0.7.2", "1.0", "1.0")
    assert report["frozen"] == {"jax": "0.7.2", "jaxlib": None, "libtpu": None, "numpy": "2.1.0"}
    assert not {"-U", "--upgrade", "jax[tpu]"} & set(report["command"])


def test_a_package_that_needs_another_jax_is_refused_and_nothing_changes(notebook: Notebook):
    status, report, log = notebook.setup("demanding")
    assert status == 1
    assert "pip failed" in report["versions"]["finding"]
    assert "unchanged" in report["versions"]["finding"]
    assert "ResolutionImpossible" in log
    assert notebook.version("jax") == "0.7.2"


def test_a_changed_jax_fails_loudly_and_the_printed_command_puts_it_back(notebook: Notebook):
    status, report, log = notebook.setup(str(notebook.upgrader))
    assert (status, notebook.version("jax")) == (1, "9.0")
    assert "jax 0.7.2 -> 9.0" in report["versions"]["finding"]
    assert "versions: FAILED" in log
    assert report["versions"]["repair"] in log
    subprocess.run(
        report["versions"]["repair"], shell=True, check=True, env=notebook.environment(), capture_output=True
    )
    assert notebook.version("jax") == "0.7.2"


def test_dry_run_installs_nothing(notebook: Notebook):
    before = sorted(path.name for path in (notebook.python.parents[1] / "lib").glob("*/site-packages/*.dist-info"))
    status, report, log = notebook.setup("--dry-run", "app[all]")
    after = sorted(path.name for path in (notebook.python.parents[1] / "lib").glob("*/site-packages/*.dist-info"))
    assert (status, before) == (0, after)
    assert shlex.join(report["command"]) in log
    assert report["probe"]["backend"] == "cpu"


def test_an_environment_without_jax_is_refused(tmp_path: Path):
    venv.create(tmp_path, with_pip=False)
    run = subprocess.run([tmp_path / "bin" / "python", SCRIPT], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "jax is not installed" in run.stdout
    assert "pip install jax" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["jax[tpu]"], "leaves jax, jaxlib, libtpu, numpy alone"),
        (["Numpy>=2"], "leaves jax, jaxlib, libtpu, numpy alone"),
        (["-U", "gcompute"], "unrecognized arguments: -U"),
        (["./nowhere[serve]"], "does not exist"),
        (["--timeout", "0"], "--timeout must be above 0"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(arguments: list[str], said: str):
    run = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", run.stderr)
    assert said in run.stderr


def test_a_copy_outside_a_checkout_asks_what_to_install(tmp_path: Path):
    copy = tmp_path / "scripts" / "colab_setup.py"
    copy.parent.mkdir()
    copy.write_text(SCRIPT.read_text())
    run = subprocess.run([sys.executable, copy], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (
        2,
        "error: this script stands alone: name what to install, as in: colab_setup.py gcompute\n",
    )


def test_requirements_by_address_and_with_extras_are_accepted(tmp_path: Path):
    colab_setup.check_requirements(
        ["gcompute[serve]", f"{tmp_path}[serve]", "git+https://example.org/x.git", "x @ https://example.org/x.whl"]
    )


def test_versions_that_appear_are_removed_and_those_that_vanish_come_back():
    before = {"jax": "0.7.2", "libtpu": None, "numpy": "2.1.0"}
    verdict = colab_setup.compare_versions(before, {"jax": "0.7.2", "libtpu": "0.0.42", "numpy": None})
    assert not verdict.ok
    assert "libtpu absent -> 0.0.42" in verdict.finding
    assert "numpy 2.1.0 -> absent" in verdict.finding
    assert "install --no-deps --force-reinstall numpy==2.1.0 &&" in verdict.repair
    assert "uninstall -y libtpu" in verdict.repair
    assert colab_setup.compare_versions(before, before).ok


def test_device_files_are_those_of_chips(tmp_path: Path):
    for name in ("accel0", "accel1", "vfio/0", "vfio/vfio", "accel/accel0", "null"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(Path(path).relative_to(tmp_path)) for path in colab_setup.tpu_device_files(tmp_path)]
    assert found == ["accel0", "accel1", "vfio/0"]


def probe(**fields):
    return colab_setup.Probe(**{"backend": "cpu", "num_devices": 1, "kind": "cpu", "libtpu_importable": True} | fields)


@pytest.mark.parametrize(
    ("seen", "files", "environment", "ok", "said"),
    [
        (probe(backend="tpu", num_devices=8, kind="TPU v5 lite"), ["/dev/vfio/0"], {}, True, "8 tpu device"),
        (probe(libtpu_importable=False), [], {}, True, "no TPU here"),
        (probe(), [], {}, True, "choose one as the runtime type"),
        (probe(), ["/dev/accel0"], {"JAX_PLATFORMS": "cpu"}, False, "%env JAX_PLATFORMS="),
        (
            probe(libtpu_importable=False, libtpu_wanted="libtpu==0.0.23"),
            ["/dev/accel0"],
            {},
            False,
            "install --no-deps 'libtpu==0.0.23'",
        ),
        (
            probe(error="W: one\nThe TPU is already in use by process with pid 7"),
            ["/dev/vfio/0", "/dev/vfio/1"],
            {"JAX_PLATFORMS": "tpu,cpu"},
            False,
            "pid 7",
        ),
        (probe(error="slow"), ["/dev/vfio/0", "/dev/vfio/1"], {}, False, "sudo lsof -w /dev/vfio/0 /dev/vfio/1"),
        (probe(backend=None, error="Traceback\nImportError: no"), [], {}, False, "ImportError: no"),
        (probe(backend=None, error="did not start"), ["/dev/accel0"], {}, False, "/tmp/libtpu_lockfile"),
    ],
)
def test_an_unused_tpu_is_found_and_the_repair_named(seen, files, environment, ok, said):
    verdict = colab_setup.judge_backend(seen, files, environment)
    assert (verdict.ok, bool(verdict.repair)) == (ok, not ok)
    assert said in f"{verdict.finding} | {verdict.repair}"


def test_probe_reads_the_backend_of_the_real_jax(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    seen = colab_setup.probe_backend(120)
    assert (seen.backend, without_backend_logs(seen.error)) == ("cpu", "")
    assert seen.libtpu_wanted.startswith("libtpu==")


def test_probe_gives_up_on_a_jax_that_hangs_and_reports_one_that_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "jax.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    hung = colab_setup.probe_backend(3)
    assert (hung.backend, hung.error) == (None, "jax did not start within 3 s")
    assert hung.libtpu_wanted.startswith("libtpu==")
    (tmp_path / "jax.py").write_text(textwrap.dedent("raise ImportError('numpy is too old')"))
    broken = colab_setup.probe_backend(120)
    assert broken.backend is None
    assert broken.error.endswith("ImportError: numpy is too old")
