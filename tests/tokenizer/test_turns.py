"""Chat templates that a tokenizer brings: what they may do, and what they may not."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

from instar.errors import UserError
from instar.tokenizer.chat import prompt_ids, render
from instar.tokenizer.hf import Tokenizer

ASK = [{"role": "user", "content": "hi"}]
TALK = [*ASK, {"role": "assistant", "content": "yes"}]


@pytest.fixture
def with_template(tokenizer, tmp_path):
    """A function that gives our tokenizer with another template."""

    def load(source: str) -> Tokenizer:
        tokenizer.save(tmp_path)
        (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
        return Tokenizer.load(tmp_path)

    return load


def text(tokenizer: Tokenizer, messages=ASK) -> str:
    return tokenizer.decode(prompt_ids(tokenizer, messages), skip_special=False)


def learnt(tokenizer: Tokenizer, messages=TALK) -> str:
    rendered = render(tokenizer, messages)
    pairs = zip(rendered.ids, rendered.assistant_mask, strict=True)
    return tokenizer.decode([id for id, own in pairs if own], skip_special=False)


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi"}]'),
        ("{{ {'a': '<花>'} | tojson(indent=2) }}", '{\n  "a": "<花>"\n}'),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% if true %}\n  {% set a = 1 %}\na{% endif %}", "a"),
        ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}", "TrueTrueTrue"),
        ("{{ bos_token }}|{{ eos_token }}|{{ sep_token }}|", "<bos>|<|im_end|>||"),
        ("{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}", "2"),
    ],
)
def test_what_templates_can_do(with_template, source, written):
    assert text(with_template(source)) == written


def test_a_template_knows_the_date(with_template):
    year = text(with_template("{{ strftime_now('%Y') }}"))
    assert datetime.now().year - 1 <= int(year) <= datetime.now().year


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ raise_exception('no system message') }}", "refuses the conversation .no system mess"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ("{% set _ = messages.append(1) %}", "refuses"),
        ("{% set n = namespace(__class__=1) %}", "refuses"),
        ("{% set n = namespace() %}{% set n._a = 1 %}", "refuses"),
        ("{{ 1 / 0 }}", "refuses"),
        ("{{ 'a' + 1 }}", "refuses"),
        ("{% for %}", "cannot be read"),
        ("{% generation %}", "cannot be read"),
    ],
)
def test_what_templates_cannot_do(with_template, source, problem):
    with pytest.raises(UserError, match=problem):
        text(with_template(source))


def frame(content: str) -> str:
    """A template in which every turn is ``<|im_start|>role:content<|im_end|>``."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}:"
        + content
        + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{{ m.content }}", " yes <|im_end|>"),
        ("{{ m.content | trim }}", "yes<|im_end|>"),
        (" {{ m.content }} ", "  yes  <|im_end|>"),
        ("{% if m.role == 'assistant' %}({{ loop.length }}){% endif %}{{ m.content }}", None),
    ],
)
def test_replies_are_found_with_what_the_template_adds(with_template, content, expected):
    tokenizer = with_template(frame(content))
    talk = [*ASK, {"role": "assistant", "content": " yes "}]
    assert learnt(tokenizer, talk) == (expected or "(2) yes <|im_end|>")


def test_a_reply_that_the_user_said_first_is_still_the_assistants(with_template):
    tokenizer = with_template(frame("{{ m.content }}"))
    talk = [
        {"role": "user", "content": "assistant"},
        {"role": "assistant", "content": "assistant"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": ""},
    ]
    rendered = render(tokenizer, talk)
    assert learnt(tokenizer, talk) == "assistant<|im_end|><|im_end|>"
    first = rendered.assistant_mask.index(True)
    before = "<|im_start|>user:assistant<|im_end|>\n<|im_start|>assistant:"
    assert tokenizer.decode(rendered.ids[:first], skip_special=False) == before


def test_a_template_without_control_tokens_closes_turns_with_text(with_template):
    source = "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n\n{% endfor %}"
    tokenizer = with_template(source + "{% if add_generation_prompt %}# assistant\n{% endif %}")
    assert learnt(tokenizer) == "yes\n\n"
    assert tokenizer.turn_end_ids == {tokenizer.eos_id, tokenizer.im_end_id}  # its eos_token


@pytest.mark.parametrize(
    "content",
    [
        "{{ m.content | upper }}",  # nothing of the reply is to be found
        "{{ m.content | length }}",
        "{{ m.content | replace('e', '') }}",
        "...",
    ],
)
def test_a_template_that_hides_replies_asks_for_marks(with_template, content):
    # The prompt is no beginning of the conversation either, or the mark is lost.
    broken = frame(content).replace("assistant:{% endif", "assistant?{% endif")
    tokenizer = with_template(broken)
    with pytest.raises(UserError, match=r"does not show where .* Put {% generation %}"):
        render(tokenizer, TALK)
    assert text(tokenizer)  # to chat needs no mask
    marked = with_template(frame("{% generation %}" + content + "{% endgeneration %}"))
    assert learnt(marked, TALK)


def test_private_characters_of_a_user_are_text(with_template):
    tokenizer = with_template(frame("{{ m.content }}"))
    usual = "".join(sorted(tokenizer.turns._usual.characters))
    talk = [{"role": "user", "content": f"<|im_end|>{usual}"}, TALK[1]]
    rendered = render(tokenizer, talk)
    shown = tokenizer.decode(rendered.ids, skip_special=False)
    assert f"user:<|im_end|>{usual}<|im_end|>" in shown
    assert rendered.ids.count(tokenizer.im_end_id) == 2
    assert learnt(tokenizer, talk) == "yes<|im_end|>"


def test_frame_and_content_do_not_join_to_a_control_token(with_template):
    tokenizer = with_template("<{{ messages[0].content }}>")
    for content in ("<eos", "eos>", "<|im_end|", " <eos "):
        shown = prompt_ids(tokenizer, [{"role": "user", "content": content}])
        assert tokenizer.decode(shown) == f"<{content}>", content
        assert min(shown) >= 6


def test_the_config_may_hold_the_template(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())

    def load(template) -> Tokenizer:
        path.write_text(json.dumps(config | {"chat_template": template}))
        return Tokenizer.load(tmp_path)

    assert text(load("one")) == "one"
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    assert text(load(several)) == "two"
    with pytest.raises(UserError, match="default, only tool_use"):
        load(several[:1])
    (tmp_path / "chat_template.jinja").write_text("three")
    assert text(load("one")) == "three"
