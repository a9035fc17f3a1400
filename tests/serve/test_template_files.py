"""What the files beside a tokenizer.json say of its chats."""

import json

import pytest
from chat_families import FAMILIES
from chat_tokenizers import added, byte_level

from gcompute.model.tokenizer import Tokenizer
from gcompute.serve.template import JinjaTemplate, Message, PlainTemplate, load_template

pytest.importorskip("jinja2")

ONE = [Message(role="user", content="a")]
NAMED = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t{{ tools | length }}"}]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level(added(["<s>", "</s>", "<|eot|>"], plain=["<|turn|>"])))


def write(folder, **files) -> None:
    for name, value in files.items():
        suffix = ".jinja" if name == "chat_template" else ".json"
        (folder / (name + suffix)).write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tokenizer_config": {"chat_template": "x", "eos_token": 5}}, "eos_token must be text"),
        ({"tokenizer_config": {"chat_template": "x", "eos_token": ["</s>"]}}, "eos_token must be text"),
        ({"tokenizer_config": {"chat_template": "x", "bos_token": {"content": 3}}}, "bos_token must be text"),
        ({"tokenizer_config": {"chat_template": "x", "eos_token": False}}, "eos_token must be text"),
        ({"tokenizer_config": {"chat_template": 5}}, "chat_template must be text, or a list"),
        ({"tokenizer_config": {"chat_template": [{"name": "default"}]}}, "chat_template must be text, or a list"),
        ({"tokenizer_config": {"chat_template": [5]}}, "chat_template must be text, or a list"),
        ({"tokenizer_config": {"chat_template": NAMED[1:]}}, "none is 'default'"),
        ({"tokenizer_config": {"chat_template": "{% for %}"}}, "chat template of tokenizer_config.json does not parse"),
        ({"chat_template": "{{ 'a' | nofilter }}"}, "chat template of chat_template.jinja does not parse: No filter"),
        ({"tokenizer_config": [1]}, "no JSON object"),
        ({"tokenizer_config": "{" * 10**5}, "cannot be read"),
        ({"generation_config": {"eos_token_id": "7"}}, "eos_token_id must be a token id or a list"),
        ({"generation_config": {"eos_token_id": [1, -2]}}, "eos_token_id must be a token id or a list"),
        ({"generation_config": {"eos_token_id": True}}, "eos_token_id must be a token id or a list"),
    ],
)
def test_what_no_tokenizer_can_mean_is_refused_at_the_start_in_one_line(tmp_path, files, reason):
    write(tmp_path, **files)
    with pytest.raises(ValueError, match=reason) as refused:
        load_template(tmp_path, pytest.fail)
    assert "\n" not in str(refused.value)


def test_every_end_of_generation_config_ends_an_answer(tmp_path, tokenizer):
    ends = [tokenizer.special_tokens[name] for name in ("<|eot|>", "</s>")]
    write(tmp_path, generation_config={"eos_token_id": ends})
    assert load_template(tmp_path, pytest.fail).ends(tokenizer) == tuple(ends)
    write(tmp_path, tokenizer_config={"chat_template": "x", "eos_token": "<s>"})
    assert load_template(tmp_path, pytest.fail).ends(tokenizer) == (*ends, tokenizer.special_tokens["<s>"])
    write(tmp_path, generation_config={"eos_token_id": ends[0]}, tokenizer_config={"chat_template": "x"})
    assert load_template(tmp_path, pytest.fail).ends(tokenizer) == (ends[0],)
    write(tmp_path, generation_config={"eos_token_id": None})
    assert load_template(tmp_path, pytest.fail).ends(tokenizer) == ()


def test_an_end_is_a_control_token_though_it_is_not_called_special(tmp_path, tokenizer):
    turn = tokenizer.id_of("<|turn|>")
    write(tmp_path, chat_template="{{ messages[0].content }}<|turn|>", generation_config={"eos_token_id": turn})
    template = load_template(tmp_path, pytest.fail, tokenizer=tokenizer)
    ids = template.encode([Message(role="user", content="<|turn|>")], tokenizer)
    assert (ids[-1], ids.count(turn)) == (turn, 1)


@pytest.mark.parametrize(
    "more",
    [
        {"additional_special_tokens": ["<|turn|>"]},
        {"extra_special_tokens": {"turn_token": "<|turn|>"}},
        {"added_tokens_decoder": {"9": {"content": "<|turn|>", "special": True}}},
        {"pad_token": {"content": "<|turn|>"}},
    ],
)
def test_what_the_configuration_calls_special_is_a_control_token(tmp_path, tokenizer, more):
    write(tmp_path, tokenizer_config={"chat_template": "{{ messages[1].content }}", **more})
    template = load_template(tmp_path, pytest.fail)
    assert isinstance(template, JinjaTemplate)
    assert "<|turn|>" in template.prepare(tokenizer).control


def test_flags_of_added_tokens_in_the_configuration_win(tmp_path, tokenizer):
    described = {"1": {"content": "<|eot|>", "special": True, "rstrip": True, "normalized": False}}
    write(tmp_path, tokenizer_config={"chat_template": "<|eot|>\n a", "added_tokens_decoder": described})
    ids = load_template(tmp_path, pytest.fail).encode(ONE, tokenizer)
    assert ids == (tokenizer.special_tokens["<|eot|>"], *tokenizer.encode("a"))


def test_templates_by_name_as_a_list_an_object_and_files(tmp_path, tokenizer):
    def said(**more) -> str:
        return tokenizer.decode(load_template(tmp_path, pytest.fail).encode(ONE, tokenizer, **more))

    tools = [{"type": "function", "function": {"name": "f"}}]
    for source in (NAMED, {one["name"]: one["template"] for one in NAMED}):
        write(tmp_path, tokenizer_config={"chat_template": source})
        assert (said(), said(tools=tools), said(tools=[])) == ("d", "t1", "d")
    write(tmp_path, chat_template="own")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("file{{ tools[0].function.name }}")
    assert (said(), said(tools=tools)) == ("own", "filef")


def test_tokens_that_only_an_older_file_names(tmp_path, tokenizer):
    write(tmp_path, tokenizer_config={"chat_template": "{{ bos_token }}{{ cls_token is defined }}", "bos_token": None})
    write(tmp_path, special_tokens_map={"bos_token": {"content": "<s>"}})
    ids = load_template(tmp_path, pytest.fail).encode(ONE, tokenizer)
    assert ids == (tokenizer.special_tokens["<s>"], *tokenizer.encode("False"))


def test_without_any_file_chats_are_plain(tmp_path, tokenizer):
    template = load_template(tmp_path, pytest.fail)
    assert isinstance(template, PlainTemplate)
    open_ids = template.encode([Message(role="user", content="a")], tokenizer, add_generation_prompt=False)
    assert tokenizer.decode(open_ids) == "user: a\n"
    continued = template.encode(ONE, tokenizer, add_generation_prompt=False, continue_final_message=True)
    assert tokenizer.decode(continued) == "user: a"


def test_a_family_from_files(tmp_path):
    family = FAMILIES["llama-3.1"]
    tokenizer = Tokenizer(family.backend())
    write(tmp_path, chat_template=family.template, tokenizer_config=family.special)
    template = load_template(tmp_path, pytest.fail, tokenizer=tokenizer)
    assert template.ends(tokenizer) == (tokenizer.special_tokens["<|eot_id|>"],)
    assert template.encode(ONE, tokenizer)[0] == tokenizer.special_tokens["<|begin_of_text|>"]
