"""Fields of other servers that would change the answer, and that nothing here does.

They are refused rather than passed over, unless they ask for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

Fields = Mapping[str, tuple[str, Sequence[object]]]
"""By name: what to do instead, and the values that ask for nothing, as ``None`` always does."""

EMPTY = (False, 0, "", [], {})


def _fields(instead: str, *names: str, nothing: Sequence[object] = EMPTY) -> Fields:
    return {name: (instead, nothing) for name in names}


_FORM = "Ask for a form with response_format."
_SAMPLING = "Choose tokens with temperature, top_p, top_k, min_p, the penalties and logit_bias."
_REPETITION = "Call it repetition_penalty, which counts all that was written."
_CHOICE = "Ask for n replies, and choose among them."
_TEXT = "The models read text and write text."
_THOUGHT = "How long a model thinks is its own affair; chat_template_kwargs may turn it off."
_TOOLS = "Give the functions as tools, to /v1/chat/completions."

ANYWHERE: Fields = {
    **_fields(_FORM, "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    **_fields(_FORM, "structured_outputs", "structural_tag", "grammar", "json_schema"),
    **_fields(_FORM, "regex", "ebnf"),
    **_fields(_TOOLS, "functions"),
    **_fields(_TOOLS, "function_call", nothing=(*EMPTY, "none", "auto")),
    **_fields("Bound the reply with max_tokens.", "n_predict", "max_new_tokens", nothing=()),
    **_fields("With ignore_eos no reply ends early.", "min_tokens"),
    **_fields(_CHOICE, "use_beam_search", "early_stopping"),
    **_fields(_CHOICE, "length_penalty", "num_beams", nothing=(1,)),
    **_fields(_SAMPLING, "typical_p", "tfs_z", nothing=(1,)),
    **_fields(_SAMPLING, "top_a", "mirostat", "dry_multiplier", "xtc_probability"),
    **_fields(_SAMPLING, "top_n_sigma", nothing=(0, -1)),
    **_fields(_REPETITION, "repeat_penalty", nothing=(0, 1)),
    **_fields(_REPETITION, "repeat_last_n", nothing=(-1,)),
    **_fields(_SAMPLING, "dynatemp_range", "no_repeat_ngram_size", "bad_words"),
    **_fields(_SAMPLING, "allowed_token_ids", "logits_processors"),
    **_fields("The models write on, towards no given end.", "suffix"),
    **_fields("A reply ends before what stops it.", "include_stop_str_in_output"),
    **_fields("Control tokens are not shown.", "skip_special_tokens", nothing=(True,)),
    **_fields("POST /tokenize tells tokens.", "return_token_ids", "return_tokens_as_token_ids"),
    **_fields("Use echo and logprobs of /v1/completions.", "prompt_logprobs", nothing=()),
    **_fields("Shorten the prompt.", "truncate_prompt_tokens", nothing=()),
}
"""Those that neither endpoint knows."""

IN_CHATS: Fields = {
    **ANYWHERE,
    **_fields(_TEXT, "audio", "documents", "mm_processor_kwargs"),
    **_fields(_TEXT, "modalities", nothing=([], ["text"])),
    **_fields("The models look nothing up.", "web_search_options", nothing=()),
    **_fields(_THOUGHT, "reasoning_effort", nothing=("medium",)),
    **_fields(_THOUGHT, "reasoning", "thinking", "thinking_token_budget"),
    **_fields("Say in words how long a reply should be.", "verbosity", nothing=("medium",)),
    **_fields("The model's own is used.", "chat_template"),
    **_fields("End with a turn of the user's.", "continue_final_message"),
    **_fields("The assistant speaks next.", "add_generation_prompt", nothing=(True,)),
    **_fields("The template adds what is needed.", "add_special_tokens", nothing=(False,)),
    **_fields("Use /v1/completions.", "echo"),
}
IN_COMPLETIONS: Fields = {
    **ANYWHERE,
    **_fields("Give token ids instead of text.", "add_special_tokens", nothing=(True,)),
    **_fields("Bound the reply with max_tokens.", "max_completion_tokens", nothing=()),
    **_fields("Ask for logprobs.", "top_logprobs", nothing=()),
    **_fields(_TOOLS, "tools"),
}
IN_TOKENIZE: Fields = {
    **_fields("The model's own is used.", "chat_template"),
    **_fields("End with a turn of the user's.", "continue_final_message"),
    **_fields("The assistant speaks next.", "add_generation_prompt", nothing=(True,)),
    **_fields("POST /detokenize tells the text.", "return_token_strs"),
    **_fields("/v1/chat/completions counts them as prompt_tokens.", "tools"),
}


def checked(sent: Any, fields: Fields) -> Any:
    """What was sent, as it is.

    Args:
        sent: A request.
        fields: What is refused in it.

    Raises:
        ValidationError: It asks for something that nothing here does.
    """
    for name, value in sent.items() if isinstance(sent, dict) else ():
        instead, nothing = fields.get(name, ("", (value,)))
        if value is not None and value not in nothing:
            kind = PydanticCustomError(
                "unsupported", "not supported. {instead}", {"instead": instead}
            )
            wrong = InitErrorDetails(type=kind, loc=(name,), input=value)
            raise ValidationError.from_exception_data("request", [wrong])
    return sent
