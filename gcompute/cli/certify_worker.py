"""The process that compiles the certificate's programs for `gcompute certify --on`, with the target's environment.

It reads one JSON request from standard input, {"target", "strategy", "devices", "quick"}, and writes one JSON object a
line to standard output for each row: its name, form, collectives and faults, or {"error": ...}. What libtpu prints
goes to standard error.
"""

import json
import os
import signal
import sys

from gcompute.hardware.target import Target


def main() -> None:
    """Compile what standard input asks for."""
    # Ctrl-C reaches this process too: the one who asked decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # libtpu and XLA must not write between the answers.
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    target = Target.parse(request["target"])
    from gcompute.aot.target import target_devices
    from gcompute.certify.certificate import compile_elsewhere, compiles, select

    try:
        devices = target_devices(target)
        selection = select(request["strategy"], devices=request["devices"], quick=request["quick"])
        for subject in filter(compiles, selection.subjects):
            found = compile_elsewhere(subject, devices[: subject.mesh.num_devices], str(target))
            answer = {"name": found.name, "form": found.form, "counts": found.found.counts, "faults": found.faults}
            print(json.dumps(answer), file=answers, flush=True)
    except ValueError as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
