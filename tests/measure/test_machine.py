"""What the machine says of itself, against the operating system's own files."""

import dataclasses
import json
import os
import sys

import jax
import psutil
import pytest

from gcompute.measure import machine
from gcompute.measure.machine import (
    Cache,
    count_cores,
    data_caches,
    look,
    malloc_asks_for_huge_pages,
    parse_cache_size,
    parse_cpu_model,
    parse_huge_page_mode,
    second_level_bytes,
)


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


def write_caches(directory, rows):
    for index, (level, kind, size, shared) in enumerate(rows):
        place = directory / f"index{index}"
        place.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
            (place / name).write_text(f"{text}\n")


def test_caches_as_the_kernel_lists_them(tmp_path):
    rows = [
        (1, "Data", "32K", "0"),
        (1, "Instruction", "64K", "0"),
        (2, "Unified", "512K", "0"),
        (3, "Unified", "8192K", "0-3"),
    ]
    write_caches(tmp_path, rows)
    caches = data_caches(tmp_path)
    assert [cache.level for cache in caches] == [1, 2, 3]
    assert caches[1] == Cache(level=2, size_bytes=512 * 1024, cores=1)
    assert caches[2] == Cache(level=3, size_bytes=8 * 2**20, cores=4)
    assert second_level_bytes(caches, cores=2) == 2**20
    # Two of four cores that share one have half of it.
    shared = (Cache(level=2, size_bytes=16 * 2**20, cores=4),)
    assert second_level_bytes(shared, cores=2) == 8 * 2**20


def test_caches_that_are_not_told(tmp_path):
    assert data_caches(tmp_path / "none") == ()
    write_caches(tmp_path, [("", "Unified", "512K", "0"), (2, "Unified", "much", "0"), (3, "Unified", "8M", "")])
    assert data_caches(tmp_path) == (Cache(level=3, size_bytes=8 * 2**20, cores=1),)
    assert second_level_bytes(data_caches(tmp_path), cores=2) is None


def test_sizes_and_lists_of_the_kernel():
    assert [parse_cache_size(text) for text in ("48K\n", "1G", "4096", "", "K", "-1K", "1.5M")] == [
        *(48 * 1024, 2**30, 4096),
        *[None] * 4,
    ]
    assert [count_cores(text) for text in ("0\n", "0-7", "0,2,4-5", "", "x")] == [1, 8, 4, 1, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's files are Linux's")
def test_this_machines_caches():
    caches = data_caches()
    assert all(cache.size_bytes >= 2**12 and cache.cores >= 1 for cache in caches)
    assert [cache.level for cache in caches] == sorted(cache.level for cache in caches)
