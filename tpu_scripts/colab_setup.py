"""Install gcompute on Colab or Kaggle without touching the jax that is there, then check that a TPU is really used.

The notebook's jax, jaxlib, libtpu and numpy are built to fit one another and the machine. This script freezes their
versions into a pip constraints file, installs gcompute under it, reads the versions again, and fails if any changed.
It never asks for jax[tpu] and never upgrades. It needs only the standard library.

  python tpu_scripts/colab_setup.py                     # the checkout that holds this script
  python tpu_scripts/colab_setup.py 'gcompute[serve]'   # any pip requirement or path
  python tpu_scripts/colab_setup.py --dry-run --json    # say what would be done, as one JSON object

Exit status: 0 all is well; 1 something is wrong, and the repair was printed; 2 bad arguments.
"""

import argparse
import glob
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

FROZEN = ("jax", "jaxlib", "libtpu", "numpy")
CHECKOUT = Path(__file__).resolve().parents[1]
RESTART = "Colab: Runtime > Restart session; Kaggle: Run > Restart & clear cell outputs"

READ_VERSIONS = """
import importlib.metadata, json, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""
READ_BACKEND = """
import importlib.metadata, importlib.util, json, sys
print(json.dumps({
    "libtpu_importable": importlib.util.find_spec("libtpu") is not None,
    "libtpu_wanted": next((r.split(";")[0].strip() for r in importlib.metadata.requires("jax") or ()
                           if r.startswith("libtpu") and "tpu" in r.partition(";")[2]), "libtpu"),
}), flush=True)
import jax
backend = jax.default_backend()
print(json.dumps({"backend": backend, "num_devices": jax.local_device_count(), "kind": jax.devices()[0].device_kind}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a fresh process saw of jax; `backend` is None where it did not get that far."""

    backend: str | None = None
    num_devices: int = 0
    kind: str = ""
    libtpu_importable: bool = False
    libtpu_wanted: str = "libtpu"
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One finding; where something is wrong, the repair."""

    ok: bool
    finding: str
    repair: str = ""


def installed_versions() -> dict[str, str | None]:
    """Versions on disk, read by a fresh process: this one may have cached what it read before the install."""
    output = subprocess.run([sys.executable, "-c", READ_VERSIONS, *FROZEN], check=True, capture_output=True, text=True)
    return json.loads(output.stdout)


def constraint_lines(versions: Mapping[str, str | None]) -> str:
    return "".join(f"{name}=={version}\n" for name, version in versions.items() if version)


def install_command(requirements: list[str], constraints: str) -> list[str]:
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    return [*pip, "-c", constraints, *requirements]


def check_requirements(requirements: list[str]) -> None:
    """Raise ValueError for a requirement that would ask pip for one of the frozen packages, or for nothing."""
    for requirement in requirements:
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()
        if name in FROZEN or requirement.startswith("-"):
            raise ValueError(f"{requirement!r} is not installed by this script: it leaves {', '.join(FROZEN)} alone.")
        if "/" in requirement and "://" not in requirement and not Path(requirement.partition("[")[0]).exists():
            raise ValueError(f"{requirement!r} does not exist: give a checkout, a wheel, or a pip requirement.")


def compare_versions(before: Mapping[str, str | None], after: Mapping[str, str | None]) -> Verdict:
    """Whether the frozen packages are as they were; the repair puts back exactly what was there."""
    changed = {name: (old, after[name]) for name, old in before.items() if after[name] != old}
    if not changed:
        kept = ", ".join(f"{name} {version}" for name, version in after.items() if version)
        return Verdict(ok=True, finding=f"unchanged: {kept}")
    finding = ", ".join(f"{name} {old or 'absent'} -> {new or 'absent'}" for name, (old, new) in changed.items())
    pip = f"{shlex.quote(sys.executable)} -m pip"
    restore = [f"{name}=={old}" for name, (old, _) in changed.items() if old]
    remove = [name for name, (old, _) in changed.items() if not old]
    commands = [f"{pip} install --no-deps --force-reinstall {' '.join(restore)}"] if restore else []
    commands += [f"{pip} uninstall -y {' '.join(remove)}"] if remove else []
    return Verdict(ok=False, finding=f"the install changed {finding}", repair=f"{' && '.join(commands)}  # {RESTART}")


def tpu_device_files(dev: Path = Path("/dev")) -> list[str]:
    """Files through which a TPU is driven: accel0, accel1 ... or vfio/0, vfio/1 ..."""
    # Not /dev/accel (the folder of laptops' NPUs) nor /dev/vfio/vfio (there with no device bound).
    return sorted(glob.glob(f"{glob.escape(str(dev))}/accel[0-9]*") + glob.glob(f"{glob.escape(str(dev))}/vfio/[0-9]*"))


def probe_backend(timeout_s: float) -> Probe:
    """Start jax in a process of its own, which lets go of the chip when it ends, or is killed after `timeout_s`."""
    command = [sys.executable, "-c", READ_BACKEND]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
        stdout, stderr = process.stdout, process.stderr
        error = "" if process.returncode == 0 else (stderr.strip() or f"exit status {process.returncode}")
    except subprocess.TimeoutExpired as expired:
        stdout = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        stderr, error = "", f"jax did not start within {timeout_s:g} s"
    facts: dict = {}
    for line in stdout.splitlines():
        # A plugin may print lines of its own.
        if line.startswith("{"):
            facts |= json.loads(line)
    if not error and facts.get("backend") != "tpu":
        error = stderr.strip()
    return Probe(**facts, error=error)


def judge_backend(probe: Probe, device_files: list[str], environment: Mapping[str, str]) -> Verdict:
    """Whether the accelerator that is here is the one that jax uses, and what to do where it is not."""
    seen = f"jax uses {probe.num_devices} {probe.backend} device(s) ({probe.kind})" if probe.backend else "jax failed"
    last_line = probe.error.splitlines()[-1] if probe.error else ""
    if probe.backend == "tpu":
        return Verdict(ok=True, finding=seen)
    if not device_files:
        if probe.backend is None:
            return Verdict(
                ok=False, finding=f"jax does not start: {last_line}", repair=f"{RESTART}; then run this again"
            )
        hint = "; libtpu is installed: for a TPU choose one as the runtime type" if probe.libtpu_importable else ""
        return Verdict(ok=True, finding=f"{seen}; no TPU here{hint}")
    here = f"a TPU is here ({', '.join(device_files)}) but unused: {seen}"
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        repair = f"in a notebook: %env JAX_PLATFORMS= and restart ({RESTART}); in a shell: unset JAX_PLATFORMS"
        return Verdict(ok=False, finding=f"{here}, JAX_PLATFORMS={platforms}", repair=repair)
    if not probe.libtpu_importable:
        pip = f"{shlex.quote(sys.executable)} -m pip install --no-deps"
        repair = f"{pip} '{probe.libtpu_wanted}'  # {RESTART}"
        return Verdict(ok=False, finding=f"{here}, libtpu is not installed", repair=repair)
    # One process owns the chip; a process killed hard leaves the lock file of libtpu behind.
    repair = (
        f"another process may hold the chip: {RESTART}. To see which: sudo lsof -w {' '.join(device_files)}. "
        "If none does, remove the stale lock: sudo rm -f /tmp/libtpu_lockfile"
    )
    return Verdict(ok=False, finding=f"{here}{f', {last_line}' if last_line else ''}", repair=repair)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = Parser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("requirement", nargs="*", help="path or pip requirement (default: this script's checkout)")
    parser.add_argument("--dry-run", action="store_true", help="print the command and check the TPU; install nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object; everything else goes to stderr")
    parser.add_argument(
        "--timeout", type=float, default=120, metavar="S", help="seconds for jax to start (default 120)"
    )
    args = parser.parse_args(argv)
    if not args.timeout > 0:
        parser.error(f"--timeout must be above 0 seconds, got {args.timeout:g}.")
    if not args.requirement and not (CHECKOUT / "pyproject.toml").is_file():
        parser.error("this script stands alone: name what to install, as in: colab_setup.py gcompute")
    args.requirement = args.requirement or [str(CHECKOUT)]
    try:
        check_requirements(args.requirement)
    except ValueError as error:
        parser.error(str(error))
    return args


def install(args: argparse.Namespace, before: Mapping[str, str | None]) -> tuple[list[str], Verdict]:
    """Run pip under the constraints (unless dry) and compare the versions before and after."""
    if before["jax"] is None:
        repair = "install the jax of this machine first: pip install jax, or on a Cloud TPU VM: pip install 'jax[tpu]'"
        return [], Verdict(ok=False, finding=f"jax is not installed in {sys.executable}", repair=repair)
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text(constraint_lines(before))
        command = install_command(args.requirement, str(constraints))
        print(f"$ {shlex.join(command)}", file=sys.stderr, flush=True)
        if args.dry_run:
            return command, Verdict(ok=True, finding="dry run: nothing was installed")
        status = subprocess.run(command, stdout=sys.stderr).returncode
    verdict = compare_versions(before, installed_versions())
    if status and verdict.ok:
        # pip has said why; where the constraints cannot be met it resolves nothing and installs nothing.
        repair = "read pip's message above; where this jax is too old for gcompute, choose a newer runtime version"
        verdict = Verdict(ok=False, finding=f"pip failed with exit status {status}; {verdict.finding}", repair=repair)
    return command, verdict


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    say = sys.stderr if args.json else sys.stdout
    before = installed_versions()
    print("frozen:", constraint_lines(before).replace("\n", " ") or "nothing is installed", file=say, flush=True)
    command, versions = install(args, before)
    device_files = tpu_device_files()
    probe = probe_backend(args.timeout) if before["jax"] else Probe(error="jax is not installed")
    backend = judge_backend(probe, device_files, os.environ)
    for title, verdict in (("versions", versions), ("backend", backend)):
        print(f"{title}: {'ok' if verdict.ok else 'FAILED'}: {verdict.finding}", file=say)
        if verdict.repair:
            print(f"  repair: {verdict.repair}", file=say)
    ok = versions.ok and backend.ok
    if args.json:
        report = {
            "ok": ok,
            "dry_run": args.dry_run,
            "python": sys.executable,
            "frozen": before,
            "command": command,
            "versions": asdict(versions),
            "backend": asdict(backend),
            "probe": asdict(probe),
            "tpu_device_files": device_files,
        }
        print(json.dumps(report))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
