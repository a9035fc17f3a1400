# ruff: noqa: E501  (templates are lines as they are published)
"""Chat templates of our own that do what those of published families do, each with a tokenizer like that family's.

What they have in common with the published ones is what can go wrong: where BOS comes from, trimming, roles that become
parts of tokens, sets and namespaces, macros, slices of the messages, JSON with its keywords, tools, reasoning.
One long list: each template is read by itself, beside its tokenizer, and shares nothing with the next.
"""

from dataclasses import dataclass, field

import tokenizers
from chat_tokenizers import KINDS, added


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """kind: of its tokenizer. special: bos_token and so on. flags: of its special tokens."""

    kind: str
    template: str
    names: list[str]
    special: dict[str, str] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)
    flags: dict[str, bool] = field(default_factory=dict)

    def backend(self) -> tokenizers.Tokenizer:
        return KINDS[self.kind](added(self.names, plain=self.plain, **self.flags))


HEADERS = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|python_tag|>",
]
CHATML = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
TURNS = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
FULLWIDTH = [
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<\uff5cUser\uff5c>",
    "<\uff5cAssistant\uff5c>",
]
CALLS = ["<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581end\uff5c>"]

FAMILIES = {
    # Its special tokens are found after normalization, and so only where a piece of text begins.
    "vicuna": Family(
        kind="legacy",
        names=["<s>", "</s>"],
        special={"bos_token": "<s>", "eos_token": "</s>"},
        flags={"normalized": True},
        template="""{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}""",
    ),
    # BOS before every user turn, the system message folded into the first.
    "llama-2": Family(
        kind="legacy",
        names=["<s>", "</s>"],
        special={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        template="""{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}{% else %}{% set turns = messages %}{% set system = false %}{% endif %}{% for turn in turns %}{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('user and assistant take turns') }}{% endif %}{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + turn['content'] %}{% else %}{% set content = turn['content'] %}{% endif %}{% if turn['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif turn['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    ),
    "llama-3": Family(
        kind="byte-level",
        names=HEADERS,
        special={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        template="""{% set turns = messages %}{% for turn in turns %}{% set content = '<|start_header_id|>' + turn['role'] + '<|end_header_id|>\n\n' + turn['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
    ),
    # Tools as indented JSON, calls of them, and what they answered.
    "llama-3.1": Family(
        kind="byte-level",
        names=HEADERS,
        special={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        template="""{{- bos_token }}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Functions:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("one call at once") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    ),
    "mistral-v1": Family(
        kind="legacy",
        names=["<s>", "</s>"],
        special={"bos_token": "<s>", "eos_token": "</s>"},
        template="""{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token + ' ' }}{% else %}{{ raise_exception('roles are user and assistant') }}{% endif %}{% endfor %}""",
    ),
    # [INST] is a token, the last user turn has the system message and the tools are before it.
    "mistral-v3": Family(
        kind="first",
        names=[
            "<s>",
            "</s>",
            "[INST]",
            "[/INST]",
            "[TOOL_CALLS]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ],
        special={"bos_token": "<s>", "eos_token": "</s>"},
        template="""{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- set users = turns | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for m in turns %}
    {%- if m["role"] == "user" %}
        {%- if tools is not none and (m == users[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
            {%- endfor %}
            {{- "][/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system is defined %}
            {{- "[INST] " + system + "\\n\\n" + m["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + m["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif m.tool_calls is defined and m.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in m.tool_calls %}
            {%- set out = call.function|tojson %}
            {{- out[:-1] }}
            {{- ', "id": "' + call.id + '"}' }}
        {%- endfor %}
        {{- "]" + eos_token }}
    {%- elif m["role"] == "assistant" %}
        {{- " " + m["content"]|trim + eos_token }}
    {%- elif m["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + m.content|string + ", " }}
        {{- '"call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}
""",
    ),
    "qwen-2": Family(
        kind="byte-level",
        names=CHATML,
        special={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        template="""{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    ),
    "qwen-2.5": Family(
        kind="byte-level",
        names=CHATML,
        plain=["<tool_call>", "</tool_call>"],
        special={"eos_token": "<|im_end|>"},
        template="""{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\nAnswer in <tool_call></tool_call><|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
    ),
    # Looks for its own tokens in what an assistant said, and backwards for the last question.
    "qwen-3": Family(
        kind="byte-level",
        names=CHATML,
        plain=["<think>", "</think>"],
        special={"eos_token": "<|im_end|>"},
        template="""{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(looking=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.looking and message.role == "user" and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.looking = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}""",
    ),
    # The assistant is called model; a system message is refused.
    "gemma": Family(
        kind="none",
        names=TURNS,
        special={"bos_token": "<bos>", "eos_token": "<eos>"},
        template="""{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}""",
    ),
    # Its turn tokens are added, and not called special.
    "gemma-1": Family(
        kind="none",
        names=["<bos>", "<eos>"],
        plain=["<start_of_turn>", "<end_of_turn>"],
        special={"bos_token": "<bos>", "eos_token": "<eos>"},
        template="""{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' ~ message.role ~ '\n' ~ message.content.strip() ~ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}""",
    ),
    # The system message before the first user's, content as text or as parts.
    "gemma-3": Family(
        kind="none",
        names=TURNS,
        special={"bos_token": "<bos>", "eos_token": "<eos>"},
        template="""{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set prefix = messages[0]['content'] + '\n\n' -%}{%- else -%}{%- set prefix = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set prefix = "" -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
""",
    ),
    # Tokens that take the white space after them, and roles that become tokens.
    "phi-3": Family(
        kind="legacy",
        names=["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        special={"bos_token": "<s>", "eos_token": "<|endoftext|>"},
        flags={"rstrip": True},
        template="""{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}""",
    ),
    "phi-4": Family(
        kind="gpt2",
        names=["<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|endoftext|>"],
        special={"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
        flags={"lstrip": True, "rstrip": True},
        template="""{% for message in messages %}{% if (message['role'] == 'system') %}{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'assistant') %}{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}""",
    ),
    "zephyr": Family(
        kind="legacy",
        names=["<s>", "</s>"],
        special={"bos_token": "<s>", "eos_token": "</s>"},
        template="""{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    ),
    "deepseek-v2": Family(
        kind="byte-level",
        names=FULLWIDTH,
        special={"bos_token": FULLWIDTH[0], "eos_token": FULLWIDTH[1]},
        template="""{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}""",
    ),
    # A namespace that collects the system messages; full-width bars; reasoning that is left out of what was said.
    "deepseek-r1": Family(
        kind="byte-level",
        names=[*FULLWIDTH, *CALLS],
        plain=["<think>", "</think>"],
        special={"bos_token": FULLWIDTH[0], "eos_token": FULLWIDTH[1]},
        template="""{% set ns = namespace(system='', first=true) %}{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system = message['content'] if ns.first else ns.system + '\\n\\n' + message['content'] %}{% set ns.first = false %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system }}{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<\uff5cUser\uff5c>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is defined %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<\uff5cAssistant\uff5c>' + content + '<\uff5cend\u2581of\u2581sentence\uff5c>'}}{%- endif %}{%- if message['role'] == 'assistant' and message['tool_calls'] %}{%- for call in message['tool_calls'] %}{{'<\uff5ctool\u2581calls\u2581begin\uff5c>' + call['type'] + '\\n' + call['function']['name'] + '\\n```json\\n' + (call['function']['arguments'] | tojson(sort_keys=true, separators=(',', ':'))) + '\\n```<\uff5ctool\u2581call\u2581end\uff5c>'}}{%- endfor %}{%- endif %}{%- endfor %}{% if add_generation_prompt %}{{'<\uff5cAssistant\uff5c><think>\\n'}}{% endif %}""",
    ),
    # Macros, joins, loop controls, items() and pieces put together with ~.
    "command-r": Family(
        kind="byte-level",
        names=[
            "<BOS_TOKEN>",
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
        ],
        special={"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"},
        template="""{{ bos_token }}{%- macro turn(who, text) -%}<|START_OF_TURN_TOKEN|>{{ '<|' ~ who|upper ~ '_TOKEN|>' }}{{ text }}<|END_OF_TURN_TOKEN|>{%- endmacro -%}
{%- set names = {'user': 'user', 'assistant': 'chatbot', 'system': 'system'} -%}
{%- if tools %}{{ turn('system', '## Tools: ' + tools | map(attribute='function.name') | join(', ')) }}{% for tool in tools %}{% for name, param in tool.function.parameters.properties.items() %}{{ '\n' ~ name ~ ' (' ~ param.type ~ '): ' ~ param.description|default('', true) }}{% endfor %}{% endfor %}{% endif -%}
{%- for message in messages -%}{%- if message.role not in names -%}{%- continue -%}{%- endif -%}{{ turn(names[message.role], message.content|default('', true)|trim) }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ ['<|START_OF_TURN_TOKEN|>', '<|CHATBOT_TOKEN|>'] | join }}{%- endif -%}""",
    ),
    "yi": Family(
        kind="first",
        names=["<s>", *CHATML],
        special={"bos_token": "<s>", "eos_token": "<|im_end|>"},
        template="""{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% endif %}{% if system is defined %}{{ system }}{% endif %}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|im_start|>user\\n' + message['content'] + '<|im_end|>\\n<|im_start|>assistant\\n' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + '<|im_end|>' + '\\n' }}{% endif %}{% endfor %}""",
    ),
    "falcon": Family(
        kind="gpt2",
        names=["<|endoftext|>"],
        special={"eos_token": "<|endoftext|>"},
        template="""{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}{% if message['role'] == 'system' %}{{ message['content'] }}{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'].replace('\r\n', '\n').replace('\n\n', '\n') }}{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\n' + 'Assistant:' }}{% endif %}""",
    ),
    "olmo": Family(
        kind="gpt2",
        names=["<|endoftext|>"],
        plain=["  ", "    "],
        special={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
        template="""{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}{% else %}{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}""",
    ),
    # What lies in a generation block is for who trains.
    "smollm": Family(
        kind="byte-level",
        names=CHATML,
        special={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        template="""{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content }}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ '<|im_start|>%s\n' % m.role }}{{ m.content }}{{ '{}\n'.format('<|im_end|>') }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    ),
    "granite": Family(
        kind="gpt2",
        names=["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"],
        special={"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>"},
        template="""{%- if tools %}
    {{- '<|start_of_role|>available_tools<|end_of_role|>\n' }}
    {%- for tool in tools %}
    {{- tool | tojson(indent=2, ensure_ascii=true) }}
    {%- if not loop.last %}
        {{- '\n\n' }}
    {%- endif %}
    {%- endfor %}
    {{- '<|end_of_text|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' and message.tool_calls %}
    {{- '<|start_of_role|>assistant<|end_of_role|><|tool_call|>' + (message.tool_calls | tojson) + '<|end_of_text|>\n' }}
    {%- elif message['role'] == 'tool' %}
    {{- '<|start_of_role|>tool_response<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}
    {%- else %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_of_role|>assistant<|end_of_role|>' }}
{%- endif %}""",
    ),
}

TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": 'The <time> in a "city", \u00e9t\u00e9',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "its name"}},
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "get_time", "arguments": {"zone": "\u00e9", "city": "Bern"}},
}

CONVERSATIONS = {
    "one": {"messages": [{"role": "user", "content": "hello there"}]},
    "many": {
        "messages": [
            {"role": "system", "content": " You are the tool, it's\n"},
            {"role": "user", "content": "  Hello\n\nuser \u4f60\u597d \U0001f600 caf\u00e9\t! \uf8ff"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\n the assistant  "},
            {"role": "user", "content": "1234 </x> [INS] <|user \r\n\r\n"},
        ]
    },
    "tools": {
        "messages": [
            {"role": "user", "content": "the time in Bern"},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "content": '{"time": "10:00"}', "tool_call_id": "call12345", "name": "get_time"},
        ],
        "tools": [TOOL],
    },
    "continued": {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Hello the \n"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
    "ended": {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b "},
            {"role": "user", "content": "c"},
        ],
        "add_generation_prompt": False,
    },
}
