"""``instar generate``: complete one prompt, once or several times, or all prompts of a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from instar.config import stdout_is_terminal
from instar.data.schema import Message
from instar.errors import UserError

if TYPE_CHECKING:
    from instar.generation import Engine, Sampling, Stopping

# A byte-level model may write any character; these could move the cursor or worse.
CONTROLS = dict.fromkeys([*range(32), *range(127, 160)])
del CONTROLS[ord("\n")], CONTROLS[ord("\t")]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The options that every way of talking with a model shares."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A checkpoint: the directory that a stage has written, or any open model."""
    temperature: float = 0.7
    """How bold the words are: 0 takes the likeliest, 1 follows the model's own probabilities."""
    top_k: int = 0
    """Choose among the K likeliest tokens only; 0 means among all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together reach this probability; 1 means all."""
    min_p: float = 0.0
    """Leave out tokens that are less than this many times as likely as the likeliest one."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that already occurred become less likely; 1.1 is a gentle value."""
    max_new_tokens: int = 256
    """The most tokens that one reply may have."""
    thinking: bool = True
    """Whether a chat model that thinks before it answers does so; those are asked not to whose chat
    template knows `enable_thinking`, such as Qwen3's."""
    seed: int = 0
    """The same seed gives the same reply to the same prompt."""
    precision: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """What the matrices are kept in: auto is bfloat16 where that is faster; int8 is smaller
    still, rounds more, and is the fastest on most processors. Experts, sliding windows, GPT-2 and
    adapters that are not merged are computed in float32, whatever is said here."""

    @property
    def template_settings(self) -> dict[str, bool]:
        """What the chat template is told."""
        return {} if self.thinking else {"enable_thinking": False}

    def sampling(self) -> Sampling:
        """How tokens are chosen; raises ``UserError`` where a value is out of range."""
        from instar.generation import Sampling

        return Sampling(
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty
        )

    def stopping(self, engine: Engine, chat: bool, strings: tuple[str, ...] = ()) -> Stopping:
        """When replies end: with the document or, in a chat, with the turn as well."""
        from instar.generation import Stopping

        tokenizer = engine.tokenizer
        ends = tokenizer.turn_end_ids if chat else frozenset({tokenizer.eos_id})
        return Stopping(ends, strings, self.max_new_tokens)


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    """Complete a prompt and print the text as it is written, or complete a file of prompts.

    A pretrained model goes on from the prompt, as from the beginning of a document, until the
    document ends. Give a chat model --chat and the prompt becomes a message that it replies to.

    A file has a line of JSON for each prompt, with `prompt` or `messages`; the answers' file has
    the same lines with `reply` and `finish`, in the same order. Stopped at any moment, the same
    command goes on where it was.

    For example:
      instar generate runs/mini/pretrain --prompt "The capital of France is" --max-new-tokens 20
      instar generate runs/mini/rlvr --chat --prompt "47 + 38 = ?" --samples 4
      instar generate runs/mini/sft --chat --prompt "Which is larger, 7 or 9?" --temperature 0
      instar generate runs/mini/sft --chat --input prompts.jsonl --output answers.jsonl
    """

    prompt: str | None = None
    """The beginning of the text, or with --chat the message to reply to."""
    chat: bool = False
    """The prompt is the first message of a conversation."""
    samples: int = 1
    """How many completions of a prompt to write; several are numbered."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End before this string; may be given several times: --stop "." --stop "?"."""
    input: Path | None = None
    """A file of prompts, instead of --prompt."""
    output: Path | None = None
    """Where the answers to --input go; a settings file is written beside it."""
    batch_size: int = 64
    """With --input: how many replies to write side by side."""

    def check_plain(self) -> None:
        """Raise ``UserError`` where something is said of chats, and a prompt is no message."""
        if not self.thinking:
            raise UserError(
                "--no-thinking is for chats, and a prompt without --chat begins a document",
                "Add --chat, or leave --no-thinking out.",
            )

    def prompt_ids(self, engine: Engine, prompt: str) -> list[int]:
        """Token ids of a prompt: a message in a chat, or the beginning of a document."""
        from instar.tokenizer.chat import prompt_ids

        tokenizer = engine.tokenizer
        if self.chat:
            message = Message(role="user", content=prompt)
            return prompt_ids(tokenizer, [message], self.template_settings)
        self.check_plain()
        return [*tokenizer.before, *tokenizer.encode(prompt)] or [tokenizer.start_id]


def main(argv: list[str]) -> int:
    """Run the verb.

    Args:
        argv: The arguments after ``instar generate``.

    Returns:
        The exit status.

    Raises:
        UserError: The checkpoint, the prompt or an option cannot be used.
    """
    options = tyro.cli(
        Options, args=argv, prog="instar generate", config=(tyro.conf.FlagCreatePairsOff,)
    )
    if (options.prompt is None) == (options.input is None):
        raise UserError(
            "it is unclear what to complete", "Give either --prompt or --input, with its --output."
        )
    if (options.input is None) != (options.output is None):
        raise UserError("--input and --output belong together", "Give both, or --prompt alone.")
    if options.prompt is not None and not options.chat:
        options.check_plain()
    sampling = options.sampling()

    from instar.generation import Engine

    engine = Engine.load(options.directory, options.precision)
    if options.prompt is None:
        from instar.serving.batch import answer_file

        return answer_file(options, engine)
    stopping = options.stopping(engine, options.chat, options.stop)
    ids = options.prompt_ids(engine, options.prompt)
    left_out = CONTROLS if stdout_is_terminal() else {}
    if options.samples == 1:
        for piece in engine.stream(ids, sampling, stopping, options.seed):
            print(piece.translate(left_out), end="", flush=True)
        print()
        return 0
    completions = engine.generate(
        [ids], sampling, stopping, samples=options.samples, seed=options.seed
    )
    for number, completion in enumerate(completions, start=1):
        print(f"--- {number} of {options.samples} ({completion.finish})")
        print(completion.text.translate(left_out))
    return 0
