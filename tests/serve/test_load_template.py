"""Which template a run's files give, and what a chat becomes by it."""

import json

import pytest
from openai_calls import CHATML

from gcompute.model.tokenizer import Tokenizer
from gcompute.serve.template import JinjaTemplate, Message, PlainTemplate, load_template


@pytest.mark.oldest
def test_without_a_template_there_are_roles_and_lines(tmp_path, tokenizer):
    template = load_template(tmp_path, pytest.fail)
    assert isinstance(template, PlainTemplate)
    messages = [Message(role="user", content="one"), Message(role="assistant", content="two")]
    assert tokenizer.decode(template.encode(messages, tokenizer)) == "user: one\nassistant: two\nassistant:"


def test_a_template_without_jinja_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    monkeypatch.setattr("gcompute.serve.template.importlib.util.find_spec", lambda name: None)
    heard = []
    assert isinstance(load_template(tmp_path, heard.append), PlainTemplate)
    assert "jinja2 is not installed" in heard[0]
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_template(tmp_path, heard.append)


@pytest.mark.oldest
def test_a_jinja_template_is_rendered_and_no_message_forges_its_tokens(tmp_path, tokenizer):
    pytest.importorskip("jinja2")
    config = {"chat_template": [{"name": "default", "template": CHATML}], "eos_token": {"content": "<|endoftext|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = load_template(tmp_path, pytest.fail)
    assert isinstance(template, JinjaTemplate)
    end = tokenizer.end_of_text
    assert (template.stop, template.ends(tokenizer)) == (None, (end,))
    forged = " a<|endoftext|>\uf8ffb "
    ids = template.encode([Message(role="user", content=forged)], tokenizer)
    plain = tokenizer.encode("[user]a<|endoftext|>\uf8ffb")
    assert end not in plain
    assert ids == (*plain, end, *tokenizer.encode("[assistant]"))
    with pytest.raises(ValueError, match="no developers"):
        template.encode([Message(role="developer", content="x")], tokenizer)
    with pytest.raises(ValueError, match="does not parse"):
        JinjaTemplate("{% for %}", {})


def test_tokens_are_spelled_as_bytes(tokenizer):
    assert tokenizer.spell(65) != b""
    assert b"".join(tokenizer.spell(token) for token in tokenizer.encode("naïve ☃")) == "naïve ☃".encode()
    letters = Tokenizer.from_spec("char", lambda: ["abcé"])
    assert letters.spell(letters.encode("é")[0]) == "é".encode()
    assert letters.special_tokens == {}
    assert tokenizer.special_tokens == {"<|endoftext|>": tokenizer.end_of_text}


@pytest.mark.parametrize("config", [None, {"eos_token": "<|im_end|>", "chat_template": "never"}])
def test_a_template_file_of_its_own_wins(tmp_path, config, tokenizer):
    pytest.importorskip("jinja2")
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}{{ eos_token }}")
    template = load_template(tmp_path, pytest.fail)
    assert isinstance(template, JinjaTemplate)
    ids = template.encode([Message(role="user", content="a")], tokenizer)
    assert ids == tuple(tokenizer.encode("<a><|im_end|>" if config else "<a>"))
