"""Chat templates render as transformers renders them, and cannot do more than that."""

import pytest

from tightfit.cluster import chat
from tightfit.cluster.chat import ChatTemplate
from tightfit.cluster.errors import ConfigError, InvalidRequestError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CONVERSATION = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "user", "content": "Grüße, 世界!\n"},
    {"role": "assistant", "content": " Hallo. "},
    {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
]
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}\n"
        "    {% if loop.first and message['role'] != 'system' %}{{ 'default' }}{% endif %}\n"
        "    {{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system = '' %}"
        "{% endif %}{% for m in loop_messages %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (system if loop.index0 == 0 else '') + m['content'].strip() }}"
        "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "json-tools-namespace": (
        "{%- set ns = namespace(n=0) -%}{%- if tools is not none %}{{ 'TOOLS' }}{% endif -%}"
        "{%- if not documents %}none {% endif -%}"
        "{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}{{ m | tojson }}"
        "{{ m.content|tojson(2) }}"
        "{%- if ns.n == 3 -%}{% break %}{%- endif -%}{%- endfor -%}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "date": "{{ strftime_now('%Y') }}{{ undefined_name }}{{ messages | length }}",
}


def reference(template, conversation):
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        [conversation], chat_template=template, add_generation_prompt=True, **SPECIAL
    )
    return rendered[0]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_conversation_renders_as_in_transformers(name, length):
    template, conversation = TEMPLATES[name], CONVERSATION[-length:]
    rendered = ChatTemplate(template, SPECIAL).render(conversation)
    assert rendered == reference(template, conversation)
    assert rendered


def test_what_users_write_is_no_template():
    assert "{{ 7 * 7 }}" in ChatTemplate(TEMPLATES["chatml"], SPECIAL).render(CONVERSATION)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[9].content.x }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ undefined_function() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_what_a_template_may_not_or_cannot_do_refuses_the_chat(template):
    with pytest.raises(InvalidRequestError, match=r"^chat: ") as caught:
        ChatTemplate(template, SPECIAL).render(CONVERSATION)
    if "raise_exception" in template:
        assert "roles must alternate" in str(caught.value)


def test_output_is_bounded(monkeypatch):
    monkeypatch.setattr(chat, "MAX_RENDERED_CHARACTERS", 1000)
    template = ChatTemplate("{% for i in range(1001) %}x{% endfor %}", SPECIAL)
    with pytest.raises(InvalidRequestError, match="over 1000 characters"):
        template.render(CONVERSATION)


@pytest.mark.parametrize("source", ["{% for %}", "{{", "{% generation %}never ends", "{% nope %}"])
def test_a_template_that_is_not_jinja_is_a_configuration_error(source):
    with pytest.raises(ConfigError, match="chat template is not valid"):
        ChatTemplate(source, SPECIAL)
