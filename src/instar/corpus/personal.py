"""Personal data masked: e-mail and network addresses, telephone and identity numbers.

Patterns find candidates; what a pattern cannot say (a checksum, an address that is nobody's, the
word "version" before it) is looked at afterwards. What is masked is what FineWeb masks (Penedo et
al. 2024, arXiv:2406.17557: e-mail and public IP addresses), and numbers.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

from instar.config import Config
from instar.corpus.document import Document, Step

Match = re.Match[str]


class PersonalConfig(Config):
    """What stands in place of each kind of personal data; null leaves the kind alone.

    The marks are ordinary words in square brackets: any tokenizer can write them, people write
    so themselves, and they are neither HTML tags nor control tokens like ``<|im_start|>``.
    """

    email: str | None = "[email]"
    """E-mail addresses."""
    phone: str | None = "[phone]"
    """Telephone numbers: international, North American, Chinese, or after a word like "Tel"."""
    ip: str | None = "[ip]"
    """Public IPv4 and IPv6 addresses; those of home networks and examples are everybody's."""
    identity: str | None = "[id]"
    """Chinese identity numbers: 18 characters with the check character of GB 11643."""


class Personal(Step):
    """Masks personal data; drops nothing."""

    name = "personal"

    def __init__(self, config: PersonalConfig) -> None:
        super().__init__()
        self.config = config

    def __call__(self, document: Document) -> None:
        """Mask what ``document`` holds."""
        text, config = document.text, self.config
        if "@" in text:
            text = self._mask(text, "email", config.email, EMAIL, _certain)
        if ":" in text:
            text = self._mask(text, "ip", config.ip, IPV6, is_public)
        if DIGITS.search(text):
            text = self._mask(text, "identity", config.identity, IDENTITY, is_identity)
            text = self._mask(text, "ip", config.ip, IPV4, is_public)
            for pattern, check in PHONES if SEVEN.search(text) else ():
                text = self._mask(text, "phone", config.phone, pattern, check)
        document.text = text

    def _mask(
        self,
        text: str,
        kind: str,
        mark: str | None,
        pattern: re.Pattern[str],
        check: Callable[[Match], bool],
    ) -> str:
        """``text`` with ``mark`` in place of the group ``it`` wherever ``check`` agrees."""
        if mark is None:
            return text

        def replaced(match: Match) -> str:
            if not check(match):
                return match.group()
            self.counts[kind] += 1
            begin, end = (place - match.start() for place in match.span("it"))
            return match.group()[:begin] + mark + match.group()[end:]

        return pattern.sub(replaced, text)


def _certain(_: Match) -> bool:
    return True


DIGITS = re.compile(r"[0-9](?:[ ().+:–—－-]{0,2}[0-9]){4}")
"""Without five digits there is nothing more to mask; most paragraphs have not so many."""

SEVEN = re.compile(r"[0-9](?:[ ().（）+–—－-]{0,2}[0-9]){6}")
"""Without this there is no telephone number."""

# `\w` would count Chinese characters as part of the number beside them.
EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])(?P<it>[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,5}[A-Za-z]{2,24})(?![A-Za-z0-9-])"
)
OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
IPV4 = re.compile(rf"(?<![A-Za-z0-9_.-])(?P<it>(?:{OCTET}\.){{3}}{OCTET})(?![A-Za-z0-9_-]|\.[0-9])")
IPV6 = re.compile(
    r"(?<![A-Za-z0-9_:.])(?P<it>[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7})(?![A-Za-z0-9_:])"
)
"""Global addresses only: all that have been given out begin with 2 or 3 (RFC 4291)."""
VERSION = re.compile(
    r"(?:version|ver|release|firmware|build|driver|update|section|chapter|clause|figure|table|v|"
    r"版本|固件|版|第|章|节)[号#]?[.:：\s]{0,2}$",
    re.IGNORECASE,
)
"""What stands before four numbers with points between that are no address."""
LARGE_OCTET = 32
"""Versions and paragraphs are counted in small numbers, while of random addresses one in 4,096
has all four numbers below this."""


def is_public(match: Match) -> bool:
    """Whether it is an address in the public internet, and not a version or a paragraph."""
    found = match["it"]
    try:
        if not ipaddress.ip_address(found).is_global:
            return False
    except ValueError:
        return False
    if ":" in found:
        return True
    if max(int(octet) for octet in found.split(".")) < LARGE_OCTET:
        return False
    before = match.string[max(match.start() - 12, 0) : match.start()]
    return VERSION.search(before) is None


IDENTITY = re.compile(
    r"(?<![A-Za-z0-9])(?P<it>(?:1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[1-3])[0-9]{4}"
    r"(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])[0-9]{3}[0-9Xx])(?![A-Za-z0-9])"
)
"""Province, place, birthday, order, check character."""
CHECKS = "10X98765432"


