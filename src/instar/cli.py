"""The command line: a table of verbs, each imported only when it is called."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
from collections.abc import Callable
from importlib import import_module

from instar.memory import keep_freed_memory

VERBS: dict[str, tuple[str, str]] = {
    "grow": ("instar.grow", "raise a model through its whole life, with exams and a report"),
    "plan": ("instar.plan", "predict memory and time of every stage, before any is run"),
    "profile": ("instar.profile", "show where the time of a stage's steps goes"),
    "data": ("instar.data_verbs", "make a corpus from raw text; write the primer; inspect files"),
    "tokenizer": ("instar.tokenizer.verbs", "train a tokenizer, encode, look inside, compare"),
    "pretrain": ("instar.stages.verb", "teach a fresh model to continue text"),
    "sft": ("instar.stages.verb", "teach a pretrained model to answer"),
    "reward": ("instar.stages.verb", "learn which of two replies is better"),
    "dpo": ("instar.stages.verb", "learn from preference pairs directly"),
    "ppo": ("instar.stages.verb", "improve the policy with a reward model"),
    "rlvr": ("instar.stages.verb", "reinforce answers that a program verifies"),
    "continual": ("instar.continual", "teach something new, and see what each way forgets"),
    "merge": ("instar.merging", "merge an adapter into its base, or several models into one"),
    "generate": ("instar.serving.generate", "complete a prompt"),
    "chat": ("instar.serving.terminal", "talk to a checkpoint"),
    "serve": ("instar.serving.verb", "answer programs that speak OpenAI's API"),
    "safety": ("instar.serving.safety_verb", "make and try the filter of harmful talk"),
    "import": ("instar.exchange.importing", "make a checkpoint of a GGUF file or a hub model"),
    "export": ("instar.exchange.exporting", "write GGUF, safetensors, for Ollama, a model card"),
    "report": ("instar.report.page", "write report.html and report.json of a life"),
}
"""Verb to the module whose `main` does it, and what it does."""

LESS = (
    "To train with less, lower micro_batch, micro_tokens or rollout.micro_batch, or set "
    "training.activation_checkpointing; to write with less, lower --cache-gib or choose a smaller "
    "model."
)
"""What to do where memory is not enough."""

USER_ERROR = 2
INTERNAL_ERROR = 1


def usage() -> str:
    """What ``instar --help`` prints."""
    lines = [
        "usage: instar [--debug] VERB ...",
        "",
        "Raise a language model: raw text, tokenizer, pretraining, fine-tuning, reward model,",
        "preference optimisation, reinforcement learning, exams, chat.",
        "",
        *(f"  {verb:<10} {what}" for verb, (_, what) in VERBS.items()),
        "",
        "  instar VERB --help   explains a verb and all of its options",
        "  instar --debug VERB  shows the traceback of an error",
        "  instar --version     says which version this is",
        "",
        "Begin with: instar grow",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run a verb; errors that the user can mend are one line and exit code 2."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        from instar import __version__

        print(f"instar {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        print(f"instar: no verb {verb!r}. Known: {', '.join(VERBS)}.", file=sys.stderr)
        return USER_ERROR
    keep_freed_memory()
    code = _guarded(lambda: _run(verb, rest), debug)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # After an error others may be in the middle of a message to this process: an orderly end
        # would wait for them, and they for it. After none all is written, and gloo's threads have
        # been seen to abort a process that takes itself apart.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(verb: str, rest: list[str]) -> int:
    from instar.help import FLOWING, laid_out

    # `data` and `tokenizer` are families of verbs and stages: a recipe's file means the stage.
    is_stage = verb in ("data", "tokenizer") and bool(rest) and rest[0].endswith(".yaml")
    module = import_module("instar.stages.verb" if is_stage else VERBS[verb][0])
    with FLOWING, laid_out(rest):
        if module.__name__ == "instar.stages.verb":
            return module.main(verb, rest)
        return module.main(rest)


def _guarded(action: Callable[[], int], debug: bool) -> int:
    """Turn exceptions into one line and an exit code."""
    from instar.errors import Elsewhere, UserError

    try:
        return action()
    except Elsewhere:
        return USER_ERROR
    except KeyboardInterrupt as stop:
        if debug:
            raise
        # Ctrl-C, or a SIGTERM that waited for a good moment: see `instar.training.interrupt`.
        number = getattr(stop, "signal", signal.SIGINT)
        by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        print(f"instar: stopped by {by}; what was saved is kept.", file=sys.stderr)
        return 128 + number
    except UserError as error:
        if debug:
            raise
        print(f"instar: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _unread():
            # What is left to be printed goes nowhere; else the interpreter would complain of it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        if debug:
            raise
        print(f"instar: {_about(error)}", file=sys.stderr)
        return USER_ERROR
    except Exception as error:
        if debug:
            raise
        if _lacks_memory(error):
            asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
            more = f": another {asked[1]} were asked for" if asked else ""
            print(f"instar: there is not enough memory{more}. {LESS}", file=sys.stderr)
            return USER_ERROR
        kind = type(error).__name__
        print(
            f"instar: {kind}: {error}. This is a fault of ours: run `instar --debug ...` and "
            "report what it shows.",
            file=sys.stderr,
        )
        return INTERNAL_ERROR


def _lacks_memory(error: Exception) -> bool:
    """Whether a device, or the machine, has no more memory to give."""
    if isinstance(error, RuntimeError):  # torch's, of a GPU and of the processor
        return bool(re.search("out of memory|can't allocate memory", str(error)))
    return isinstance(error, MemoryError)


def _unread() -> bool:
    """Whether nobody reads on what is printed, as behind `| head`."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _about(error: OSError) -> str:
    """What the system refused, and what to do about it."""
    import errno

    place = f" ({error.filename})" if error.filename else ""
    remedies = {
        errno.ENOSPC: "Free some space and run the same command again; it goes on from there.",
        errno.EDQUOT: "Free some of your quota and run the same command again.",
        errno.EACCES: "Choose a place that you may write to.",
        errno.EROFS: "Choose a place that you may write to.",
        errno.ENOENT: "Check the path.",
    }
    remedy = remedies.get(error.errno or 0, "Mend that and run the same command again.")
    return f"{error.strerror or error}{place}. {remedy}"


if __name__ == "__main__":
    sys.exit(main())
