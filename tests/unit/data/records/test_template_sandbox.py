"""Chat templates: what they make is what transformers makes of them, and none loops or grows without end."""

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mixtral_recipes.data.records import template_sandbox
from mixtral_recipes.data.records.chat_templates import NAMED
from mixtral_recipes.errors import DataError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo "},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": " b"},
]
# What templates on the Hub do: slices, joined texts, lists that grow, loops with `loop`, macros, filters, tests.
CLUMSY = """
{%- macro shown(text, width=4) -%}{{ text | trim ~ '/' ~ width }}{%- endmacro -%}
{%- set ns = namespace(all=[], text='') -%}
{%- for message in messages[1:] if message.role != 'system' -%}
  {%- set ns.all = ns.all + [message['role'] | upper, loop.index0, loop.last] -%}
  {%- set ns.text = ns.text ~ '%s:%3d' | format(message.role, loop.length) + shown(message.content, width=2) -%}
  {%- if loop.index > 3 %}{% break %}{% endif -%}
{%- endfor -%}
{{- bos_token * 2 + ns.text + (ns.all | tojson(indent=2)) + ', '.join(['a', 'b']) + 'x'.center(5) -}}
{%- for key, value in dict(a=1, b={'c': (1, 2)}).items() | list -%}{{ key }}={{ value }}{%- endfor -%}
{%- generation -%}{{ messages | map(attribute='content') | join('|') | replace('hi', 'ho') }}{%- endgeneration -%}
"""


@pytest.mark.parametrize("template", [*NAMED.values(), CLUMSY])
def test_a_template_makes_what_transformers_makes_of_it(template: str) -> None:
    text, spans = template_sandbox.render(template, TOKENS, TALK, "here")
    theirs: Any = render_jinja_template(
        conversations=[TALK], chat_template=template, return_assistant_tokens_mask=True, **TOKENS
    )
    assert (text, spans) == (theirs[0][0], theirs[1][0])
    assert spans


DOUBLED = (
    "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = MORE %}{% endfor %}{{ ns.x | length }}"
)
ENDLESS = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "endless output": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "a long text": "{{ 'x' * 10000000000 }}",
    "a long list": "{{ 10000000000 * [1] }}",
    "a power": "{% set x = 9 %}{{ x ** 99999999 }}",
    "doubled by +": DOUBLED.replace("START", "'xx'").replace("MORE", "ns.x + ns.x"),
    "doubled by ~": DOUBLED.replace("START", "'xx'").replace("MORE", "ns.x ~ ns.x"),
    "a list doubled": DOUBLED.replace("START", "[1]").replace("MORE", "ns.x + ns.x"),
    "lists in lists": DOUBLED.replace("START", "[1]").replace("MORE", "[ns.x, ns.x]"),
    "tables in tables": DOUBLED.replace("START", "{}").replace("MORE", "dict(a=ns.x, b=ns.x)"),
    "a width": "{{ 'x'.center(10**10) }}",
    "a filter's width": "{{ 'x' | center(10**10) }}",
    "a format's width": "{{ '%99999999999d' | format(1) }}",
    "a format's width, by operator": "{% set x = 1 %}{{ '%99999999999d' % x }}",
    "a format's width, by method": "{{ '{:99999999999}'.format(1) }}",
    "replaced": "{% set x = 'x' * 1000000 %}{{ x.replace('x', x) }}",
    "replaced by a filter": "{% set x = 'x' * 1000000 %}{{ x | replace('x', x) }}",
    "joined": "{% set x = 'x' * 1000000 %}{{ ([x] * 100000) | join }}",
    "translated": "{% set x = 'x' * 1000000 %}{{ x.translate({120: x}) }}",
    "tabs": "{{ ('\t' * 1000000).expandtabs(99999) }}",
    "wrapped": "{% set x = 'x ' * 1000000 %}{{ x | wordwrap(1, wrapstring=x) }}",
    "added lists": "{{ ([[1] * 1000] * 100000) | sum(start=[]) }}",
    "slices": "{% set x = 'x' * 10000000 %}{% for i in range(99999) %}{% set y = x[:] %}{% endfor %}",
    "a call that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "not a template": "{% for %}",
    "a long template": "x" * 2_000_000,
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_refused_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MOST_STEPS", 50_000)
    monkeypatch.setattr(template_sandbox, "MOST_CHARACTERS", 16 << 20)
    with pytest.raises(DataError, match=r"^here: the chat template refuses this conversation") as caught:
        template_sandbox.render(ENDLESS[name], TOKENS, TALK, "here")
    assert "\n" not in str(caught.value)


def test_a_template_that_takes_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    monkeypatch.setattr(template_sandbox, "LONGEST_S", 0.0)
    with pytest.raises(DataError, match="it takes longer than"):
        template_sandbox.render(twice, TOKENS, TALK, "here")
