"""Conversations as transformers' `apply_chat_template` renders them: `chat_templates.json`, read by `src/text/chat.rs`.

    python tests/oracles/chat_templates.py      # transformers 5.24.0, jinja2 3.1.6

The templates were written for this test: each uses what those of published models use. `strftime_now` is that of 26 July 2024.
"""

import datetime
import json
import pathlib

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

DAY = datetime.datetime(2024, 7, 26)


class FixedDay(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return DAY


chat_template_utils.datetime = FixedDay

USER = {"role": "user", "content": "  What is <b> & 'c' \"d\"?\n"}
ANSWER = {"role": "assistant", "content": "Ünïcode — 日本.\n\nTwo\ttabs "}
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [SYSTEM, USER, ANSWER]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CALL = {"name": "weather", "arguments": {"city": "Köln", "days": [1, 2], "exact": True, "unit": None, "x": 1.5}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "It's \"now\".", "parameters": {"b": 1, "a": {}}}}

PLAIN = """{% for message in messages %}{{ '<|' + message['role'] + '|>' }}
{{ message.content }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}"""

BOS_AND_TRIM = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "[system]" ~ system_message ~ "[/system]" }}
{%- for message in messages %}
    {{- '[' + message['role'] + ']' + message['content'] | trim + '[/' + message['role'] + ']' }}
{%- endfor %}"""

ALTERNATE = """{%- set ns = namespace(n=0, found=false) -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set ns.found = true -%}
        {%- continue -%}
    {%- endif -%}
    {%- if (message.role == 'user') != (ns.n % 2 == 0) -%}
        {{- raise_exception('Roles must alternate user/assistant/user, not ' + message.role) -}}
    {%- endif -%}
    {%- set ns.n = ns.n + 1 -%}
    {%- if loop.last %}{{ '!' }}{% endif -%}
    <{{ message.role.upper() }} {{ loop.index0 }}/{{ loop.length }}>{{ message.content.strip().replace('\\n', ' ') }}
{% endfor -%}
{{ ns.found }} {{ ns.n }}"""

TOOLS = """{%- if tools is defined and tools %}
{{- "# Tools\\n" }}
    {%- for tool in tools %}
{{- tool | tojson }}
{{ tool.function.parameters | tojson(indent=4) }}
{{ tool.function.parameters | tojson(indent=2, sort_keys=true) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
{{- '<call>' + call.name + ' ' + (call.arguments | tojson) + '</call>' }}
            {%- for name, value in call.arguments.items() %}
{{ name }}={{ value if value is string else value | tojson }};
            {%- endfor %}
        {%- endfor %}
    {%- elif message.content is string %}
{{- message.content }}
    {%- else %}
        {%- for part in message.content if part.type == 'text' %}
{{- part['text'] }}|
        {%- endfor %}
    {%- endif %}
{%- endfor %}"""

PYTHON = """{{ messages | length }} {{ messages[-1].role }} {{ messages[::-1][0].role }} {{ none }} {{ true }} {{ 1.0 }} {{ [1, 'a', none, "it's", true] }}
{% set text = messages[1].content %}
{{ text.split(' ')[0] }}|{{ text.lstrip() }}|{{ text.rstrip() }}|{{ text.startswith('  W') }}|{{ 'What' in text }}|{{ text[:4] }}|{{ text.split('&')[-1] }}
{{ 'system' if messages[0].role == 'system' else 'none' }} {{ unknown }} {{ unknown is defined }} {{ messages[0].get('name', 'nobody') }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | first }}
{{ messages | rejectattr('role', 'equalto', 'system') | list | length }}{{ {'a': 'b', 'c': [1]} }}
{{- "%s-%s" | format('a', 'b') }} {{ ['a', 'b'] | join(', ') }} {{ 'abc' | upper | replace('B', 'x') }} {{ 7 // 2 }} {{ 2 ** 3 }} {{ 7 % 4 }}
{%- for key, value in {'k': 1}.items() %} {{ key }}{{ value }}{% endfor %}"""

MACRO = """{%- macro shown(message, before='<<', after='>>') -%}
{{ before }}{{ message.role | capitalize }}: {{ message.content | trim }}{{ after }}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}{% generation %}{{ shown(message, after=eos_token) }}{% endgeneration %}
{%- else %}{{ shown(message) }}{% endif -%}
{%- if not loop.last and loop.nextitem.role == 'assistant' %}{{ '\\n' }}{% break %}{% endif -%}
{%- endfor -%}"""

DATE = """{%- set today = strftime_now("%d %B %Y") -%}
Today is {{ today }}, {{ strftime_now('%Y-%m-%d') }}, {{ strftime_now("%A %d %b %y %H:%M:%S %p %j %%") }}.
{%- for message in messages %}{{ message.content }}{% endfor %}"""

REASONING = """{%- for message in messages %}
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{%- if message.name is defined %}{{ message.name }}{% endif %}
{{- message.content }}
{%- if '</think>' in message.content %}{{ message.content.split('</think>')[-1].lstrip('\\n') }}{% endif %}
{%- endfor %}"""

CASES = {
    "roles": (PLAIN, {"messages": CHAT}),
    "BOS and trimmed": (BOS_AND_TRIM, {"messages": CHAT}),
    "BOS, no system": (BOS_AND_TRIM, {"messages": CHAT[1:]}),
    "alternating": (ALTERNATE, {"messages": [*CHAT, USER]}),
    "not alternating": (ALTERNATE, {"messages": [USER, USER]}),
    "tools": (TOOLS, {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": CALL}]}], "tools": [TOOL]}),
    "calls": (TOOLS, {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]}),
    "parts": (TOOLS, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]}),
    "Python": (PYTHON, {"messages": CHAT}),
    "macros and generation": (MACRO, {"messages": [*CHAT, USER, ANSWER]}),
    "macros without a break": (MACRO, {"messages": [ANSWER, SYSTEM]}),
    "date": (DATE, {"messages": CHAT}),
    "reasoning": (REASONING, {"messages": [USER, {**ANSWER, "thinking": "hm", "name": None}]}),
    "reasoning in the content": (REASONING, {"messages": [{"role": "assistant", "content": "<think>a</think>\n\nb"}]}),
    "attribute of nothing": ("{{ messages[0].name.first }}", {"messages": CHAT}),
    "syntax": ("{% for %}", {"messages": CHAT}),
}


def rendered(template, record):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **TOKENS)
    try:
        return tokenizer.apply_chat_template(
            record["messages"], tools=record.get("tools"), chat_template=template, tokenize=False
        )
    except Exception as error:
        print(type(error).__name__, error)
        return None


cases = [
    {"name": name, "template": template, "tokens": TOKENS, "record": record, "expected": rendered(template, record)}
    for name, (template, record) in CASES.items()
]
path = pathlib.Path(__file__).with_suffix(".json")
path.write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n")
