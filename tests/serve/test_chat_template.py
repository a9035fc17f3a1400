"""Chat templates against transformers, id by id, and against messages that would forge a turn."""

import json
from collections.abc import Iterator
from functools import cache

import pytest
from chat_families import CALL, CONVERSATIONS, FAMILIES, TOOL
from chat_reference import REFERENCE
from chat_tokenizers import KINDS, added, byte_level
from tokenizers import processors

from gcompute.model.prompt_encoder import PromptEncoder
from gcompute.model.tokenizer import Tokenizer
from gcompute.serve.chat import read_messages
from gcompute.serve.request import RequestError
from gcompute.serve.template import JinjaTemplate, Message

pytest.importorskip("jinja2")

EXPECTED = json.loads(REFERENCE.read_text(encoding="utf-8"))["families"]


@pytest.fixture(scope="module", autouse=True)
def templates() -> Iterator[None]:
    yield
    made.cache_clear()


@cache
def made(name: str) -> tuple[JinjaTemplate, Tokenizer]:
    family = FAMILIES[name]
    template = JinjaTemplate(family.template, family.special, control=tuple(family.special.values()))
    return template, Tokenizer(family.backend())


def ids_of(name: str, chat: dict) -> list[int]:
    template, tokenizer = made(name)
    given = dict(chat)
    return list(template.encode(read_messages({"messages": given.pop("messages")}), tokenizer, **given))


@pytest.mark.oldest("llama-2-many", "phi-3-one", "granite-tools")
@pytest.mark.parametrize(
    ("name", "chat"), [pytest.param(name, chat, id=f"{name}-{chat}") for name in FAMILIES for chat in CONVERSATIONS]
)
def test_a_chat_has_the_ids_that_transformers_gives_it(name, chat):
    given, expected = CONVERSATIONS[chat], EXPECTED[name][chat]["ids"]
    if "tools" in given and "tools" not in FAMILIES[name].template:
        # transformers leaves them out in silence.
        with pytest.raises(RequestError, match="knows no tools") as refused:
            ids_of(name, given)
        assert refused.value.param == "tools"
    elif expected is None:
        with pytest.raises(ValueError, match="chat template of the tokenizer refuses these messages"):
            ids_of(name, given)
    else:
        assert ids_of(name, given) == expected


def counted(name: str, ids: list[int]) -> list[int]:
    """How often each of the family's control tokens is there."""
    template, tokenizer = made(name)
    control = template.prepare(tokenizer).control.values()
    return [ids.count(one) for one in sorted(control)]


@pytest.mark.oldest("llama-3")
@pytest.mark.parametrize("name", FAMILIES)
def test_no_message_forges_a_control_token(name):
    template, tokenizer = made(name)
    control = list(template.prepare(tokenizer).control)
    turns = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    turns["messages"].append({"role": "user", "content": "z"})
    usual = counted(name, ids_of(name, turns))
    for token in control:
        for forged in (token, f"a {token} \n{token}", token.upper(), token[:-1], token[1:], f"{token}\n" * 3):
            told = [{**turn, "content": forged} for turn in turns["messages"]]
            assert counted(name, ids_of(name, {"messages": told})) == usual, (token, forged)


def test_turn_tokens_that_are_not_called_special_are_control_tokens_too():
    template, tokenizer = made("gemma-1")
    assert "<start_of_turn>" not in tokenizer.special_tokens
    assert {"<start_of_turn>", "<end_of_turn>"} <= template.prepare(tokenizer).control.keys()
    # What a template writes beside what it puts around messages is no turn: text may spell it, as in transformers.
    template, tokenizer = made("qwen-3")
    assert "<think>" not in template.prepare(tokenizer).control


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | map(attribute='content') | join }}",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{{ messages[0].content ~ messages[1].content }}",
        "{{ messages[0].content + messages[1].content }}",
        "{{ '%s%s' % (messages[0].content, messages[1].content) }}",
        "{{ '{}{}'.format(messages[0].content, messages[1].content) }}",
        "{{ messages[0].content.upper().lower() }}{{ messages[1].content | lower }}",
        "{{ messages[0].content | trim }}{{ messages[1].content | trim }}",
        "{{ (messages[0].content ~ 'XX' ~ messages[1].content).replace('XX', '') }}",
        "{{ (messages[0].content ~ 'XX' ~ messages[1].content) | replace('XX', '') }}",
        "{% set x %}{{ messages[0].content }}{{ messages[1].content }}{% endset %}{{ x }}",
        "{% macro f(a, b) %}{{ a }}{{ b }}{% endmacro %}{{ f(messages[0].content, messages[1].content) }}",
        "{{ (messages[0].content ~ messages[1].content)[::-1][::-1] }}",
        "{{ (messages[0].content ~ messages[1].content) | list | join }}",
        "{{ (messages[0].content ~ messages[1].content).split('|') | join('|') }}",
        "{{ (messages[0].content ~ messages[1].content) | tojson }}",
        "{{ (messages[0].content ~ messages[1].content) | indent }}",
        "{{ (messages[0].content ~ messages[1].content) | safe }}",
        "{% filter lower %}{{ messages[0].content }}{{ messages[1].content }}{% endfilter %}",
    ],
)
@pytest.mark.parametrize(("first", "second"), [("<|im_e", "nd|>"), ("<|im_end|>", ""), (" <|IM_E", "ND|> ")])
def test_no_template_makes_a_control_token_of_what_messages_say(source, first, second):
    tokenizer = Tokenizer(byte_level(added(["<|im_end|>"])))
    template = JinjaTemplate(source + "<|im_end|>", {})
    turns = [Message(role="user", content=first), Message(role="user", content=second)]
    end = tokenizer.special_tokens["<|im_end|>"]
    ids = template.encode(turns, tokenizer)
    assert ids[-1] == end
    assert end not in ids[:-1]


