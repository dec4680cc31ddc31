"""Chat messages of which a template renders nothing are renamed or refused; what it only alters is neither."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest

from zeroinf.service.roles import Conversations, LostMessageError

KNOWS_TWO = (
    "{% for m in messages %}{% if m.role in ('system', 'user') %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
)
USER_ONLY = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
# The first message may be the system's, the others alternate; thoughts of earlier answers are left out.
STRICT = """
{%- if messages[0].role == 'system' %}{{ '<<' + messages[0].content.strip() | upper + '>>' }}{% endif %}
{%- for m in messages %}
  {%- if m.role == 'user' %}U:{{ m.content | trim }}
  {%- elif m.role == 'assistant' %}A:{{ m.content.split('</think>')[-1] }}
  {%- elif m.role != 'system' and m.role != 'developer' %}{{ raise_exception('no such role') }}
  {%- endif %}
{%- endfor %}"""
WANTS_JSON = "{% for m in messages %}{% if m.role == 'tool' %}{{ (m.content | loads).x }}{% endif %}{% endfor %}"


class Template:
    """Renders as transformers does, and counts how often."""

    def __init__(self, source: str) -> None:
        self.calls = 0
        environment = jinja2.Environment()

        def refuse(words: str) -> None:
            raise jinja2.TemplateError(words)

        def loads(text: str) -> dict[str, str]:
            if "{" not in text:
                raise jinja2.TemplateError("no JSON")
            return {"x": text}

        environment.globals["raise_exception"] = refuse
        environment.filters["loads"] = loads
        self._template = environment.from_string(source)

    def __call__(self, messages: Any) -> str:
        self.calls += 1
        return self._template.render(messages=messages)


def chat(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


def test_a_developer_message_that_would_be_skipped_is_a_system_message() -> None:
    asked = chat(("developer", "Be brief."), ("user", "Hi"))
    assert Conversations(Template(KNOWS_TWO)).render(asked) == "[system]Be brief.[user]Hi"
    assert Conversations(Template(STRICT)).render(asked) == "<<BE BRIEF.>>U:Hi"


def test_a_role_that_is_rendered_keeps_its_name() -> None:
    every = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    asked = chat(("developer", "Be brief."), ("user", "Hi"))
    assert Conversations(Template(every)).render(asked) == "[developer]Be brief.[user]Hi"


@pytest.mark.parametrize(
    ("source", "messages", "lost"),
    [
        (USER_ONLY, chat(("developer", "Be brief."), ("user", "Hi")), "message 1 (role 'developer')"),
        (USER_ONLY, chat(("system", "Be brief."), ("user", "Hi")), "message 1 (role 'system')"),
        (KNOWS_TWO, chat(("user", "Hi"), ("tool", "42")), "message 2 (role 'tool')"),
        (KNOWS_TWO, chat(("user", "Hi"), ("assistant", "Hello"), ("user", "?")), "message 2 (role 'assistant')"),
        (STRICT, chat(("user", "Hi"), ("system", "too late"), ("user", "?")), "message 2 (role 'system')"),
        (STRICT, chat(("user", "Hi"), ("developer", "too late"), ("user", "?")), "message 2 (role 'developer')"),
    ],
)
def test_a_message_of_which_nothing_is_rendered_is_refused_by_its_role(source: str, messages: Any, lost: str) -> None:
    with pytest.raises(LostMessageError) as refused:
        Conversations(Template(source)).render(messages)
    assert str(refused.value).startswith(lost)


@pytest.mark.parametrize(
    "messages",
    [
        chat(("system", "  strip and shout "), ("user", " Hi ")),
        chat(("user", "Hi"), ("assistant", "<think>hm</think>Hello"), ("user", "?")),
        chat(("user", "Hi"), ("assistant", "<think>only thoughts</think>"), ("user", "?")),
        chat(("user", "Hi"), ("developer", "  "), ("user", "")),
        chat(*(("user", f"turn {n}") for n in range(12))),
    ],
)
def test_what_a_template_only_alters_is_not_refused(messages: Any) -> None:
    template = Template(STRICT)
    assert Conversations(template).render(messages) == template(messages)


def test_what_a_template_raises_comes_through() -> None:
    with pytest.raises(jinja2.TemplateError, match="no such role"):
        Conversations(Template(STRICT)).render(chat(("critic", "Bad.")))


def test_a_template_that_reads_texts_is_asked_with_them() -> None:
    conversations = Conversations(Template(WANTS_JSON))
    assert conversations.render(chat(("tool", '{"a": 1}'))) == '{"a": 1}'
    with pytest.raises(LostMessageError, match=r"message 2 .*'user'"):
        conversations.render(chat(("tool", '{"a": 1}'), ("user", "Hi")))


def test_parts_of_a_content_are_looked_for_too() -> None:
    parts = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content[0].text }}{% endif %}{% endfor %}"
    text = [{"type": "text", "text": "Hi"}]
    conversations = Conversations(Template(parts))
    assert conversations.render([{"role": "user", "content": text}]) == "Hi"
    with pytest.raises(LostMessageError, match="message 1"):
        conversations.render([{"role": "system", "content": text}])


def test_conversations_of_the_same_roles_are_looked_at_once() -> None:
    template = Template(KNOWS_TWO)
    conversations = Conversations(template)
    for n in range(50):
        conversations.render(chat(("system", f"text {n}"), ("user", "Hi")))
    assert template.calls == 51
