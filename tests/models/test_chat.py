"""Chat templates: what they may say, as transformers renders them, and what is refused."""

import time

import pytest

from models import CheckpointError, bounded_jinja
from models.chat import render_chat

MESSAGES = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": 'é "<b>"'},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "b"},
]

LOOP = "{% for m in messages %}BODY{% endfor %}"
TEMPLATES = {
    "generation": "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}",
    "generation trimmed": LOOP.replace("BODY", "\n{%- generation -%} {{ m.content }} {%- endgeneration -%}\n"),
    "generation in lines": LOOP.replace("BODY", "\n  {% generation %}\n  {{ m.content }}\n  {% endgeneration %}\n"),
    "generation is a scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "generation in a generation": "{% generation %}a{% generation %}b{% endgeneration %}c{% endgeneration %}",
    "tools is not none": "{% if tools is not none %}tools{% endif %}{% if documents is not none %}documents{% endif %}",
    "tools is defined": "{{ tools is defined }}{{ documents is defined }}{{ unheard_of is defined }}",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ messages | tojson(ensure_ascii=true) }}",
    "tojson sorted": "{{ {'b': 1, 'a': 'é'} | tojson(true) }}{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true) }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}",
    "operators": "{{ 'a' * 3 ~ 1 + 2 ~ 'x' ~ none }}{{ '%s-%02d' % ('a', 3) }}{{ 2 ** 10 }}{{ [1] + [2] }}",
    "loop variables": LOOP.replace("BODY", "{{ loop.length }}{{ loop.last }}{{ loop.revindex }}{{ loop.cycle(1, 2) }}"),
    "loop over filtered": "{% for m in messages if m.role == 'user' %}{{ m.content | trim }}{% else %}-{% endfor %}",
    "macros": "{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(5) }}",
    "methods": "{{ messages[1].content.upper().split(' ')[0] }}{{ '{}'.format(3) }}{{ 'a,b'.replace(',', '') }}",
    "prompt": "{{ bos_token }}{% if add_generation_prompt %}go{% endif %}{{ eos_token }}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_template_gives_what_transformers_makes_of_it(template):
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    [theirs], _ = render_jinja_template([MESSAGES], chat_template=template, add_generation_prompt=True, **special)
    assert render_chat(template, MESSAGES, special_tokens=special) == theirs


@pytest.mark.parametrize(
    "template",
    ["{% generation %}a", "{% endgeneration %}", "{% generation %}{% for m in messages %}{% endgeneration %}"],
)
def test_a_generation_without_its_end_is_refused(template):
    with pytest.raises(CheckpointError, match="chat template can't take this conversation"):
        render_chat(template, MESSAGES, special_tokens={})


BOMBS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for i in range(99999) %}{% for j in range(99999) %}aaaa{% endfor %}{% endfor %}",
    "loops of filters": "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a product": "{{ 'a' * 10**9 }}",
    "a product the other way": "{{ 10**9 * [1] }}",
    "a power": "{{ 10 ** 10 ** 9 }}",
    "a width": "{{ 'a' | center(10**9) }}",
    "a method": "{{ 'a'.ljust(10**9) }}",
    "replacing": "{% set x = 'a' * 10**6 %}{{ x.replace('a', x) | length }}",
    "doubling": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "adding": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a block": "{% set x = 'a' * 10**6 %}{% set y %}{% for i in range(9999) %}{{ x }}{% endfor %}{% endset %}",
}


@pytest.mark.parametrize("template", BOMBS.values(), ids=BOMBS.keys())
def test_a_template_without_bound_is_refused_soon(template, monkeypatch):
    monkeypatch.setattr(bounded_jinja, "SECONDS", 1.0)
    began = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"can't take this conversation: .*(more than|power above)"):
        render_chat(template, MESSAGES, special_tokens={})
    assert time.perf_counter() - began < 8


def test_a_conversation_of_megabytes_is_taken():
    long = [{"role": "user", "content": "word " * 1_000_000}] * 3
    assert (
        len(render_chat(LOOP.replace("BODY", "{{ m.content.strip() + 'x' }}"), long, special_tokens={})) == 15_000_000
    )
