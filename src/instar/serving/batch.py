"""A file of prompts becomes a file of answers, in the same order, and survives being stopped.

What was written stays, and how far it is can be read off the answers' file: its whole lines are
done, half a line at its end is not. Each reply depends on the seed, its row and its sample alone,
so a run that was stopped writes what an undisturbed one would have written (up to rounding, as
batches are put together differently).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instar.adapters.opening import content_of
from instar.data.formats import messages_of
from instar.data.readers import Record, place_of, read_records
from instar.errors import UserError
from instar.files import read_json, whole_lines, write_json
from instar.hub import located
from instar.lineage import hash_file
from instar.tokenizer.chat import prompt_ids
from instar.training.display import Display

if TYPE_CHECKING:
    from instar.generation import Completion, Engine, Stopping
    from instar.serving.generate import Options

WINDOW = 4
"""Batches between two writes: prompts of like length are put side by side within a window.

A larger one wastes less on padding, and loses more when the run is killed.
"""
WRITTEN = ("reply", "finish", "sample")
"""What an answer adds to its row."""
FREE = ("batch_size", "input", "output", "prompt", "directory")
"""Options that a run may go on with changed; the input's and the model's contents may not."""


def answer_file(options: Options, engine: Engine) -> int:
    """Complete every row of ``options.input`` that has no answer in ``options.output`` yet.

    Args:
        options: Both files, and how to answer.
        engine: Writes the replies.

    Returns:
        The exit status.

    Raises:
        UserError: A row cannot be used, or the answers were begun with other settings.
    """
    assert options.input is not None and options.output is not None
    if options.samples < 1 or options.batch_size < 1:
        field = "samples" if options.samples < 1 else "batch_size"
        raise UserError(f"{field} is {getattr(options, field)}", "Choose 1 or more.")
    rows, chat = check_rows(options, engine)
    usual = chosen(type(options)(directory=options.directory))
    check_settings(options.output, settings_of(options), usual)
    done, total = whole_lines(options.output), rows * options.samples
    if done > total:
        raise UserError(
            f"{options.output} has {done} answers, and {options.input} asks for {total}",
            "Choose another --output.",
        )
    with Display() as display:
        display.stage("generate", str(options.output))
        if done:
            display.note(f"{done} of {total} answers are there already.")
        stopping = options.stopping(engine, chat, options.stop)
        _answer(options, engine, stopping, lambda n: display.step(n - done, total - done), done)
        display.note(f"{total} answers in {options.output}")
    return 0


def _answer(
    options: Options,
    engine: Engine,
    stopping: Stopping,
    progress: Callable[[int], None],
    done: int,
) -> None:
    """Write the answers after the first ``done``."""
    assert options.input is not None and options.output is not None
    sampling, samples = options.sampling(), options.samples
    size = max(1, WINDOW * options.batch_size // samples)
    # Of the row that was being written, some samples may be there.
    first, skipped = divmod(done, samples)
    rows = islice(read_records(options.input), first, None)
    with options.output.open("a", encoding="utf-8") as stream:
        while window := list(islice(rows, size)):
            completions = engine.generate(
                [ids_of(row, options, engine) for row in window],
                sampling,
                stopping,
                samples=samples,
                seed=options.seed,
                numbers=range(first, first + len(window)),
                batch_size=options.batch_size,
                progress=lambda n, _, before=first * samples: progress(before + n),
            )
            for number in range(skipped, len(completions)):
                row, sample = divmod(number, samples)
                stream.write(_line(window[row], completions[number], sample, samples > 1))
            stream.flush()
            os.fsync(stream.fileno())
            first, skipped = first + len(window), 0


def _line(row: Record, completion: Completion, sample: int, several: bool) -> str:
    """An answer: its row, and what the model made of it."""
    answer: dict[str, Any] = {**row, "reply": completion.text, "finish": completion.finish}
    if several:
        answer["sample"] = sample
    return json.dumps(answer, ensure_ascii=False) + "\n"


def ids_of(row: Record, options: Options, engine: Engine) -> list[int]:
    """Token ids of a row's prompt.

    Raises:
        UserError: It has neither ``prompt`` nor ``messages``, or nobody could reply to it.
    """
    place = place_of(row, "a row")
    try:
        if "messages" in row:
            messages = messages_of(row["messages"], row.get("tools"))
            if not messages or messages[-1]["role"] != "user":
                raise UserError("the conversation does not end with the user", "Cut it there.")
            ids = prompt_ids(engine.tokenizer, messages, options.template_settings)
        elif isinstance(row.get("prompt"), str):
            ids = options.prompt_ids(engine, row["prompt"])
        else:
            raise UserError("there is no `prompt` (text) and no `messages`", "Give it one.")
    except UserError as error:
        raise UserError(f"{place}: {error.problem}", error.remedy) from None
    if len(ids) >= engine.model.context:
        raise UserError(
            f"{place}: the prompt has {len(ids)} tokens, and the context of the model"
            f" (max_position_embeddings) is {engine.model.context}",
            "Shorten it, or leave the row out.",
        )
    return ids


def check_rows(options: Options, engine: Engine) -> tuple[int, bool]:
    """Read every row once before hours are spent on the first ones.

    Returns:
        How many there are, and whether they are answered as in a chat.

    Raises:
        UserError: A row cannot be used, or there is none.
    """
    assert options.input is not None
    count, kind = 0, ""
    for row in read_records(options.input):
        ids_of(row, options, engine)
        this = "messages" if "messages" in row else "prompt"
        if kind and this != kind:
            raise UserError(
                f"{row.place} has `{this}`, and the rows before have `{kind}`",
                "Put them into different files: they end differently.",
            )
        taken = [key for key in WRITTEN if key in row]
        if taken:
            raise UserError(
                f"{row.place} has a field {taken[0]!r}, which the answer would overwrite",
                "Rename it.",
            )
        count, kind = count + 1, this
    if not count:
        raise UserError(f"no data in {options.input}", "Give it at least one line.")
    return count, options.chat or kind == "messages"


def settings_of(options: Options) -> dict[str, Any]:
    """What the answers depend on: the options, and the contents of the input and the model."""
    assert options.input is not None
    model = content_of(located(options.directory))
    return {"input": hash_file(options.input), "model": model, **chosen(options)}


def chosen(options: Options) -> dict[str, Any]:
    """The options that the answers depend on."""
    values = {key: value for key, value in asdict(options).items() if key not in FREE}
    return values | {"stop": list(options.stop)}


def check_settings(output: Path, settings: dict[str, Any], usual: dict[str, Any]) -> None:
    """See that answers which are there already were begun in the same way; else write how.

    Args:
        output: The answers' file.
        settings: How they are to be made.
        usual: What an option is where an older version, which did not have it, began them.

    Raises:
        UserError: They were not, or nobody knows.
    """
    beside = output.with_name(f"{output.name}.settings.json")
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(beside, settings)
        return
    if not beside.exists():
        raise UserError(
            f"{output} exists, and {beside.name}, which says how it was made, does not",
            "Choose another --output, or remove the file.",
        )
    before = usual | read_json(beside)
    for key in settings.keys() | before.keys():
        if before.get(key) != settings.get(key):
            what = (
                f"another {key}"
                if key in ("input", "model")
                else f"{key} {before.get(key)!r}, not {settings.get(key)!r}"
            )
            raise UserError(
                f"{output} was begun with {what}",
                "Go on with what it was begun with, or choose another --output.",
            )
