"""Write constraints/pythonX.Y.txt: the newest packages that this Python can have, for `make lock`.

pip resolves what gcompute, its development tools and the compilers of `make slow` need, in an empty environment, and
installs nothing. The set becomes a tested one when the tests have passed with it.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
EXTRAS = "dev,chat,tpu-aot,gpu-aot"


def resolve() -> dict[str, str]:
    """Names and versions of all packages but gcompute itself."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", f"{folder}/venv"], check=True)
        report = Path(folder, "report.json")
        pip = [f"{folder}/venv/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--dry-run", "--report", report, f"{PROJECT}[{EXTRAS}]"], check=True)
        found = [one["metadata"] for one in json.loads(report.read_text(encoding="utf-8"))["install"]]
    plain = {re.sub(r"[-_.]+", "-", one["name"]).lower(): one["version"] for one in found}
    return {name: version for name, version in sorted(plain.items()) if name != "gcompute"}


def main() -> None:
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    file = PROJECT / "constraints" / f"python{minor}.txt"
    head = f"# What the tests have passed with on Python {minor}; written by `make lock`.\n"
    file.write_text(head + "".join(f"{name}=={version}\n" for name, version in resolve().items()), encoding="utf-8")
    print(f"wrote {file.relative_to(PROJECT)}")


if __name__ == "__main__":
    main()
