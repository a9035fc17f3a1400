"""What the machine says of itself, against the operating system's own files."""

import dataclasses
import json
import os
import sys

import jax
import psutil
import pytest

from gcompute.measure import machine
from gcompute.measure.machine import look, malloc_asks_for_huge_pages, parse_cpu_model, parse_huge_page_mode


@pytest.mark.oldest
def test_look_agrees_with_jax_and_the_system():
    seen = look()
    assert seen.backend == jax.default_backend()
    assert seen.num_devices == len(jax.devices())
    assert 0 < seen.memory_available_bytes <= seen.memory_bytes <= psutil.virtual_memory().total
    assert 1 <= seen.cores <= (os.cpu_count() or 1)
    assert seen.jax == jax.__version__
    assert seen.python == ".".join(str(part) for part in sys.version_info[:3])
    assert json.loads(json.dumps(seen.to_dict()))["cores"] == seen.cores


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_cores_follow_the_affinity():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert machine.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_control_group_limits_the_memory(tmp_path, monkeypatch):
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(machine, "CGROUP_MEMORY_FILES", ((limit, used),))
    whole = psutil.virtual_memory().total
    assert machine.host_memory_bytes()[0] == whole
    limit.write_text("max\n")
    used.write_text("1000\n")
    assert machine.host_memory_bytes()[0] == whole
    limit.write_text("64000000\n")
    assert machine.host_memory_bytes() == (64_000_000, 63_999_000)
    used.write_text("65000000\n")
    assert machine.host_memory_bytes() == (64_000_000, 0)


def test_absent_files_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "HUGE_PAGES_FILE", tmp_path / "none")
    monkeypatch.setattr(machine, "CPUINFO_FILE", tmp_path / "none")
    assert machine.huge_page_mode() is None
    if sys.platform != "darwin":
        assert machine.cpu_model() is None


@pytest.mark.oldest
def test_parses():
    assert parse_huge_page_mode("[always] madvise never\n") == "always"
    assert parse_huge_page_mode("nothing\n") is None
    assert parse_cpu_model("model name\t: Some CPU: 3 GHz\nmodel name\t: other\n") == "Some CPU: 3 GHz"
    assert parse_cpu_model("CPU implementer : 0x41\n") is None


@pytest.mark.parametrize(
    ("tunables", "asks"),
    [
        ("glibc.malloc.hugetlb=1", True),
        ("glibc.malloc.arena_max=1:glibc.malloc.hugetlb=2", True),
        ("glibc.malloc.hugetlb=0", False),
        ("glibc.malloc.hugetlb=", False),
        ("", False),
        ("glibc.malloc.hugetlbx=1", False),
    ],
)
def test_malloc_huge_pages(tunables, asks):
    assert malloc_asks_for_huge_pages(tunables) is asks


@pytest.mark.parametrize(
    ("mode", "malloc", "uses"),
    [("always", False, True), ("madvise", True, True), ("madvise", False, False), ("never", True, False)],
)
def test_uses_huge_pages(mode, malloc, uses):
    assert dataclasses.replace(look(), huge_pages=mode, malloc_huge_pages=malloc).uses_huge_pages is uses
