"""The process that compiles the certificate's programs for `gcompute certify --on`, with the target's environment.

It reads one JSON request from standard input, {"target", "strategy", "devices", "quick"}, and writes one JSON object a
line to standard output for each row: its name, form, collectives and faults, or {"error": ...}. What libtpu prints
goes to standard error.
"""

import json
import sys

from gcompute.cli.answers import open_answers
from gcompute.hardware.target import Target


def main() -> None:
    """Compile what standard input asks for."""
    tell = open_answers()
    request = json.loads(sys.stdin.readline())
    target = Target.parse(request["target"])
    from gcompute.aot.target import target_devices
    from gcompute.certify.certificate import compile_elsewhere, compiles, select

    try:
        devices = target_devices(target)
        selection = select(request["strategy"], devices=request["devices"], quick=request["quick"])
        for subject in filter(compiles, selection.subjects):
            found = compile_elsewhere(subject, devices[: subject.mesh.num_devices], str(target))
            tell(name=found.name, form=found.form, counts=found.found.counts, faults=found.faults)
    except ValueError as error:
        tell(error=str(error))


if __name__ == "__main__":
    main()