def is_identity(match: Match) -> bool:
    """Whether the last character is right.

    GB 11643-1999: the sum of the first 17 digits, weighted by 2^(17 - i) modulo 11 for the
    digit i counted from 0, modulo 11 chooses the check character.
    """
    number = match["it"].upper()
    total = sum(int(digit) * pow(2, 17 - i, 11) for i, digit in enumerate(number[:17]))
    return CHECKS[total % 11] == number[17]


MOBILE = re.compile(
    r"(?<![0-9A-Za-z_])(?<![0-9][.,+-])(?P<it>(?:\+?86[ -]?|\+?\(86\) ?)?"
    r"1[3-9][0-9](?:[0-9]{8}|([ -])[0-9]{4}\2[0-9]{4}))(?![0-9A-Za-z_]|[.,-][0-9])"
)
"""Chinese mobile numbers: eleven digits, the second 3 to 9."""
LANDLINE = re.compile(
    r"(?<![0-9A-Za-z_.+-])(?P<it>(?:\((?:010|02[0-9]|0[3-9][0-9]{2})\) ?|（0[1-9][0-9]{1,2}）|"
    r"(?:010|02[0-9])[ –—－-]?|0[3-9][0-9]{2}[ –—－-])[2-8][0-9]{2,3}[ -]?[0-9]{4})"
    r"(?![0-9A-Za-z_]|[.-][0-9])"
)
"""Chinese numbers with an area code; one of four digits stands apart from the rest, or barcodes
would be telephones."""
AMERICAN = re.compile(
    r"(?<![0-9A-Za-z_.+/-])(?P<it>(?:\+?1[-. ]?)?(?:\([2-9][0-9]{2}\)[ -]?|[2-9][0-9]{2}([-.]))"
    r"[2-9][0-9]{2}[-. ][0-9]{4})(?![0-9A-Za-z_]|[-.][0-9])"
)
"""North American numbers; neither area nor exchange begins with 0 or 1."""
INTERNATIONAL = re.compile(
    r"(?<![0-9A-Za-z_+])(?P<it>(?:\+|\b00(?=[1-9][0-9]{0,2}[ -]))[1-9][0-9]{0,2}[ .-]?"
    r"(?:\([0-9]{1,4}\)[ .-]?)?[0-9]{1,5}(?:[ .-]?[0-9]{2,4}){1,4})(?![0-9A-Za-z_]|[.,][0-9])"
)
CUE = re.compile(
    r"(?:\b(?:tele)?(?:phone|fax)|\btel|\bcall(?:ing)?|\bmobile|\bcell|\bcontact|\bring|"
    r"\bwhats ?app|\bhotline|\bph|电话|電話|手机|手機|传真|傳真|热线|熱線|致电|座机|微信)"
    r"(?:[ .:：#（(]|\bus\b|\bat\b|\bon\b|\bnumber\b|\bno\b|号码|号|是|为){1,6}$",
    re.IGNORECASE,
)
"""Words that announce a number, at the end of what stands before it."""
CUE_LENGTH = 30
CUED = re.compile(
    r"(?<![0-9A-Za-z_])(?P<it>[0-9](?:[ .-]?[0-9]|[ -]?\([0-9]{2,4}\)){6,13})"
    r"(?![0-9A-Za-z_]|[.,][0-9])"
)
"""Seven digits or more, in groups or not."""
ROUND = re.compile(r"0{5,}$|(?: [0-9]{3}){2,}$")
"""An amount rather than a number that somebody can be called by."""
UNIT = re.compile(r" ?(?:[%％元圆円美万萬亿億人年个個条條次字]|times\b|dollars\b|years\b|people\b)")
DATE = re.compile(r"(?:19|20)[0-9]{2}[ .-](?:0?[1-9]|1[0-2])[ .-]")


def is_phone(match: Match) -> bool:
    """Whether a run of digits can be called: neither an amount nor a date, and of some length."""
    digits = re.sub(r"[^0-9]", "", match["it"])
    return (
        7 <= len(digits) <= 15
        and ROUND.search(match["it"]) is None
        and UNIT.match(match.string, match.end()) is None
        and DATE.match(match["it"].lstrip("+")) is None
    )


def is_international(match: Match) -> bool:
    """The same, with the eight digits at least that E.164 numbers have in practice."""
    return is_phone(match) and sum(map(str.isdigit, match["it"])) >= 8


def is_announced(match: Match) -> bool:
    """Whether a word like "Tel" stands before what could be called."""
    before = match.string[max(match.start() - CUE_LENGTH, 0) : match.start()]
    return CUE.search(before) is not None and is_phone(match)


PHONES = (
    (MOBILE, is_phone),
    (INTERNATIONAL, is_international),
    (AMERICAN, is_phone),
    (LANDLINE, is_phone),
    (CUED, is_announced),
)
"""In this order: what is clearest first."""
