"""Run `gcompute train` on every host of a TPU slice or cluster as one program: start this on all hosts at once.

It joins the hosts with jax.distributed.initialize(), before anything else uses JAX, and then hands the remaining
arguments to `gcompute train`. TPU slices, Slurm and Kubernetes tell JAX who is who; elsewhere say so. With
--local-processes it plays the hosts itself, as CPU processes of this machine.

  python tpu_scripts/train_multihost.py --mesh fsdp=16 --model gpt2 --steps 1000                       # on a TPU
  python tpu_scripts/train_multihost.py --coordinator 10.0.0.1:8476 --num-processes 2 --process-id 0 --mesh data=2
  python tpu_scripts/train_multihost.py --local-processes 2 --mesh data=2 --model demo --steps 20      # a trial here
  python tpu_scripts/train_multihost.py --local-processes 2 --check                                    # no training

Exit status: that of `gcompute train`; 1 where the hosts did not find one another or a sum came out wrong; 2 bad
arguments; 130 after Ctrl-C.
"""

import argparse
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

SAVE_GRACE_S = 30.0  # a training run that is interrupted writes a checkpoint before it ends
TAIL_LINES = 20
INTERRUPTED = 128 + signal.SIGINT
# Ours has to speak first: when JAX's own limit passes, its runtime aborts the process with a C++ stack trace.
JAX_TIMEOUT_MARGIN_S = 60
FORCED_DEVICES = "--xla_force_host_platform_device_count"


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, checked, and everything else in its order: the arguments of `gcompute train`."""
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = Parser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # an abbreviation could be a flag of `gcompute train`
        usage="%(prog)s [options] [arguments of gcompute train]",
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0 (CPU and GPU; never on TPU)")
    parser.add_argument("--num-processes", type=whole, metavar="N", help="with --coordinator: processes in all")
    parser.add_argument(
        "--process-id", type=whole, metavar="I", help="with --coordinator: which of them this is, from 0"
    )
    parser.add_argument("--local-processes", type=whole, metavar="N", help="run N CPU processes on this machine")
    parser.add_argument(
        "--local-devices", type=whole, metavar="M", help="CPU devices of each local process (default 1)"
    )
    parser.add_argument("--logs", type=Path, metavar="DIR", help="logs of the local processes (default: a new folder)")
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="seconds to find all hosts (default 300)"
    )
    parser.add_argument(
        "--check", action="store_true", help="add over all devices instead of training, and say who is here"
    )
    args, rest = parser.parse_known_args(argv)
    if rest[:1] == ["--"]:
        rest = rest[1:]
    problem = find_problem(args, rest)
    if problem:
        parser.error(problem)
    return args, rest


def find_problem(args: argparse.Namespace, rest: list[str]) -> str | None:
    """What is wrong with the arguments taken together, in one line."""
    explicit = {
        "--coordinator": args.coordinator,
        "--num-processes": args.num_processes,
        "--process-id": args.process_id,
    }
    given = [flag for flag, value in explicit.items() if value is not None]
    missing = [flag for flag, value in explicit.items() if value is None]
    if not args.timeout > 0:
        return f"--timeout must be above 0 seconds, got {args.timeout:g}."
    if args.check and rest:
        return f"--check trains nothing, so it takes no {rest[0]!r}: leave it out, or leave out --check."
    if args.local_processes is None and (args.local_devices is not None or args.logs is not None):
        return "--local-devices and --logs belong to --local-processes N: add it, or leave them out."
    if args.local_processes is not None:
        if given:
            return f"--local-processes chooses its own addresses: leave out {', '.join(given)}."
        if args.local_processes < 1 or args.local_devices == 0:
            return "--local-processes and --local-devices must be at least 1."
        return None
    if given and missing:
        return f"{', '.join(given)} needs {', '.join(missing)} too; on a TPU give none of the three."
    if given:
        host, _, port = args.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            return f"--coordinator must be HOST:PORT, as in 10.0.0.1:8476, got {args.coordinator!r}."
        if args.process_id >= args.num_processes:
            return f"--process-id must lie between 0 and {args.num_processes - 1}, got {args.process_id}."
    return None


@contextmanager
def deadline(timeout_s: float, message: str) -> Iterator[None]:
    """End the process with `message` if the body is not done in time; Ctrl-C ends it at once.

    The body waits inside JAX's C++ runtime, where no Python exception and no signal handler of Python can reach it.
    """

    def give_up() -> None:
        print(message, file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, previous)


def join_hosts(args: argparse.Namespace) -> None:
    """Make this process one of a multi-host JAX program, and wait until every process has brought its devices."""
    import jax

    # What CPU processes send their sums through; other platforms bring their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    explicit = {}
    if args.coordinator:
        explicit = {
            "coordinator_address": args.coordinator,
            "num_processes": args.num_processes,
            "process_id": args.process_id,
        }
    who = f"process {args.process_id} of {args.num_processes}" if args.coordinator else "this host"
    message = (
        f"error: {who} waited {args.timeout:g} s and not all hosts were started, or they do not reach one another"
        f"{f' at {args.coordinator}' if args.coordinator else ''}. Run this same command on every host at once "
        "(on a TPU slice: gcloud compute tpus tpu-vm ssh NAME --worker=all --command=...), or raise --timeout."
    )
    with deadline(args.timeout, message):
        try:
            jax.distributed.initialize(**explicit, initialization_timeout=int(args.timeout) + JAX_TIMEOUT_MARGIN_S)
        except ValueError as error:
            raise ValueError(
                f"jax found no cluster here ({error}) Run this on a TPU slice, or give --coordinator, --num-processes "
                "and --process-id, or try it with --local-processes 2."
            ) from error
        # The devices too are found together: a host that is missing here would be waited for.
        local, total, platform = jax.local_device_count(), jax.device_count(), jax.default_backend()
    place = f"process {jax.process_index()} of {jax.process_count()}"
    print(f"{place}: {local} of {total} {platform} devices", file=sys.stderr, flush=True)


def check_sum() -> int:
    """Add 1, 2 ... over one row a device, each process bringing its own rows; 0 if every process has the true sum."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    width = 1024
    num_devices = jax.device_count()
    mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(AxisType.Auto,))
    by_rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    shape = (num_devices, width)

    rows = np.broadcast_to(np.arange(1, num_devices + 1, dtype=np.float32)[:, None], shape)
    global_rows = jax.make_array_from_callback(shape, by_rows, lambda index: rows[index])
    total = jax.jit(lambda x: x.sum(axis=0), in_shardings=by_rows, out_shardings=everywhere)(global_rows)
    # Small integers: float32 adds them exactly, in any order.
    expected = num_devices * (num_devices + 1) // 2
    correct = bool((np.asarray(total) == expected).all())
    place = f"process {jax.process_index()} of {jax.process_count()}"
    verdict = "correct" if correct else f"WRONG, expected {expected}"
    print(f"{place}: sum over {num_devices} devices is {float(total[0]):g}, {verdict}", flush=True)
    return 0 if correct else 1


