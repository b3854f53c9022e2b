"""Chat templates: what they may say, as transformers renders them, and what is refused."""

import pytest

from models import CheckpointError
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
