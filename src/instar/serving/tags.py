"""Text between two tags, told apart from the text around it while it is being written."""

from __future__ import annotations

from instar.generation.stopping import overlap


class Between:
    """Cuts a stream of text at an opening and a closing tag.

    Text that could still become a tag is held back, so that no part of one is ever shown.

    Args:
        opening: For example ``<think>``.
        closing: For example ``</think>``.
        inside: Whether the text begins behind an opening tag.
    """

    def __init__(self, opening: str, closing: str, inside: bool = False) -> None:
        self.inside = inside
        self._tags = (opening, closing)
        self._held = ""

    def push(self, piece: str) -> list[tuple[bool, str]]:
        """Take more text in.

        Returns:
            Whether each stretch stands between the tags, and its text. A stretch that ended gives
            an empty text of the other kind at least, so that two in a row stay apart.
        """
        text, parts = self._held + piece, list[tuple[bool, str]]()
        while True:
            tag = self._tags[self.inside]
            before, found, rest = text.partition(tag)
            if not found:
                break
            if before:
                parts.append((self.inside, before))
            self.inside = not self.inside
            parts.append((self.inside, ""))
            text = rest
        safe = len(text) - overlap(text, tag)
        if safe:
            parts.append((self.inside, text[:safe]))
        self._held = text[safe:]
        return parts

    def flush(self) -> list[tuple[bool, str]]:
        """What was held back; it cannot become a tag any more."""
        held, self._held = self._held, ""
        return [(self.inside, held)] if held else []
