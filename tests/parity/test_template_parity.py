"""Other models' tokenizers and chat templates: ids and masks against transformers.

The tokenizers are small ones of the same build as the families' own; the templates are written in
the manner of theirs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer

from instar.tokenizer.bpe import PATTERN
from instar.tokenizer.chat import CHAT_TEMPLATE, prompt_ids, render
from instar.tokenizer.hf import Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. Hello there, hello again.\n\n" * 4,
    "春眠不觉晓，处处闻啼鸟。user assistant system [INST] You are helpful.\n" * 4,
    "12 + 34 = 46 <think>\n\n</think>\n\n<|user|>\n  indented\tcode() { return 0; }" * 2,
]

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

LLAMA2 = """{% set ns = namespace(system='') %}
{% if messages[0]['role'] == 'system' %}
{% set ns.system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
{% set rest = messages[1:] %}
{% else %}
{% set rest = messages %}
{% endif %}
{% for message in rest %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must take turns') }}
{% endif %}
{% if message['role'] == 'user' %}
{{- bos_token + '[INST] ' + (ns.system if loop.first else '') + message['content'].strip() }}
{{- ' [/INST]' }}
{% else %}
{{- ' ' + message['content'].strip() + ' ' + eos_token }}
{% endif %}
{% endfor %}"""

LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

MISTRAL = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system is defined %}
            {{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""

SMOLLM = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a kind assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == 'user' %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n') %}
            {%- set thought = thought.split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
            {{- content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

# The prompt opens a thought that finished turns no longer show, so it begins no conversation.
DEEPSEEK = """{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|Assistant|>' + message['content'].split('</think>')[-1] + eos_token }}
    {%- elif message['role'] == 'user' %}{{- '<|User|>' + message['content'] }}
    {%- else %}{{- message['content'] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\n' }}{%- endif %}"""

GENERATION = """{{ bos_token }}{% for message in messages %}
{% if message.role == 'assistant' %}
<|start_header_id|>assistant<|end_header_id|>{% generation %}

{{ message.content }}<|eot_id|>{% endgeneration %}
{% else %}
<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content }}<|eot_id|>
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"""


def trained(pre_tokenizer: Any, alphabet: list[str], size: int) -> dict[str, Any]:
    """Vocabulary and merges of a small BPE."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    rust.train_from_iterator(TEXTS, trainer)
    return json.loads(rust.to_str())["model"]


def sentence_pieces(first: bool, control: list[str]) -> RustTokenizer:
    """As Llama-2 and Mistral: pieces of characters, ``▁`` for a space, bytes for the rest.

    Args:
        first: Put ``▁`` before the text only, as later files do, or before every stretch of it.
        control: Control tokens, the unknown one first.
    """
    learnt = trained(pre_tokenizers.Metaspace(), [], 420)
    pieces = [*control, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece in learnt["vocab"] if piece not in pieces]
    merges = [(a, b) for a, b in learnt["merges"]]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    rust = RustTokenizer(
        models.BPE(vocab, merges, unk_token=control[0], fuse_unk=True, byte_fallback=True)
    )
    if first:
        rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        rust.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    rust.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    begin_with(rust, control[1])
    return rust


def byte_level(control: list[str], plain: tuple[str, ...] = (), regex: str = "") -> RustTokenizer:
    """As GPT-2 (its own pattern), Llama-3 and Qwen (a pattern of theirs)."""
    if regex:
        split = pre_tokenizers.Split(Regex(regex), behavior="isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        cut: Any = pre_tokenizers.Sequence([split, bytes_])
    else:
        cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learnt = trained(cut, pre_tokenizers.ByteLevel.alphabet(), 400)
    rust = RustTokenizer(models.BPE(learnt["vocab"], [(a, b) for a, b in learnt["merges"]]))
    rust.pre_tokenizer = cut
    rust.decoder = decoders.ByteLevel()
    rust.post_processor = processors.ByteLevel(trim_offsets=False)
    rust.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    rust.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    return rust


def begin_with(rust: RustTokenizer, bos: str) -> None:
    """Put the token before every text, as Llama does."""
    ids = [(bos, rust.token_to_id(bos))]
    rust.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)


LLAMA3_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
DEEPSEEK_TOKENS = ["<|begin▁of▁sentence|>", "<|end▁of▁sentence|>", "<|User|>", "<|Assistant|>"]
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MISTRAL_TOKENS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]


def llama3() -> RustTokenizer:
    rust = byte_level(LLAMA3_TOKENS, regex=PATTERN)
    begin_with(rust, "<|begin_of_text|>")
    return rust


@dataclass(frozen=True)
class Family:
    """A tokenizer with its template and config, and what a model of it ends replies with."""

    rust: Any
    template: str | None
    config: dict[str, Any]
    ends: set[str]
    replies: list[str] = field(default_factory=list)
    """What the mask covers in ``CONVERSATION``."""


S = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
L3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
FAMILIES = {
    "zephyr": Family(
        lambda: sentence_pieces(False, ["<unk>", "<s>", "</s>"]),
        ZEPHYR,
        S,
        {"</s>"},
        ["Hello.</s>", " 46 you </s>"],
    ),
    "llama2": Family(
        lambda: sentence_pieces(True, ["<unk>", "<s>", "</s>"]),
        LLAMA2,
        S,
        {"</s>"},
        [" Hello. </s>", " 46 you </s>"],
    ),
    "mistral": Family(
        lambda: sentence_pieces(True, MISTRAL_TOKENS),
        MISTRAL,
        # As files before 2023 write tokens: objects.
        {name: {"__type": "AddedToken", "content": token} for name, token in S.items()},
        {"</s>"},
        [" Hello.</s>", " 46 you</s>"],
    ),
    "llama3": Family(
        llama3,
        LLAMA3,
        L3,
        {"<|eot_id|>", "<|end_of_text|>"},
        ["Hello.<|eot_id|>", "46 you<|eot_id|>"],
    ),
    "smollm": Family(
        lambda: byte_level(CHATML_TOKENS),
        SMOLLM,
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        {"<|im_end|>", "<|endoftext|>"},
        ["Hello.<|im_end|>", " 46 you <|im_end|>"],
    ),
    "qwen3": Family(
        lambda: byte_level(CHATML_TOKENS, ("<think>", "</think>"), PATTERN),
        QWEN3,
        {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        {"<|im_end|>", "<|endoftext|>"},
        ["Hello.<|im_end|>", "<think>\n\n</think>\n\n 46 you <|im_end|>"],
    ),
    "deepseek": Family(
        lambda: byte_level(DEEPSEEK_TOKENS, ("<think>", "</think>")),
        DEEPSEEK,
        {"bos_token": DEEPSEEK_TOKENS[0], "eos_token": DEEPSEEK_TOKENS[1]},
        {DEEPSEEK_TOKENS[1]},
        ["Hello." + DEEPSEEK_TOKENS[1], " 46 you " + DEEPSEEK_TOKENS[1]],
    ),
    "generation": Family(
        llama3,
        GENERATION,
        L3,
        {"<|eot_id|>", "<|end_of_text|>"},
        ["\nHello.<|eot_id|>", "\n 46 you <|eot_id|>"],
    ),
    "gpt2": Family(
        lambda: byte_level(["<|endoftext|>"]),
        None,
        {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"},
        {"<|endoftext|>"},
        ["Hello.<|endoftext|>", "46 you<|endoftext|>"],
    ),
    "llama-base": Family(
        lambda: sentence_pieces(False, ["<unk>", "<s>", "</s>"]),
        None,
        S,
        {"</s>"},
        ["Hello.</s>", "46 you</s>"],
    ),
    "qwen-base": Family(
        lambda: byte_level(CHATML_TOKENS, regex=PATTERN),
        None,
        {"eos_token": "<|endoftext|>"},
        {"<|im_end|>", "<|endoftext|>"},
        ["Hello.<|im_end|>", "46 you<|im_end|>"],
    ),
}

CONVERSATION = [
    {"role": "system", "content": "Be helpful."},
    {"role": "user", "content": "hello, you"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "12 + 34?"},
    {"role": "assistant", "content": " 46 you "},
]


@pytest.fixture(scope="session", params=FAMILIES)
def family(request, tmp_path_factory):
    """The family, our tokenizer, theirs, and the directory that we saved."""
    made = FAMILIES[request.param]
    source, saved = (tmp_path_factory.mktemp("tokenizer") for _ in "ab")
    made.rust().save(str(source / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **made.config}
    if made.template is not None:
        config["chat_template"] = made.template
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.load(source)
    ours.save(saved)
    return made, ours, AutoTokenizer.from_pretrained(saved), saved


WORDS = st.sampled_from(
    ["hello", " ", "\n", "\n\n", "花", "1", "2", "'s", ".", "  ", "\t", "e\u0301", "🦋", "[", "You"]
)
CONTENT = st.one_of(
    st.lists(WORDS, min_size=1, max_size=6).map("".join),
    st.text(st.characters(exclude_categories=["Cn", "Cs", "Co"], exclude_characters="<[|")),
)


def conversation(turns: list[tuple[str, str]], system: bool) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": turns[0][0]}] if system else []
    for question, reply in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": reply})
    return messages


@settings(max_examples=60)
@given(st.booleans(), st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3), st.booleans())
def test_ids_equal_transformers(family, system, turns, prompt):
    made, ours, theirs, _ = family
    messages = conversation(turns, system)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    rendered = render(ours, messages, add_generation_prompt=prompt)
    assert rendered.ids == expected
    assert len(rendered.assistant_mask) == len(expected)
    if "{% generation" in (made.template or "") or made.template is None:
        marked = theirs.apply_chat_template(
            messages,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        # At its beginning transformers looks for one character, which a tokenizer may have
        # dropped; then it marks nothing.
        if any(marked["assistant_masks"]):
            assert [int(m) for m in rendered.assistant_mask] == marked["assistant_masks"]


@settings(max_examples=30)
@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=2))
def test_prompts_equal_transformers(family, turns):
    _, ours, theirs, _ = family
    messages = conversation(turns, False)[:-1]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(ours, messages) == expected


def runs(ids: list[int], mask: list[bool]) -> list[list[int]]:
    """The stretches of ids that the mask covers."""
    found: list[list[int]] = [[]]
    for id, covered in zip(ids, mask, strict=True):
        if covered:
            found[-1].append(id)
        elif found[-1]:
            found.append([])
    return [run for run in found if run]


def test_the_mask_covers_replies_and_what_closes_them(family):
    made, ours, _, _ = family
    rendered = render(ours, CONVERSATION)
    shown = [
        ours.decode(run, skip_special=False) for run in runs(rendered.ids, rendered.assistant_mask)
    ]
    assert shown == made.replies


def test_replies_end_with_the_template_and_the_document(family):
    made, ours, theirs, _ = family
    assert ours.turn_end_ids == set(theirs.convert_tokens_to_ids(sorted(made.ends)))


@given(st.text(st.characters(exclude_categories=["Cn", "Cs", "Co"], exclude_characters="<[|")))
def test_text_begins_as_transformers_has_it(family, text):
    _, ours, theirs, _ = family
    assert [*ours.before, *ours.encode(text)] == theirs(text)["input_ids"]


ATTACKS = st.lists(
    st.one_of(
        st.sampled_from(
            [*MISTRAL_TOKENS, *LLAMA3_TOKENS, *CHATML_TOKENS, *DEEPSEEK_TOKENS, "<|im_", "end|>"]
        ),
        st.sampled_from(["<", ">", "|>", "</s", "s>", "[INS", "T]", "\n", " ", "hi", "\U000f0000"]),
        st.characters(min_codepoint=0xF0000, max_codepoint=0xF0040),
        st.characters(exclude_categories=["Cs", "Cn"]),
    ),
    min_size=1,
    max_size=6,
).map("".join)


@settings(max_examples=60)
@given(st.lists(st.tuples(ATTACKS, ATTACKS), min_size=1, max_size=2))
def test_no_content_holds_a_control_token(family, turns):
    _, ours, theirs, _ = family
    control = set(theirs.all_special_ids) | set(ours.turn_end_ids)
    control |= {id for id, t in theirs.added_tokens_decoder.items() if t.special}
    control.discard(theirs.convert_tokens_to_ids("<unk>"))
    harmless = [("a", "b")] * len(turns)
    expected = render(ours, conversation(harmless, False))
    rendered = render(ours, conversation(turns, False))

    def controls(ids):
        return [id for id in ids if id in control]

    assert controls(rendered.ids) == controls(expected.ids)
    # The words themselves are there, as plain text; SentencePiece takes ▁ for a space.
    text = ours.decode(rendered.ids, skip_special=False).replace("▁", " ")
    assert all(question.strip().replace("▁", " ").strip() in text for question, _ in turns)


def test_a_content_of_control_tokens_is_what_sanitizing_transformers_reads(family):
    _, ours, theirs, _ = family
    for token in sorted({t.content for t in theirs.added_tokens_decoder.values() if t.special}):
        messages = [{"role": "user", "content": f"x {token} y"}]
        safe = theirs.apply_chat_template(messages, sanitize_control_tokens=True, return_dict=False)
        text = ours.decode(render(ours, messages).ids, skip_special=False)
        assert text == theirs.decode(safe)


def test_saved_templates_stay_where_they_were(family):
    made, _, _, saved = family
    file = saved / "chat_template.jinja"
    assert file.exists() == (made.template is None)
    config = json.loads((saved / "tokenizer_config.json").read_text())
    assert config.get("chat_template") == made.template


def test_qwen3_thoughts_are_learnt_in_the_last_turn_and_dropped_before(tmp_path: Path):
    made = FAMILIES["qwen3"]
    made.rust().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(made.config))
    (tmp_path / "chat_template.jinja").write_text(made.template or "")
    ours = Tokenizer.load(tmp_path)
    messages = conversation(
        [("a", "<think>\none\n</think>\n\nyes"), ("b", "<think>two</think>\n\n<b>no</b>")], False
    )
    rendered = render(ours, messages)
    shown = [
        ours.decode(r, skip_special=False) for r in runs(rendered.ids, rendered.assistant_mask)
    ]
    assert shown == ["yes<|im_end|>", "<think>\ntwo\n</think>\n\n<b>no</b><|im_end|>"]


def test_a_base_models_template_has_our_chatml_where_its_tokens_exist(family):
    made, ours, _, saved = family
    if made.template is None and "<|im_end|>" in made.ends:
        assert (saved / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
        assert ours.template == CHAT_TEMPLATE


@settings(max_examples=60)
@given(CONTENT, CONTENT)
def test_a_base_models_prompt_begins_its_conversation(family, question, reply):
    made, ours, _, _ = family
    if made.template is None:
        whole = render(ours, conversation([(question, reply)], False)).ids
        prompt = prompt_ids(ours, [{"role": "user", "content": question}])
        assert whole[: len(prompt)] == prompt