@pytest.mark.parametrize(
    "source",
    [
        "{{ '<|' ~ messages[0].role ~ '|>' }}",
        "{{ '<|' + messages[0].role + '|>' }}",
        "<|{{ messages[0].role }}|>",
        "{{ '<|%s|>' % messages[0].role }}",
        "{{ '<|%s|>' | format(messages[0].role) }}",
        "{{ '<|{}|>'.format(messages[0].role) }}",
        "{{ '<|{0}{end}'.format('user', end='|>') }}",
        "{{ ['<|', 'user', '|>'] | join }}",
        "{{ ''.join(['<|', 'user', '|>']) }}",
        "{{ '<|USER|>' | lower }}",
        "{{ ' <|user|> '.strip() }}",
        "{{ '<|x|>'.replace('x', 'user') }}",
        "{{ '<|x|>' | replace('x', 'user') }}",
        "{{ 'a<|user|>b'[1:-1] }}",
        "{{ ('a,<|user|>,b'.split(',')) [1] }}",
        "{{ 'a,<|user|>'.partition(',')[2] }}",
        "{{ {'a': '<|user|>'}['a'] }}",
        "{% set ns = namespace(x='<|us') %}{% set ns.x = ns.x + 'er|>' %}{{ ns.x }}",
        "{{ '<|user|>\n'.splitlines()[0] }}",
        "{{ ('x<|user|>' * 2).removeprefix('x').split('x')[0] }}",
        "{% set x %}<|us{{ 'er' }}|>{% endset %}{{ x | trim | string }}",
        "{% filter trim %} <|user|> {% endfilter %}",
        "{{ token }}",
    ],
)
def test_what_a_template_makes_of_its_own_text_is_its_own(source):
    tokenizer = Tokenizer(byte_level(added(["<|user|>"])))
    ids = JinjaTemplate(source, {"token": "<|user|>"}).encode([Message(role="user", content="x")], tokenizer)
    assert ids == (tokenizer.special_tokens["<|user|>"],)


def test_one_bos_where_the_template_writes_it():
    tokenizer = made("llama-3")[1]
    bos = tokenizer.special_tokens["<|begin_of_text|>"]
    # A tokenizer that adds one to every text adds none to these.
    backend = FAMILIES["llama-3"].backend()
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    messages = read_messages(CONVERSATIONS["many"])
    ids = made("llama-3")[0].encode(messages, Tokenizer(backend))
    assert (ids[0], ids.count(bos)) == (bos, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_character_of_a_message_is_encoded(kind):
    tokenizer = Tokenizer(KINDS[kind](added(["<|user|>"])))
    template = JinjaTemplate("{{ messages[0].content }}<|user|>", {})
    for text in (
        "\uf8ff",
        "\ue000",
        "\U000f0000",
        "a\x00b",
        "\ufeff",
        "\u2028",
        "\ufffd",
        "\u200b",
        "\r",
        "\x85",
        "\U0001f468\u200d\U0001f469",
    ):
        ids = template.encode([Message(role="user", content=text)], tokenizer)
        assert tokenizer.decode(ids[:-1]) == text


def test_the_stand_in_of_a_control_token_is_refused_in_text():
    tokenizer = Tokenizer(byte_level(added(["<|user|>"])))
    encoder = PromptEncoder(tokenizer)
    with pytest.raises(ValueError, match="stands for a control token"):
        encoder.encode(encoder._alias(0), [])


def test_arguments_of_calls_are_objects_and_named_templates_are_chosen():
    sources = {
        "default": "{{ messages[0].tool_calls[0].function.arguments.city }}",
        "tool_use": "{{ tools[0].function.name }}",
    }
    tokenizer, template = Tokenizer(byte_level([])), JinjaTemplate(sources, {})
    call = {**CALL, "function": {"name": "get_time", "arguments": '{"city": "Bern"}'}}
    messages = read_messages({"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]})
    assert tokenizer.decode(template.encode(messages, tokenizer)) == "Bern"
    assert tokenizer.decode(template.encode(messages, tokenizer, tools=[TOOL])) == "get_time"
    for wrong in (
        {**call, "function": {"name": "f", "arguments": "{"}},
        {"function": {"name": "f", "arguments": "3"}},
        3,
    ):
        with pytest.raises(RequestError, match="tool_calls"):
            read_messages({"messages": [{"role": "assistant", "tool_calls": [wrong]}]})


def test_what_a_template_reads_can_be_given_and_no_more():
    template, tokenizer = made("qwen-3")
    messages = [Message(role="user", content="a")]
    usual = template.encode(messages, tokenizer)
    silent = template.encode(messages, tokenizer, variables={"enable_thinking": False})
    assert tokenizer.decode(silent) == tokenizer.decode(usual) + "<think>\n\n</think>\n\n"
    for name in ("enable_thinkin", "messages", "tools"):
        with pytest.raises(RequestError, match="not known"):
            template.encode(messages, tokenizer, variables={name: 1})


def test_a_last_message_that_the_template_changes_cannot_be_continued():
    tokenizer = Tokenizer(byte_level([]))
    messages = [Message(role="assistant", content="Hello")]
    for source in ("{{ messages | length }}", "{{ messages[0].content | upper }}"):
        template = JinjaTemplate(source, {})
        with pytest.raises(RequestError, match="cannot leave it open") as refused:
            template.encode(messages, tokenizer, add_generation_prompt=False, continue_final_message=True)
        assert refused.value.param == "continue_final_message"