def train(arguments: list[str]) -> int:
    """Run `gcompute train`, which ends by SystemExit, and return its exit status."""
    from gcompute.cli.main import main as gcompute

    try:
        gcompute(args=["train", *arguments])
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return ended.code or 0
    return 0


def work(args: argparse.Namespace, rest: list[str]) -> int:
    """Do what this host joined for; where it fails, end the process without JAX's barrier at exit.

    The other hosts wait for this one inside a collective: a process that waited for them in turn would hide its
    failure for minutes. After Ctrl-C, which reaches all hosts, the barrier lets each finish its part of a checkpoint.
    """
    try:
        status = check_sum() if args.check else train(rest)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Exception:
        traceback.print_exc()
        status = 1
    if status not in (0, INTERRUPTED):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    process: subprocess.Popen
    log: Path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def child_environment(port: int, num_devices: int) -> dict[str, str]:
    """CPU devices only, as many as asked for, and a coordinator that no other machine can reach."""
    environment = dict(os.environ)
    flags = environment.get("XLA_FLAGS", "").split()
    environment["XLA_FLAGS"] = " ".join(flag for flag in flags if not flag.startswith(FORCED_DEVICES))
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(num_devices),
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        "PYTHONUNBUFFERED": "1",
    }
    return environment


def start_children(args: argparse.Namespace, rest: list[str], logs: Path) -> Iterator[Child]:
    port = free_port()
    environment = child_environment(port, args.local_devices or 1)
    common = [sys.executable, str(Path(__file__).resolve()), "--timeout", str(args.timeout)]
    common += ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(args.local_processes)]
    for process_id in range(args.local_processes):
        command = [*common, "--process-id", str(process_id), *(["--check"] if args.check else ["--", *rest])]
        log = logs / f"process_{process_id}.log"
        with log.open("w") as output:
            # A session of its own: Ctrl-C reaches the parent alone, which stops the children in order.
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        yield Child(process=process, log=log)


