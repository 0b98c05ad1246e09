"""Which rows of the embedding an adapter should learn: the tokens by which talks are not documents.

instar grow mini --until tokenizer
python benchmarks/lora_rows.py --run runs/mini --rows 92
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from instar.data.readers import read_all
from instar.tokenizer.chat import render
from instar.tokenizer.hf import Tokenizer


def main() -> None:
    """Count the tokens of conversations and documents, and print a list for a recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/mini"))
    parser.add_argument("--rows", type=int, default=92)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.load(arguments.run / "tokenizer")
    data = arguments.run / "data"
    talks = read_all([data / "conversations.jsonl"], ("messages",))
    documents = read_all([data / "readings.jsonl"], ("text",))
    read = counted(tokenizer, (document["text"] for document in documents))
    # Marks and roles stand in every turn, and nothing is to be chosen about them; so they count
    # only where no document has them.
    whole = {id for talk in talks for id in render(tokenizer, talk["messages"]).ids}
    said = counted(tokenizer, (turn["content"] for talk in talks for turn in talk["messages"]))

    unread = sorted(id for id in whole if not read[id])
    others = sorted(set(said) - set(unread), key=divergence(said, read))
    found = [*unread, *others][: arguments.rows]
    print(
        f"{len(unread)} tokens of the conversations, marks of turns included, are in no document:"
    )
    print(" ".join(repr(tokenizer.decode([id], skip_special=False)) for id in unread))
    print(f"trainable_token_indices: {sorted(found)}")


def counted(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[int]:
    """How often each token occurs."""
    return Counter(id for ids in tokenizer.encode_batch(list(texts)) for id in ids)


def divergence(said: Counter[int], read: Counter[int]) -> Callable[[int], float]:
    """What each token adds to the divergence of conversations from documents; most comes first."""
    conversations, documents = said.total(), read.total()

    def key(id: int) -> float:
        p, q = said[id] / conversations, (read[id] + 1) / documents
        return -p * math.log(p / q)

    return key


if __name__ == "__main__":
    main()
