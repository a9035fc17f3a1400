"""Faults put into the library's source for the length of a block: one piece of text in one module, replaced."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def mutated(module_name: str, old: str, new: str) -> Iterator[None]:
    """`module_name` as if its source said `new` where it says `old`, for all of gcompute that has imported from it.

    The module's text is run again in its own namespace, and each function, class and table that it defines takes the
    place of the one before it wherever that was imported. Afterwards all of them are put back.
    """
    module = importlib.import_module(module_name)
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{module_name} holds {old!r} {source.count(old)} times: the mutant needs a new text"
    before = dict(vars(module))
    exec(compile(source.replace(old, new), str(module.__file__), "exec"), vars(module))
    replaced = {
        id(value): vars(module)[name]
        for name, value in before.items()
        if (callable(value) or isinstance(value, dict))
        and vars(module)[name] is not value
        and not name.startswith("__")
    }
    swapped = []
    for name, other in list(sys.modules.items()):
        if name.startswith("gcompute") and other is not module:
            for attribute, value in list(vars(other).items()):
                if id(value) in replaced:
                    swapped.append((other, attribute, value))
                    setattr(other, attribute, replaced[id(value)])
    try:
        yield
    finally:
        for other, attribute, value in swapped:
            setattr(other, attribute, value)
        vars(module).update(before)
