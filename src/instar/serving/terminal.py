"""``instar chat``: a conversation with a checkpoint, in the terminal.

For a person there are prompts and colours. With a pipe, every line that comes in is a message,
and standard output holds the replies and nothing else.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.console import Console

from instar.config import stdout_is_terminal
from instar.data.schema import Message
from instar.errors import UserError
from instar.hub import located
from instar.serving.generate import CONTROLS, SamplingOptions
from instar.serving.safety import Gate, filter_of, instead

if TYPE_CHECKING:
    from instar.generation import Engine

HELP = """\
/stage           list the stages beside this one
/stage NAME      go on with another stage's model; the conversation is kept
/temperature X   0 is careful and always the same, 1 is lively
/reset           begin a new conversation
/help            this list
exit, quit       leave; so do Ctrl-D and, at the prompt, Ctrl-C
Ctrl-C stops a reply that is being written."""

RESERVED = 4
"""At least one part in so many of the context is kept free for the reply."""


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    """Talk with a model; /help lists what you can type besides messages.

    The model remembers the conversation. When the context is full, the oldest turns are forgotten,
    and you are told. Lines from a pipe work too: one message a line, one reply each.

    For example:
      instar chat runs/mini/sft
      instar chat runs/mini/rlvr --temperature 0 --system "Answer in one word."
      echo "What is the capital of France?" | instar chat runs/mini/sft
    """

    system: str = ""
    """Instructions that stand before the conversation; models that never saw any ignore them."""
    safety: bool = False
    """Stop harmful messages and replies; replies then come sentence by sentence."""
    safety_log: Path | None = None
    """Add every decision of the filter to this file, a line of JSON each, without the words."""


def trim(
    messages: list[Message], length: Callable[[list[Message]], int], room: int
) -> list[Message]:
    """Forget the oldest exchanges until the conversation fits.

    The system message and the newest message always stay.

    Args:
        messages: An optional system message, then user and assistant in turn.
        length: Tokens of a conversation.
        room: The most tokens it may have.
    """
    fixed = 1 if messages[0]["role"] == "system" else 0
    while length(messages) > room and len(messages) > fixed + 2:
        messages = messages[:fixed] + messages[fixed + 2 :]
    return messages


class Stopped(Exception):  # noqa: N818 - the filter's decision is no error
    """The filter ended a reply; neither it nor what led to it is remembered."""


class Chat:
    """One conversation: the model, what was said, and where to print.

    Args:
        options: The verb's options.
        person: Whether somebody is watching, rather than a pipe.
    """

    def __init__(self, options: Options, person: bool) -> None:
        from instar.generation import Engine

        self.options = options
        self.person = person
        self.sampling = options.sampling()
        self.filter = filter_of(options.safety, options.safety_log)
        self.out = Console(highlight=False)
        self.notes = Console(stderr=True, highlight=False, style="dim", soft_wrap=True)
        here = located(options.directory)
        self.fetched = here != options.directory
        self.directory = here.resolve()
        # What the hub's cache calls a directory is a hash.
        self.name = options.directory.as_posix() if self.fetched else self.directory.name
        self.engine: Engine = Engine.load(self.directory, options.precision)
        self.stopping = options.stopping(self.engine, chat=True)
        self.reset()

    def note(self, text: str) -> None:
        """Tell the user something that no model said."""
        self.notes.print(text, markup=False)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[Message] = []
        if self.options.system:
            self.messages = [{"role": "system", "content": self.options.system}]

    def obey(self, line: str) -> bool:
        """Do what a command line says; False if the line is not a command.

        Raises:
            UserError: There is no such command, or it cannot be done.
        """
        match line.split():
            case ["/help"]:
                self.note(HELP)
            case ["/reset"]:
                self.reset()
                self.note("A new conversation.")
            case ["/stage"]:
                self.note("Stages: " + (", ".join(self.stages()) or "none"))
            case ["/stage", name]:
                self.switch(name)
            case ["/temperature", value]:
                self.set_temperature(value)
            case [word, *_] if word.startswith("/"):
                raise UserError(f"there is no command {line!r}", "/help lists the commands.")
            case _:
                return False
        return True

    def stages(self) -> list[str]:
        """Names of the checkpoints beside this one that can speak; a model of the hub has none."""
        if self.fetched:
            return []
        found = self.directory.parent.glob("*/generation_config.json")
        names = [path.parent.name for path in found]
        return sorted(name for name in names if not name.startswith("."))

    def switch(self, name: str) -> None:
        """Go on with the model of another stage."""
        from instar.generation import Engine

        directory = self.directory.parent / name
        if self.fetched or not directory.is_dir():
            known = ", ".join(self.stages()) or "none"
            raise UserError(
                f"there is no stage {name!r} beside {self.name}", f"There are: {known}."
            )
        self.engine = Engine.load(directory, self.options.precision)
        self.stopping = self.options.stopping(self.engine, chat=True)
        self.directory, self.name = directory, directory.name
        self.note(f"You are talking with {name} now.")

    def set_temperature(self, value: str) -> None:
        """Choose a new temperature, for the replies to come."""
        try:
            temperature = float(value)
        except ValueError:
            raise UserError(f"temperature is {value!r}", "Choose a number, like 0.7.") from None
        self.sampling = replace(self.sampling, temperature=temperature)
        self.note(f"The temperature is {temperature:g} now.")

    def prompt(self, line: str) -> tuple[list[Message], list[int]]:
        """The conversation with a new message, as much of it as fits, and its token ids."""
        from instar.tokenizer.chat import prompt_ids

        def ids(messages: list[Message]) -> list[int]:
            return prompt_ids(self.engine.tokenizer, messages, self.options.template_settings)

        context = self.engine.model.context
        reserved = min(self.options.max_new_tokens, context // RESERVED)
        everything: list[Message] = [*self.messages, {"role": "user", "content": line}]
        kept = trim(everything, lambda messages: len(ids(messages)), context - reserved)
        forgotten = (len(everything) - len(kept)) // 2
        prompt = ids(kept)
        if len(prompt) >= context:
            raise UserError(
                f"the message has {len(prompt)} tokens with its frame, and the model's context"
                f" (max_position_embeddings) is {context}",
                "Say it in fewer words.",
            )
        if forgotten:
            what = "exchange" if forgotten == 1 else f"{forgotten} exchanges"
            self.note(f"(The context is full: the oldest {what} will be forgotten.)")
        return kept, prompt

    def pieces(self, prompt: list[int], seed: int) -> Iterator[str]:
        """What the model says, as far as the filter lets it through."""
        written = self.engine.stream(prompt, self.sampling, self.stopping, seed)
        if self.filter is None:
            yield from written
            return
        gate = Gate(self.filter)
        for piece in written:
            yield gate.push(piece)
            if not gate.verdict.allowed:
                break
        yield gate.flush()
        if not gate.verdict.allowed:
            raise Stopped

    def show(self, text: str, thought: bool = False) -> None:
        """Print what comes: a person sees thoughts dim, a pipe does not get them.

        Not through rich, which would turn tabs into spaces.
        """
        if self.person:
            text = text.translate(CONTROLS)
        elif thought:
            return
        if thought and text and self.out.color_system:
            text = f"\x1b[2m{text}\x1b[0m"
        print(text, end="", flush=True)

    def reply(self, line: str) -> None:
        """Answer a message, and remember both unless nothing was said."""
        from instar.serving.reasoning import Thinking, begun

        if self.filter and not self.filter.check(line).allowed:
            # Not remembered: what is not to be talked about should not steer what follows.
            print(instead(line, "user"), flush=True)
            return
        kept, prompt = self.prompt(line)
        # Another turn, other random numbers; the same conversation again, the same ones.
        seed = self.options.seed + len(kept)
        thinking = Thinking(begun(self.engine.tokenizer, prompt))
        said = thoughts = ""
        if self.person:
            self.out.print(f"{self.name} › ", style="bold green", end="", markup=False)
        try:
            for thought, answer in thinking.split(self.pieces(prompt, seed)):
                self.show(thought, thought=True)
                thoughts += thought
                if answer and thoughts and not said:
                    self.show("\n\n", thought=True)
                self.show(answer)
                said += answer
            print()
            if thinking.unfinished:
                self.note("(Its thinking did not end; --max-new-tokens may give it more room.)")
        except KeyboardInterrupt:
            print()
            self.note("(stopped)")
        except Stopped:
            begun_line = said or (thoughts and self.person)
            print(("\n" if begun_line else "") + instead(line, "assistant"))
            return
        if said.strip():
            self.messages = [*kept, {"role": "assistant", "content": said}]

    def run(self) -> int:
        """Read messages and answer them until the end; the exit status."""
        while True:
            try:
                line = input("you › " if self.person else "").strip()
            except EOFError:
                if self.person:
                    print()
                return 0
            if line in ("exit", "quit"):
                return 0
            try:
                if line and not self.obey(line):
                    self.reply(line)
            except UserError as error:
                # A person can try again; a script should not go on as if nothing had happened.
                if not self.person:
                    raise
                self.note(str(error))


def main(argv: list[str]) -> int:
    """Run the verb.

    Args:
        argv: The arguments after ``instar chat``.

    Returns:
        The exit status: 0, or 130 after Ctrl-C.

    Raises:
        UserError: The checkpoint or an option cannot be used; with piped input, also a message.
    """
    options = tyro.cli(Options, args=argv, prog="instar chat")
    person = sys.stdin.isatty() and stdout_is_terminal()
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Half a Chinese character, left by a backspace, is not worth a crash.
        sys.stdin.reconfigure(errors="replace")
    if person:
        with contextlib.suppress(ImportError):  # absent on Windows
            import readline  # noqa: F401 - gives `input` arrow keys and a history
    try:
        chat = Chat(options, person)
        if person:
            chat.note(f"{chat.name} is listening. /help lists commands, Ctrl-D leaves.")
        return chat.run()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
