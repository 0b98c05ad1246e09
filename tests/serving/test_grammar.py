"""Replies that must have a form have it, whatever the model would rather write."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from instar.errors import UserError
from instar.serving.grammar import Vocabulary
from instar.serving.reasoning import Form, Thinking, behind_thought
from instar.serving.reasoning import begun as has_begun
from instar.serving.shortest import jump
from instar.tokenizer.hf import Tokenizer

NODE = {
    "type": "object",
    "properties": {
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
        "value": {"type": "string", "maxLength": 10},
    },
    "required": ["next", "value"],
}
TOWN = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "population": {"type": "number"},
        "tags": {"type": "array", "items": {"enum": ["large", "small", "coastal"]}},
    },
    "required": ["city", "population", "tags"],
}
SCHEMAS: list[dict[str, Any]] = [
    {},
    {"type": "object"},
    {"type": ["string", "null"]},
    {"type": "array", "items": TOWN},
    {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
    {"type": "array", "minItems": 2, "maxItems": 4, "items": {"type": "number"}},
    {"type": "array", "minItems": 30, "items": {"type": "integer"}},
    {"type": "string", "pattern": "^[a-z]{2,5}-[0-9]{1,4}$"},
    {"type": "string", "minLength": 60},
    {"type": "integer", "minimum": 3, "maximum": 40},
    {"enum": ['a"b', "c\\d", 3, None, {"x": [1]}]},
    {"type": "object", "properties": {"s": {"type": "string", "maxLength": 9}}, "required": ["s"]},
]


@pytest.fixture(scope="module")
def tokenizer(runs: Path) -> Tokenizer:
    return Tokenizer.load(runs / "sft")


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer, tokenizer.turn_end_ids)


def written(grammar: Form, tokenizer: Tokenizer, limit: int, seed: int) -> str:
    """What a model without any preference writes, which would rather not stop."""
    chance, ids = random.Random(seed), list[int]()
    while len(ids) < limit:
        allowed = grammar.allowed().nonzero().flatten().tolist()
        going_on = [id for id in allowed if id not in tokenizer.turn_end_ids]
        if not going_on:
            return tokenizer.decode(ids)
        ids.append(chance.choice(going_on))
        grammar.accept(ids[-1])
    pytest.fail(f"not finished after {limit} tokens: {tokenizer.decode(ids)!r}")


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_every_answer_is_json_of_the_schema(
    vocabulary: Vocabulary, tokenizer: Tokenizer, schema: dict[str, Any]
) -> None:
    for seed in range(36):  # some 500 answers in all
        text = written(vocabulary.json_schema(schema, 150), tokenizer, 150, seed)
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("begun", [False, True])
def test_thinking_before_a_form_leaves_room_for_it(thinker: Path, begun: bool) -> None:
    tokenizer = Tokenizer.load(thinker)
    [opening] = tokenizer.encode("<think>")
    vocabulary = Vocabulary(tokenizer, tokenizer.turn_end_ids)
    prompt = [*tokenizer.encode("Where?"), *([opening] if begun else [])]
    lengths = set[int]()
    for seed in range(30):
        form = vocabulary.json_schema(TOWN, 150)
        whole = behind_thought(form, tokenizer, prompt, 150).fork(150)
        text = written(whole, tokenizer, 150, seed)
        thinking = Thinking(begun)
        thought, answer = thinking.push(text)
        jsonschema.validate(json.loads(answer), TOWN)
        lengths.add(len(thought))
    assert max(lengths) > 20, "there is room to think"
    assert begun or min(lengths) == 0, "it need not think"


@pytest.mark.parametrize("form", ["enum", "regex"])
def test_behind_a_thought_without_end_the_model_still_chooses_its_answer(
    thinker: Path, form: str
) -> None:
    tokenizer = Tokenizer.load(thinker)
    vocabulary = Vocabulary(tokenizer, tokenizer.turn_end_ids)
    forms = {
        "enum": vocabulary.json_schema({"enum": ["yes", "no"]}, 64),
        "regex": vocabulary.regex("(yes|no)[a-z]{4}", 64),
    }
    [closing] = tokenizer.encode("</think>", special=True)
    prompt = tokenizer.encode("Is it?<think>")
    whole = behind_thought(forms[form], tokenizer, prompt, 64)
    thought, answer = 0, list[int]()
    while (thought + len(answer)) < 64 and not whole.finished:
        allowed = whole.allowed().nonzero().flatten().tolist()
        letters = {id: tokenizer.decode([id]) for id in allowed}
        if closing in allowed and len(allowed) > 1:
            token = next(id for id in allowed if id != closing)  # it would think on for ever
        else:
            token = next((id for id in allowed if "y" in letters[id]), allowed[0])
        whole.accept(token)
        if answer or token == closing:
            answer.append(token)
        else:
            thought += 1
    assert thought > 32, "there was room to think"
    said = tokenizer.decode(answer[1:])
    assert said.strip('"').startswith("yes")
    assert len(answer) + thought < 64, "it came to its end"


def test_tags_that_the_text_does_not_show_open_no_thinking(thinker: Path) -> None:
    file = thinker / "tokenizer.json"
    rust = json.loads(file.read_text(encoding="utf-8"))
    for added in rust["added_tokens"]:
        added["special"] |= added["content"] in ("<think>", "</think>")
    file.write_text(json.dumps(rust), encoding="utf-8")
    tokenizer = Tokenizer.load(thinker)
    prompt = tokenizer.encode("Where?<think>", special=True)
    form = Vocabulary(tokenizer, tokenizer.turn_end_ids).json_schema(TOWN, 150)
    assert behind_thought(form, tokenizer, prompt, 150) is form
    assert not has_begun(tokenizer, prompt)


def test_a_form_holds_from_the_first_token_where_thinking_is_over_or_unknown(
    thinker: Path, vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    form = vocabulary.json_schema(TOWN, 150)
    assert behind_thought(form, tokenizer, tokenizer.encode("<think>"), 150) is form
    other = Tokenizer.load(thinker)
    form = Vocabulary(other, other.turn_end_ids).json_schema(TOWN, 150)
    over = other.encode("<think>\n\n</think>\n\n")
    assert behind_thought(form, other, over, 150) is form


def test_the_end_comes_late_but_not_too_late(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    schema = {"type": "array", "items": {"type": "array", "items": {"type": "string"}}}
    for limit in (40, 80, 160):
        lengths = [
            len(
                tokenizer.encode(
                    written(vocabulary.json_schema(schema, limit), tokenizer, limit, s)
                )
            )
            for s in range(20)
        ]
        assert max(lengths) < limit, "the stop token has room as well"
        assert max(lengths) > limit / 2, "it is not closed for fear"


def test_many_replies_look_ahead_to_the_end_once(
    vocabulary: Vocabulary, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = list[object]()
    mask = Vocabulary.mask

    def counted(self: Vocabulary, matcher: object) -> Any:
        masks.append(matcher)
        return mask(self, matcher)

    monkeypatch.setattr(Vocabulary, "mask", counted)
    schema = {"type": "array", "minItems": 40, "items": {"type": "integer"}}
    first = vocabulary.json_schema(schema, 600)
    assert len(masks) > 80
    del masks[:]
    replies = [first.fork(limit) for limit in (600, 500, 300)]
    for reply in replies:
        reply.allowed()
    assert len(masks) == 3
    for seed, reply in enumerate(replies):
        jsonschema.validate(json.loads(written(reply, tokenizer, 600, seed)), schema)


def test_looking_ahead_takes_its_time_too(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instar.serving.grammar.MOST_S", 0.01)
    schema = {"type": "array", "minItems": 9_000, "items": {"type": "integer"}}
    with pytest.raises(UserError, match="too long"):
        vocabulary.json_schema(schema, 20_000)


def test_replies_to_one_request_share_the_time(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000))  # each mask takes a second
    monkeypatch.setattr("instar.serving.grammar.time.thread_time", lambda: next(clock))
    monkeypatch.setattr("instar.serving.grammar.MOST_S", 3.5)
    replies = [vocabulary.regex("[ab]{20}", 50).fork(50) for _ in range(4)]
    for reply in replies:
        reply.allowed()
    first = vocabulary.regex("[ab]{20}", 50)
    replies = [first.fork(50) for _ in range(4)]
    for reply in replies[:3]:
        reply.allowed()
    with pytest.raises(UserError, match="too long"):
        replies[3].allowed()


def test_properties_are_not_made_up(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for seed in range(20):
        text = written(vocabulary.json_schema(schema, 80), tokenizer, 80, seed)
        assert set(json.loads(text)) <= {"a"}


def test_a_call_stands_between_its_tags(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"name": {"const": "f"}}, "required": ["name"]}
    text = written(vocabulary.call(schema, 100), tokenizer, 100, 0)
    assert text == '<tool_call>\n{"name": "f"}\n</tool_call>'


def test_regular_expressions(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    texts = {written(vocabulary.regex("(a|b)[0-9]{2}", 9), tokenizer, 9, seed) for seed in range(9)}
    assert len(texts) > 3 and all(len(text) == 3 and text[0] in "ab" for text in texts)


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "fish"}, 'Unsupported type "fish"'),
        ({"$ref": "#/$defs/nothing"}, "Cannot find field"),
        ({"$ref": "#"}, "nothing can satisfy"),
        ({"enum": []}, "enum array must not be empty"),
        ({"type": "string", "pattern": "("}, "parenthesis is not closed"),
        ({"not": {"type": "string"}}, "uses `not`"),
        ({"properties": {"a": {"uniqueItems": True}}}, "uses `uniqueItems`"),
        ({"allOf": [{"type": "string"}, {"minLength": 2}]}, "uses `allOf`"),
        (False, "cannot accept any value"),
        (7, "should be an object or bool"),
        ({"enum": ["x" * 70_000]}, "has 70014 characters"),
        ({"type": "object", "properties": {str(i): {} for i in range(2000)}}, "has 2000 keys"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_what_replies_cannot_be_held_to_is_refused(
    vocabulary: Vocabulary, schema: Any, why: str
) -> None:
    with pytest.raises(UserError, match=why):
        vocabulary.json_schema(schema, 50)


def test_names_are_no_keywords(vocabulary: Vocabulary) -> None:
    properties = {"not": {"type": "string"}, "if": {"enum": [{"not": 1}]}}
    vocabulary.json_schema({"type": "object", "properties": properties}, 50)


def test_how_much_one_step_can_oblige_to() -> None:
    # {"city":"","population":0,"tags":[]} with the blanks that are written has 41 characters.
    assert 30 <= jump({"type": "array", "items": TOWN}) <= 60
    assert jump({"type": "object", "properties": {"a": {"enum": ["x" * 90, "y"]}}}) == 92
    assert jump({"type": "array", "items": {"type": "array"}}) < 10


def test_what_must_come_anyway_is_no_step() -> None:
    numbers = {"type": "array", "minItems": 90, "items": {"type": "integer"}}
    outer = {"type": "object", "properties": {"a": numbers}, "required": ["a"]}
    assert jump(numbers) < 10 and jump(outer) < 10
    assert jump({**outer, "required": []}) > 300
    assert jump({"type": "array", "items": numbers}) > 300
    again = {**numbers, "items": {"anyOf": [{"type": "integer"}, {"$ref": "#"}]}}
    assert jump(again) > 300


def test_schemas_that_refer_to_themselves_often_take_no_time() -> None:
    names = [f"p{i}" for i in range(20)]
    node = {
        "type": "object",
        "properties": {name: {"$ref": "#/$defs/node"} for name in names},
        "required": names,
    }
    # Twenty to the power of a depth would never end.
    assert jump({"$ref": "#/$defs/node", "$defs": {"node": node}}) >= 20 * 6


def test_schemas_are_not_nested_without_end(vocabulary: Vocabulary) -> None:
    schema: dict[str, Any] = {}
    for _ in range(60):
        schema = {"type": "array", "items": schema}
    vocabulary.json_schema(schema, 50)
    for _ in range(60):
        schema = {"type": "array", "items": schema}
    with pytest.raises(UserError, match="deep"):
        vocabulary.json_schema(schema, 50)
