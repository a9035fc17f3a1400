import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import httpx
import jax
import pytest
from openai_calls import LOCAL

from gcompute.config.model import ModelConfig
from gcompute.config.serve import ServeConfig
from gcompute.hardware.catalogue import find_chip
from gcompute.model.tokenizer import Tokenizer
from gcompute.model.transformer import Params, init
from gcompute.serve.engine import Engine
from gcompute.serve.position import decode_roofline
from gcompute.serve.server import background
from gcompute.serve.state import EngineShape
from gcompute.serve.work import Work

CONFIG = ModelConfig(vocab=257, layers=2, dim=32, heads=4, kv_heads=2, ffn=64, context=64)
SERVE = ServeConfig(slots=3, max_queue=4, decode_steps=4, precision="float32", port=0)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_spec("byte", list)


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return CONFIG


@pytest.fixture(scope="session")
def params() -> Params:
    # Larger than the usual initial values: a model whose greedy choices are varied and far from ties.
    return jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim > 1 else leaf, init(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="session")
def engine(params, tokenizer) -> Iterator[Engine]:
    with Engine(params, CONFIG, tokenizer, SERVE) as engine:
        yield engine


@pytest.fixture(scope="session")
def make_engine(params, tokenizer) -> Iterator[Callable[[ServeConfig], Engine]]:
    """Engines of CONFIG, not started; those whose programs are the same compile them once."""
    made: list[Engine] = []

    def programs_of(engine: Engine) -> EngineShape:
        shape = engine._runner.shape
        # What only the scheduler heeds.
        limits = replace(shape.limits, max_queue=1, token_budget=1, prefix_cache=True, swap=True)
        return replace(shape, limits=limits)

    def make(serve: ServeConfig) -> Engine:
        engine = Engine(params, CONFIG, tokenizer, serve)
        for other in made:
            if programs_of(other) == programs_of(engine):
                engine._runner.compiled.update(other._runner.compiled)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close(finish=False)


@pytest.fixture
def small_engine(make_engine) -> Engine:
    """Not started, of one bucket, so that it is ready soon."""
    return make_engine(ServeConfig(slots=2, max_queue=8, max_context=16, decode_steps=2, precision="float32", port=0))


@pytest.fixture(scope="module")
def url(engine):
    """A server of the session's engine, whose page knows a roofline."""
    roofline = decode_roofline(CONFIG, LOCAL, find_chip("v5e"))
    with background(engine, LOCAL, model_name="tiny", roofline=roofline) as url:
        yield url


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
        yield http


class Gate:
    """Holds the engine before its decode dispatches, until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def wait(self) -> None:
        self.reached.set()
        assert self.open.wait(30)


@contextmanager
def _before_each(engine: Engine, kind: str, action: Callable[[], None]) -> Iterator[None]:
    """Run `action` on the engine's thread before each program of a kind."""
    originals = {program: run for program, run in engine._runner.compiled.items() if program.kind == kind}

    def wrap(run):
        def wrapped(*arguments):
            action()
            return run(*arguments)

        return wrapped

    engine._runner.compiled.update({program: wrap(run) for program, run in originals.items()})
    try:
        yield
    finally:
        engine._runner.compiled.update(originals)


@pytest.fixture(scope="session")
def before_each():
    return _before_each


@pytest.fixture
def gate(engine) -> Iterator[Gate]:
    gate = Gate()
    with _before_each(engine, "decode", gate.wait):
        yield gate
        gate.open.set()


@contextmanager
def _checked_books(engine: Engine, heard: Callable[[Work], None] = lambda work: None) -> Iterator[None]:
    """Check who holds which slot and page before and after each piece of work; `heard` hears of it."""
    scheduler = engine._scheduler
    next_work = scheduler.next_work

    def check() -> None:
        scheduler.check()
        for blocks in scheduler.blocks:
            assert blocks.num_free + blocks.num_cached + blocks.num_used == blocks.num_pages

    def checked() -> Work | None:
        check()
        work = next_work()
        check()
        if work is not None:
            heard(work)
        return work

    scheduler.next_work = checked
    try:
        yield
    finally:
        scheduler.next_work = next_work
        with engine._wake:
            check()


@pytest.fixture(scope="session")
def checked_books():
    return _checked_books


def _wait_until(engine: Engine, condition: Callable[[], bool]) -> None:
    """Sleep until `condition` holds; the engine's thread wakes nobody for most of its changes, so look now and then."""
    with engine._wake:
        for _ in range(1000):
            if condition():
                return
            engine._wake.wait(0.02)
    raise AssertionError("the engine did not come to that")


@pytest.fixture(scope="session")
def wait_until():
    return _wait_until