def interrupt(children: list[Child]) -> None:
    """Pass Ctrl-C on and give the children time to save; another Ctrl-C ends the wait."""
    running = [child.process for child in children if child.process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGINT)
    until = time.monotonic() + SAVE_GRACE_S
    with suppress(KeyboardInterrupt):
        while any(process.poll() is None for process in running) and time.monotonic() < until:
            time.sleep(0.05)


def kill(children: list[Child]) -> None:
    """End what still runs. Nothing gentler works: it waits in a collective, and JAX takes SIGTERM as advance notice."""
    for child in children:
        child.process.kill()
        child.process.wait()


def copy_new(log: IO[str]) -> None:
    sys.stdout.write(log.read())
    sys.stdout.flush()


def watch(children: list[Child], first_log: IO[str]) -> list[Child]:
    """Wait until all have ended well or any has failed; return those that failed."""
    while True:
        statuses = [child.process.poll() for child in children]
        copy_new(first_log)
        failed = [child for child, status in zip(children, statuses, strict=True) if status]
        if failed or None not in statuses:
            return failed
        time.sleep(0.1)


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])


def run_local(args: argparse.Namespace, rest: list[str]) -> int:
    """Run the processes, show what process 0 prints, and end with the status of the first to fail."""
    logs = args.logs or Path(tempfile.mkdtemp(prefix="gcompute-multihost-"))
    logs.mkdir(parents=True, exist_ok=True)
    print(f"{args.local_processes} processes; logs in {logs}; process 0:", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    children: list[Child] = []
    try:
        for child in start_children(args, rest, logs):
            children.append(child)
        with children[0].log.open(errors="replace") as first_log:
            try:
                failed = watch(children, first_log)
            except KeyboardInterrupt:
                print("stopping all processes ...", file=sys.stderr, flush=True)
                interrupt(children)
                return INTERRUPTED
            finally:
                copy_new(first_log)
    finally:
        kill(children)
    for child in failed:
        status = exit_status(child.process.returncode)
        print(f"error: {child.log.stem} ended with status {status}; the end of {child.log}:", file=sys.stderr)
        print(tail(child.log), file=sys.stderr, flush=True)
    return exit_status(failed[0].process.returncode) if failed else 0


def exit_status(returncode: int) -> int:
    """As a shell gives it: 128 + n for a process ended by signal n."""
    return returncode if returncode >= 0 else 128 - returncode


def main(argv: list[str] | None = None) -> int:
    args, rest = parse(argv)
    if not args.check and importlib.util.find_spec("gcompute") is None:
        # Before joining: the other hosts would wait for one that cannot train.
        print(f"error: gcompute is not installed in {sys.executable}: pip install it on every host.", file=sys.stderr)
        return 2
    try:
        if args.local_processes is not None:
            return run_local(args, rest)
        join_hosts(args)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return work(args, rest)


if __name__ == "__main__":
    sys.exit(main())
