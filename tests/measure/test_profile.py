"""Traces that their viewers can read, and peak memory that follows what is allocated."""

import gzip
import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from gcompute.measure import profile
from gcompute.measure.profile import device_memory, process_peak_bytes, trace


@pytest.mark.oldest
def test_trace_writes_what_both_viewers_read(tmp_path):
    def named_program(x):
        return jnp.tanh(x) @ x

    program = jax.jit(named_program)
    with trace(tmp_path) as files, jax.profiler.TraceAnnotation("annotated here"):
        jax.block_until_ready(program(jnp.ones((64, 64))))
    events = json.loads(gzip.decompress(files.perfetto.read_bytes()))["traceEvents"]
    assert any(event.get("name") == "annotated here" for event in events)
    assert b"named_program" in files.xplane.read_bytes()
    assert files.xplane.parent.parent == tmp_path / "plugins" / "profile"


@pytest.fixture
def platforms(request: pytest.FixtureRequest) -> Iterator[None]:
    """JAX as it is with JAX_PLATFORMS set so; the backend that is there stays."""
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", request.param)
    yield
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize("platforms", [None], indirect=True)
def test_where_the_profiler_would_crash_it_is_said_before(monkeypatch, tmp_path, platforms):
    monkeypatch.setattr(profile, "find_spec", {"libtpu": object()}.get)
    with pytest.raises(ValueError, match="set JAX_PLATFORMS=cpu"), trace(tmp_path / "traced"):
        pass
    monkeypatch.setattr(profile, "find_spec", {}.get)
    profile.check_trace()


@pytest.mark.parametrize("platforms", ["cpu"], indirect=True)
def test_where_jax_is_told_to_run_on_cpu_the_profiler_is_used(monkeypatch, platforms):
    monkeypatch.setattr(profile, "find_spec", {"libtpu": object()}.get)
    profile.check_trace()


def test_files_of_a_trace_that_has_not_ended(tmp_path):
    with trace(tmp_path / "new") as files, pytest.raises(ValueError, match="has not ended"):
        _ = files.xplane
    assert files.perfetto.is_file()


@pytest.mark.oldest
def test_device_memory_says_which():
    memory = device_memory()
    assert memory["source"] in ("device allocator", "process peak RSS")
    assert memory["largest_peak_bytes"] == max(memory["peak_bytes"].values()) > 0
    assert json.loads(json.dumps(memory)) == memory


def test_process_peak_follows_what_is_touched():
    before = process_peak_bytes()
    room = max(0, before - psutil.Process().memory_info().rss)
    touched = np.ones(room + (64 << 20), np.uint8)
    assert process_peak_bytes() >= before + (32 << 20)
    del touched
    assert process_peak_bytes() >= before + (32 << 20)
