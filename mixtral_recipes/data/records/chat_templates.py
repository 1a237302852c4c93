"""Mixtral-Instruct's chat templates, with the assistant's part marked for the loss mask.

They encode as mistral-common does (its ``InstructTokenizerV1`` and ``V3``), which tests compare token by token. They
are used where a tokenizer brings no template: those of the base models, SentencePiece files and ``mistral://`` names.
"""

from pathlib import Path
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

# Mixtral 8x22B-Instruct: [INST] and [/INST] are tokens, system prompt and tools stand at the last user message, an
# answer's trailing spaces are dropped, and calls and results are JSON. `result` is a tool's content as JSON, where
# whoever renders has read it.
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
        {%- if tools is defined and tools and loop.index0 == ns.last -%}
            {{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' -}}
        {%- endif -%}
        {{- '[INST]' + (ns.system if loop.index0 == ns.last else '') + message['content'] + '[/INST]' -}}
    {%- elif message['role'] == 'assistant' and message['tool_calls'] is defined and message['tool_calls'] -%}
        {%- if message['content'] -%}
            {{- raise_exception('a turn holds text and tool calls, of which Mixtral knows one at a time') -}}
        {%- endif -%}
        {%- set ns.calls = [] -%}
        {%- for call in message['tool_calls'] -%}
            {%- set spoken = {'name': call['function']['name'], 'arguments': call['function']['arguments']} -%}
            {%- set ns.calls = ns.calls + [dict(spoken, id=call['id']) if call['id'] else spoken] -%}
        {%- endfor -%}
        {%- generation -%}{{- '[TOOL_CALLS]' + (ns.calls | tojson) + eos_token -}}{%- endgeneration -%}
    {%- elif message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'].rstrip(' ') + eos_token -}}{%- endgeneration -%}
    {%- elif message['role'] == 'tool' -%}
        {%- set content = message['result'] if message['result'] is defined else message['content'] -%}
        {{- '[TOOL_RESULTS]' + ({'content': content, 'call_id': message['tool_call_id']} | tojson) -}}
        {{- '[/TOOL_RESULTS]' -}}
    {%- elif message['role'] != 'system' -%}
        {{- raise_exception('Mixtral knows the roles system, user, assistant and tool, not ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
""".strip()


# ChatML. Its markers are words of the vocabulary only where the tokenizer has them; elsewhere they are ordinary text.
CHATML = """
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
""".strip()

NAMED = {"mixtral": MIXTRAL_V1, "mistral-v3": MIXTRAL_V3, "chatml": CHATML}


def named_template(name: str) -> str:
    """A template by its name in `NAMED`, from a file, or as it is.

    Raises:
        DataError: it is none of these.
    """
    if name in NAMED:
        return NAMED[name]
    if "{" in name:
        return name
    path = Path(name).expanduser()
    if not path.is_file():
        close = nearest(name, tuple(NAMED))
        raise DataError(f"chat_template={name!r}: no such file, and no template of that name.{close}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a chat template ({error}).") from error


def template_of(tokenizer: Any) -> str | None:
    """A transformers tokenizer's own template, of several by name the one called ``default``; None where it has none.

    Raises:
        DataError: it has several and none of that name.
    """
    own = tokenizer.chat_template
    if not isinstance(own, dict):
        return own
    if "default" not in own:
        raise DataError(f"the tokenizer has no chat template named 'default'; it has {', '.join(own)}.")
    return own["default"]


def template_for(tokenizer: Any, chat_template: str | None) -> str:
    """The template that conversations are tokenized with: the one that is named, the tokenizer's own, or the default.

    Args:
        tokenizer: A fast transformers tokenizer.
        chat_template: As `named_template` takes it, or None.

    Raises:
        DataError: there is no such template.
    """
    if chat_template is not None:
        return named_template(chat_template)
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return template_of(tokenizer) or default_template(added)


def default_template(added_tokens: set[str]) -> str:
    """The template for a tokenizer that has none.

    Args:
        added_tokens: Texts of its added tokens: where ``[INST]`` is one, it is of version 3.
    """
    return MIXTRAL_V3 if "[INST]" in added_tokens else MIXTRAL_V1
