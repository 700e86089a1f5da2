"""Chat templates: rendered as transformers does, and kept in their sandbox."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tiny_tokenizers import gguf_metadata
from transformers.utils.chat_template_utils import render_jinja_template

from tokenmill.errors import ModelFileError, TokenmillError, UsageError
from tokenmill.models.text.chat import ChatTemplate
from tokenmill.models.text.load import load_tokenizer
from tokenmill.models.text.template_sandbox import ChatEnvironment, TemplateLimitError

USER = [{"role": "user", "content": "hi"}]
TALK = [
    {"role": "system", "content": "Be <b>brief</b> & 'nice'"},
    {"role": "user", "content": "天气?\n"},
    {"role": "assistant", "content": "é"},
    {"role": "user", "content": "and?"},
]
CALLS = [
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "look", "arguments": {"city": "Zürich"}}}],
    },
    {"role": "tool", "content": '{"t": 1}'},
]
TOOLS = [{"type": "function", "function": {"name": "look", "description": "<天气> & 'more'"}}]

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + (message['content'] or '') + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BLOCKS = """{{ bos_token }}
{%- if tools %}
    # Tools
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{% set ns = namespace(count=0) %}
{% macro show(m) %}[{{ m.role }}] {{ m.content | default('', true) | trim }}{% endmacro %}
{% for message in messages if message.role != 'system' %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    {% set ns.count = ns.count + 1 %}
    {% generation %}{{ show(message) ~ ' ' ~ loop.index ~ '/' ~ loop.length }}{% endgeneration %}

    {% for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}
    {% if loop.last %}{{ eos_token }}{% endif %}
{% endfor %}
count={{ ns.count }} {{ '%05.1f' % 3.14159 }} {{ '-' * 5 }} {{ 2 ** 10 }} {{ [1] + [2] }}
{{ messages[0].content.split('e')[0].upper().ljust(4) }} {{ undefined_name }}
"""


@pytest.mark.parametrize("source", [CHATML, BLOCKS])
@pytest.mark.parametrize("messages", [USER, TALK, CALLS])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_rendered_as_transformers_does(
    source: str, messages: list[Any], tools: list[Any] | None, add_generation_prompt: bool
) -> None:
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    expected, _ = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        **named,
    )
    found = ChatTemplate(source, named).render(
        messages, tools=tools, add_generation_prompt=add_generation_prompt
    )
    assert found == expected[0]


def test_variables_reach_the_template() -> None:
    template = ChatTemplate("{{ enable_thinking }} {{ bos_token }}", {"bos_token": "<s>"})
    assert template.render(USER, enable_thinking=False) == "False <s>"


def test_time_is_now() -> None:
    assert re.fullmatch(r"20\d\d", ChatTemplate("{{ strftime_now('%Y') }}").render(USER))


def test_tools_choose_their_own_template() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools"})
    assert template.render(USER) == "plain"
    assert template.render(USER, tools=TOOLS) == "tools"
    with pytest.raises(UsageError, match="no default chat template, only rag"):
        ChatTemplate({"rag": ""}).render(USER)


def test_template_of_a_tokenizer() -> None:
    assert ChatTemplate.of(load_tokenizer(gguf_metadata())).render(USER) == "hi"
    metadata = gguf_metadata()
    del metadata["tokenizer.chat_template"]
    with pytest.raises(UsageError, match="no chat template"):
        ChatTemplate.of(load_tokenizer(metadata))


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render([{"role": "user", "content": parts}]) == "one\ntwo"


def test_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "one"}]}]
    ChatTemplate("{{ messages[0].content }}").render(messages)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "one"}]}]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("hi", "messages is of type str"),
        ({"role": "user"}, "messages is of type dict"),
        (5, "messages is of type int"),
        ([], "messages is empty"),
        (["hi"], r"messages\[0\] is of type str"),
        ([{"content": "hi"}], r"messages\[0\]: role is None"),
        ([*USER, {"role": "usr", "content": ""}], r"messages\[1\]: role is 'usr', .* system"),
        ([{"role": ["user"], "content": ""}], r"role is \['user'\]"),
        ([{"role": "user"}], r"messages\[0\]: content is missing"),
        ([{"role": "assistant", "content": None}], "content is missing"),
        ([{"role": "user", "content": 5}], "content is of type int"),
        ([{"role": "user", "content": ["x"]}], r"content\[0\]: part 'of type str'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "part 'image_url' is not"),
        ([{"role": "user", "content": "", "x": {"y": object()}}], r"messages\[0\].x.y is of type"),
        ([{"role": "user", "content": "", 5: ""}], "key 5"),
    ],
)
def test_malformed_messages(messages: Any, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        ChatTemplate(CHATML).render(messages)


def test_a_template_may_refuse_messages() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match="refuses the messages: roles must alternate"):
        template.render(USER)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{% for %}", "broken at line 1"),
        ("\n{{ 'x' | no_such_filter }}", "broken at line 2"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ ''['__class__']['__mro__'] }}", "unsafe"),
        ("{{ (''|attr('__class__')).x }}", "unsafe"),
        ("{{ messages.append({}) }}", "safe"),
        ("{{ raise_exception.__globals__['json'] }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe"),
        ("{{ self.__init__.__globals__ }}", "unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "stopped"),
        ("{{ range(10000000) }}", "Range too big"),
        ("{{ 'x' * 10 ** 12 }}", "stopped: it made more"),
        ("{{ [0] * 10 ** 12 }}", "stopped: it made more"),
        ("{{ 7 ** (10 ** 10) }}", "stopped: it made more"),
        ("{{ 'x' | center(10 ** 12) }}", "stopped: it made more"),
        ("{{ 'x'.ljust(10 ** 12) }}", "stopped: it made more"),
        ("{{ '%1000000000000d' % 1 }}", "stopped: it made more"),
        ("{{ '%*d' % (10 ** 12, 1) }}", "stopped: it made more"),
        ("{{ '%1000000000000d' | format(1) }}", "stopped: it made more"),
        ("{{ '{:>1000000000000}'.format(1) }}", "stopped: it made more"),
        ("{{ messages | tojson(indent=10 ** 12) }}", "stopped: it made more"),
    ],
)
def test_what_a_template_may_not_do(source: str, problem: str) -> None:
    with pytest.raises(TokenmillError, match=problem) as caught:
        ChatTemplate(source).render(USER)
    assert "\n" not in str(caught.value)


ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for i in [1] recursive %}{{ loop([1, 2]) if loop.depth < 60 }}{% endfor %}",
    "{% set ns = namespace(x='ab') %}"
    "{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x='ab') %}"
    "{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=['ab']) %}"
    "{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}"
    + "x" * 1000
    + "{% endfor %}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{{ 'y' * 9999 }}{% endfor %}{% endset %}",
]


@pytest.mark.parametrize("source", ENDLESS)
def test_a_template_without_end_is_stopped(source: str) -> None:
    environment = ChatEnvironment(max_chars=10**6, max_seconds=0.2)
    with pytest.raises(TemplateLimitError):
        environment.from_string(source).render(messages=USER)


def test_a_stopped_template_can_be_used_again() -> None:
    template = ChatTemplate("{{ messages[0].content * 10 ** (12 if n else 0) }}")
    with pytest.raises(ModelFileError, match="stopped"):
        template.render(USER, n=1)
    assert template.render(USER, n=0) == "hi"


def test_long_conversations_are_within_the_allowance() -> None:
    messages = [{"role": "user", "content": "x" * 10_000}] * 200
    assert len(ChatTemplate(CHATML).render(messages)) > 2_000_000


def test_threads_share_a_template() -> None:
    template = ChatTemplate(CHATML)
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda _: template.render(TALK), range(40)))
    assert set(texts) == {ChatTemplate(CHATML).render(TALK)}


def test_no_rendering_waits_for_another() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    with template._template("default") as busy:
        assert template.render(USER) == "hi"
        assert busy.render(messages=USER) == "hi"


@pytest.mark.parametrize(
    ("template", "said", "end"),
    [
        (CHATML, "It is", "assistant\nIt is"),
        (CHATML, "It is ", "assistant\nIt is "),
        (CHATML, "n", "assistant\nn"),
        (CHATML, "<|im_end|>", "assistant\n<|im_end|>"),
        (CHATML, "", "assistant\n"),
        (CHATML.replace("or '')", "or '') | trim"), "It is ", "assistant\nIt is"),
    ],
)
def test_the_last_message_can_be_left_open(template: str, said: str, end: str) -> None:
    talk = [*USER, {"role": "assistant", "content": said}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert ChatTemplate(template).render(talk, **options).endswith(end)
    parts = [*USER, {"role": "assistant", "content": [{"type": "text", "text": said}]}]
    assert ChatTemplate(template).render(parts, **options).endswith(end)


def test_a_message_that_is_left_out_cannot_be_continued() -> None:
    with pytest.raises(UsageError, match="continue_final_message has nothing to continue"):
        ChatTemplate("{{ messages[0].content }}").render(
            TALK, add_generation_prompt=False, continue_final_message=True
        )


def test_an_error_of_the_template_is_readable() -> None:
    with pytest.raises(UsageError, match="cannot render these messages: TypeError"):
        ChatTemplate("{{ 'x' + 1 }}").render(USER)
    with pytest.raises(UsageError, match="misses something: 'nothing' is undefined"):
        ChatTemplate("{{ nothing.at.all }}").render(USER)
