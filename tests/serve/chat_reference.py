"""Writes chat_reference.json: what transformers makes of every family's chats. Run it where transformers is installed.

    python tests/serve/chat_reference.py

Of each chat the rendered text and its ids, or null where transformers refuses it.
"""

import importlib.metadata
import json
from pathlib import Path

from chat_families import CONVERSATIONS, FAMILIES, Family

REFERENCE = Path(__file__).with_suffix(".json")


def expected(family: Family) -> dict[str, dict]:
    from transformers import PreTrainedTokenizerFast  # pyright: ignore[reportMissingImports]

    flags = {token.content: token for token in family.backend().get_added_tokens_decoder().values()}
    special = {name: flags.get(token, token) for name, token in family.special.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=family.backend(), **special)
    tokenizer.chat_template = family.template
    found = {}
    for name, chat in CONVERSATIONS.items():
        given = {"add_generation_prompt": True, **chat}
        messages = given.pop("messages")
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **given)
            ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **given)
        except Exception:
            text = ids = None
        found[name] = {"text": text, "ids": ids}
    return found


def main() -> None:
    families = {name: expected(family) for name, family in FAMILIES.items()}
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")}
    lines = ",\n".join(
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in chats.items())
        + "\n  }"
        for name, chats in families.items()
    )
    REFERENCE.write_text(
        f'{{\n "versions": {json.dumps(versions)},\n "families": {{\n{lines}\n }}\n}}\n', encoding="utf-8"
    )


if __name__ == "__main__":
    main()
