"""Mixtral-Instruct's chat templates, with the assistant's part marked for the loss mask.

They encode as mistral-common does (its ``InstructTokenizerV1`` and ``V3``), which tests compare token by token. They
are used where a tokenizer brings no template: those of the base models, SentencePiece files and ``mistral://`` names.
"""

from typing import Any

from mixtral_recipes.errors import DataError, nearest

# Mixtral 8x7B-Instruct: [INST] is ordinary text, the system prompt stands in the first user message.
MIXTRAL_V1 = """
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- set ns.system = message['content'] + '\n\n' -%}
    {%- elif message['role'] == 'user' -%}
        {{- '[INST] ' + ns.system + message['content'] + ' [/INST]' -}}
        {%- set ns.system = '' -%}
    {%- elif message['role'] == 'assistant' -%}
        {%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- raise_exception('Mixtral knows the roles system, user and assistant, not ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
""".strip()

# Mixtral 8x22B-Instruct: [INST] and [/INST] are tokens, the system prompt stands in the last user message, and an
# answer's trailing spaces are dropped.
MIXTRAL_V3 = """
{{- bos_token -}}
{%- set ns = namespace(system='', last=-1) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- set ns.system = message['content'] + '\n\n' -%}
    {%- elif message['role'] == 'user' -%}
        {%- set ns.last = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- '[INST]' + (ns.system if loop.index0 == ns.last else '') + message['content'] + '[/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'].rstrip(' ') + eos_token -}}{%- endgeneration -%}
    {%- elif message['role'] != 'system' -%}
        {{- raise_exception('Mixtral knows the roles system, user and assistant, not ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
""".strip()


def template_of(tokenizer: Any, name: str = "default") -> str | None:
    """One of a tokenizer's own templates; None where it has none.

    Args:
        tokenizer: A transformers tokenizer; it has one template, or several by name (``default``, ``tool_use``, ...).
        name: Which one.

    Raises:
        DataError: it has several and none of that name.
    """
    own = tokenizer.chat_template
    if not isinstance(own, dict):
        return own if name == "default" else None
    if name not in own:
        raise DataError(f"the tokenizer has no chat template named {name!r}.{nearest(name, list(own))}")
    return own[name]


def default_template(added_tokens: set[str]) -> str:
    """The template for a tokenizer that has none.

    Args:
        added_tokens: Texts of its added tokens: where ``[INST]`` is one, it is of version 3.
    """
    return MIXTRAL_V3 if "[INST]" in added_tokens else MIXTRAL_V1
