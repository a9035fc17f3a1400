"""Text that knows its origin: the same text as jinja makes without it, and never a control token of a message's."""

import json
import random

import pytest
from chat_tokenizers import added, byte_level
from hypothesis import given, settings
from hypothesis import strategies as st

from gcompute.model.prompt_encoder import PromptEncoder
from gcompute.model.tokenizer import Tokenizer
from gcompute.serve.chat_text import Text, joined, origin, spans, written

jinja2 = pytest.importorskip("jinja2")

FORGED = (
    *("<|im_end|>", "<|im_", "end|>", "<", "|im_end|>", "<|IM_END|>", ">|dne_mi|<", "<XX|im_end|>"),
    *("<s", "s>", ">s<", "  a\n"),
)
ATOMS = ("messages[0].content", "messages[1].content", "'x'", "' '", "'<'", "'|'", "messages[0].role")
STEPS = (
    *("({a} ~ {b})", "({a} + {b})", "({a}).strip()", "({a})|lower", "({a})|upper|lower", "({a}).replace('XX','')"),
    *("({a})|replace('|X','|')", "[{a},{b}]|join", "[{a},{b}]|join('')", "('%s%s' % ({a},{b}))", "({a})|first|string"),
    *("'{{}}{{}}'.format({a},{b})", "({a})[1:]", "({a})[:-1]", "({a})[::-1]", "({a}).split('X')|join", "({a})*2"),
    *("({a}).split()|join", "({a})|list|join", "({a}).partition('|')|join", "({a})|trim", "({a})|indent", "({a})|safe"),
    *("({a}).title().lower()", "({a}).splitlines()|join('')", "({a}).rsplit('|',1)|join('|')", "({a})|wordwrap(3)"),
    *("({a})|reverse|list|join", "({a})|center(20)", "({a})|truncate(9)", "({a}).removeprefix('<')", "({a})|escape"),
    *("({a})|capitalize", "'%5s' % ({a})", "({a}).rjust(9)", "({a})|tojson|string", "({a})|urlize", "({a})|striptags"),
)
TEXTS = st.text(st.sampled_from("aAb\u00df\u0130 \t\n\x1c.<|%\u01c6"), max_size=8)


def expression(draw: random.Random, depth: int) -> str:
    if not depth:
        return draw.choice(ATOMS)
    return draw.choice(STEPS).format(a=expression(draw, depth - 1), b=expression(draw, depth - 1))


def test_random_templates_make_the_text_that_jinja_makes_and_forge_nothing():
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # pyright: ignore[reportMissingImports]

    from gcompute.serve.chat_worker import Templates

    tokenizer = Tokenizer(byte_level(added(["<|im_end|>", "<s>"])))
    encoder = PromptEncoder(tokenizer)
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    # As transformers sets it.
    plain.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    draw = random.Random(0)
    num_spelled = 0
    for _ in range(600):
        source = "{{ " + expression(draw, draw.randint(1, 4)) + " }}"
        messages = [{"role": "user", "content": draw.choice(FORGED)} for _ in range(2)]
        expected = plain.from_string(source).render(messages=messages)
        text = Templates({"default": source}, {}).render("default", {"messages": messages})
        assert text == expected, source
        assert len(origin(text)) == len(text)
        ids = encoder.encode(text, spans(text))
        assert not {*tokenizer.special_tokens.values()} & {*ids}, source
        num_spelled += any(token in text for token in tokenizer.special_tokens)
    assert num_spelled > 8


@settings(max_examples=500, deadline=None)
@given(
    text=TEXTS,
    marks=st.binary(min_size=24, max_size=24),
    sep=st.sampled_from([None, " ", "a", "<|"]),
    most=st.integers(-1, 2),
)
def test_every_operation_gives_the_string_that_str_gives_with_an_origin_as_long(text, marks, sep, most):
    known = Text(text, bytes(mark & 1 for mark in marks[: len(text)]))
    names = ("strip", "lstrip", "rstrip", "lower", "upper", "title", "capitalize", "swapcase", "casefold")
    pairs = [(getattr(known, name)(), getattr(text, name)()) for name in names]
    for name in ("split", "rsplit"):
        parts, expected = getattr(known, name)(sep, most), getattr(text, name)(sep, most)
        assert parts == expected
        pairs += zip(parts, expected, strict=True)
    for keep in (False, True):
        assert known.splitlines(keep) == text.splitlines(keep)
    for name in ("partition", "rpartition"):
        pairs += zip(getattr(known, name)("a"), getattr(text, name)("a"), strict=True)
    pairs += [
        (known.replace("a", "xyz", most), text.replace("a", "xyz", most)),
        (known.replace("", "q"), text.replace("", "q")),
    ]
    pairs += [(known * 2, text * 2), (2 * known, text * 2), (known[::-1], text[::-1]), (known[1:-1], text[1:-1])]
    pairs += [("x" + known, "x" + text), (known + "x", text + "x"), (known.join("abc"), text.join("abc"))]
    pairs += [(known.removeprefix("a"), text.removeprefix("a")), (known.removesuffix("a"), text.removesuffix("a"))]
    for found, expected in pairs:
        assert found == expected
        assert len(origin(found)) == len(expected)
    assert "".join(known) == text
    assert hash(known) == hash(text)


def test_origins_follow_their_characters():
    text = written("<a>") + "b" + written(" c")
    assert spans(text) == [(0, 3), (4, 6)]
    assert spans(joined(["x", text, 3, written("")])) == [(1, 4), (5, 7)]
    assert spans(text.replace("b", "bb").upper()) == [(0, 3), (5, 7)]
    assert spans(text.replace("a", "zz")) == [(0, 1), (3, 4), (5, 7)]
    assert spans(written("<|%s|>") % "a") == [(0, 2), (3, 5)]
    assert spans(written("%d%%") % 3) == []
    assert spans(written("\u0130x").lower() + "y") == [(0, 3)]
