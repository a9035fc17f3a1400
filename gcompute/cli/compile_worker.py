"""The process that compiles for `gcompute compile`: it starts with the target's environment and says how it went.

It reads one JSON request from standard input, which then stays open: when it closes, the one who asked is gone, and
this process ends too. It writes one JSON object a line to standard output: {"doing": ...}, at last {"report": ...},
{"error": ...} for what was asked wrongly, or {"failed": ...}. What libtpu prints goes to standard error.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from gcompute.cli.answers import open_answers
from gcompute.cli.run_directory import run_from_plain
from gcompute.config.mesh import MeshShape
from gcompute.config.presets import model_from_dict
from gcompute.hardware.target import Target


def main() -> None:
    """Compile what standard input asks for."""
    tell = open_answers()
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_asker, daemon=True).start()
    from gcompute.aot.compiler import CompilerError

    try:
        compile_request = {"train": compile_train, "serve": compile_serve}[request.get("kind", "train")]
        tell(report=compile_request(request, tell))
    except ValueError as error:
        tell(error=str(error))
    except CompilerError as error:
        tell(failed=str(error))


def _end_with_asker() -> None:
    sys.stdin.read()
    os._exit(1)


def compile_train(request: dict[str, Any], tell: Any) -> dict[str, Any]:
    """Lower and compile the train step of `request["run"]` for `request["target"]`."""
    target = Target.parse(request["target"])
    run = run_from_plain(request["run"], source="the request")
    from gcompute.aot.report import compile_report
    from gcompute.aot.target import target_devices
    from gcompute.parallel.mesh import build_mesh
    from gcompute.train.programs import lower_train

    tell(doing="tracing the train step")
    assert run.train.mesh is not None
    mesh = build_mesh(run.train.mesh, target_devices(target))
    program = lower_train(run, mesh, target.backend)
    tell(doing=f"compiling it for {target}")
    report, text = compile_report(program.lowered, target, mesh=mesh)
    if request["hlo"] and text is not None:
        Path(request["hlo"]).write_text(text, encoding="utf-8")
    precision = program.execution.compute.name
    return {"accumulation": program.accumulation, "precision": precision, **report.to_dict()}


def compile_serve(request: dict[str, Any], tell: Any) -> dict[str, Any]:
    """Lower and compile the engine's programs that `request["programs"]` names, for `request["target"]`."""
    target = Target.parse(request["target"])
    model = model_from_dict(request["model"], source="the request")
    from gcompute.aot.hlo import count_kernels
    from gcompute.aot.report import compile_report
    from gcompute.aot.target import target_devices
    from gcompute.parallel.mesh import build_mesh
    from gcompute.serve.lowered import lower_serve
    from gcompute.serve.paged_lowered import lower_paged

    mesh = build_mesh(MeshShape.parse(request["mesh"]), target_devices(target))
    reports = {}
    for program in request["programs"]:
        tell(doing=f"tracing {program}")
        sizes = {"slots": request["slots"], "max_context": request["context"], "page": request["page"]}
        sizes |= {"precision": request["precision"]}
        if request["attention"] is None:
            prompt, steps = request["prompt"], request["decode_steps"]
            lowered = lower_serve(model, mesh, program=program, prompt=prompt, decode_steps=steps, **sizes)
        else:
            kernel, tokens, steps = request["attention"], request["tokens"], request["decode_steps"]
            sizes |= {"kernel": kernel, "tokens": tokens, "most_steps": steps}
            lowered = lower_paged(model, mesh, program=program, **sizes)
        tell(doing=f"compiling {program} for {target}")
        report, text = compile_report(lowered, target, mesh=mesh)
        if request["hlo"] and text is not None:
            Path(request["hlo"]).write_text(text, encoding="utf-8")
        reports[program] = {**report.to_dict(), "kernels": count_kernels(text) if text is not None else None}
    return {"fits": all(report["fits"] for report in reports.values()), "programs": reports}


if __name__ == "__main__":
    main()
