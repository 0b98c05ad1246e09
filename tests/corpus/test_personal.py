import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from instar.corpus.document import Document
from instar.corpus.personal import CHECKS, Personal, PersonalConfig

SHARED = Path(__file__).parents[3] / "shared" / "data"
CASES = 400
"""Planted cases of each kind."""


def masked(text: str, **config: str | None) -> str:
    document = Document(text, "here", "test")
    assert Personal(PersonalConfig(**config))(document) is None
    return document.text


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("Write to jane.doe+x@mail.example.co.uk.", "Write to [email]."),
        ("邮箱是abc_1@163.com，谢谢", "邮箱是[email]，谢谢"),
        ("手机13812345678，或 +86 138-1234-5678", "手机[phone]，或 [phone]"),
        ("电话：010-62345678（座机 0571-8765432）", "电话：[phone]（座机 [phone]）"),
        ("Call 780-800-7092 or (555) 234-5678.", "Call [phone] or [phone]."),
        ("Ring +44 20 7946 0958, ask for Tom.", "Ring [phone], ask for Tom."),
        ("Tel: 020 7946 0958", "Tel: [phone]"),
        ("电话：021－62345678转801", "电话：[phone]转801"),
        ("WhatsApp: +91 98765 43210", "WhatsApp: [phone]"),
        ("电话号码是718-0167，", "电话号码是[phone]，"),
        ("from 93.184.216.34 to 192.168.0.1", "from [ip] to 192.168.0.1"),
        ("at 2606:4700:4700::1111, not ::1", "at [ip], not ::1"),
        ("身份证11010519491231002X号", "身份证[id]号"),
        ("身份证110105194912310021号", "身份证110105194912310021号"),
    ],
)
def test_examples(text: str, outcome: str) -> None:
    assert masked(text) == outcome


@pytest.mark.parametrize(
    "text",
    [
        "On 2012-10-10 at 12:30:45 it cost $1,234,567.89.",
        "ISBN 978-0-306-40615-7, ISBN 0-306-40615-2, ISBN 9780306406157",
        "Version 4.10.34.2 and v1.2.3.4; see section 3.4.1.40.",
        "std::vector<int> a::b; 10:20:30",
        "3.14159265358979 and 1/3 = 0.33333333333",
        "+20 000 000 people; 13 800 138 000 dollars; 共15000000000元",
        "@home is not an address, nor is a@b",
        "1998-2003, 2004–2011; 100-200-300; 1914-1918",
        "UPC 036000291452, order 20230415001",
        "床前明月光，疑是地上霜。",
    ],
)
def test_ordinary_numbers_stay(text: str) -> None:
    assert masked(text) == text


def test_a_kind_can_be_left_alone_or_marked_otherwise() -> None:
    text = "a@b.org 780-800-7092"
    assert masked(text, email=None) == "a@b.org [phone]"
    assert masked(text, phone="(number)") == "[email] (number)"


def test_kinds_are_counted() -> None:
    step = Personal(PersonalConfig())
    step(Document("a@b.org, c@d.org, 780-800-7092", "", ""))
    assert step.counts == Counter(email=2, phone=1)


def identity(rng: random.Random) -> str:
    place = rng.choice(("110105", "310104", "440305", "510107", "330106"))
    day = f"{rng.randint(1930, 2015)}{rng.randint(1, 12):02}{rng.randint(1, 28):02}"
    body = f"{place}{day}{rng.randrange(1000):03}"
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # as the standard prints them
    return body + CHECKS[sum(int(d) * w for d, w in zip(body, weights, strict=True)) % 11]


def digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices("0123456789", k=count))


def american(rng: random.Random) -> str:
    area, exchange, last = rng.randint(200, 989), rng.randint(200, 999), digits(rng, 4)
    form = rng.choice(("({}) {}-{}", "{}-{}-{}", "{}.{}.{}", "1-{}-{}-{}", "+1 {} {} {}"))
    return form.format(area, exchange, last)


def mobile(rng: random.Random) -> str:
    number = f"1{rng.randint(3, 9)}{rng.randint(0, 9)}"
    middle, last = digits(rng, 4), f"{digits(rng, 3)}{rng.randint(1, 9)}"
    return rng.choice(
        ("{}{}{}", "+86{}{}{}", "+86 {}{}{}", "86-{}{}{}", "{}-{}-{}", "{} {} {}")
    ).format(number, middle, last)


def landline(rng: random.Random) -> str:
    area = rng.choice(("010", "021", "020", "0571", "0755", "0431"))
    number = f"{rng.randint(2, 8)}{digits(rng, 6 if len(area) == 4 else 7)}"
    return rng.choice(("{}-{}", "({}){}", "（{}）{}", "{} {}")).format(area, number)


def international(rng: random.Random) -> str:
    a, b, c = digits(rng, 2), digits(rng, 4), digits(rng, 3) + "7"
    form = rng.choice(("+44 {} {} {}", "+49 {} {}{}", "+33 {} {} {}", "+81-{}-{}-{}", "+44{}{}{}"))
    return form.format("2" + a[1], b, c)


def ipv4(rng: random.Random) -> str:
    first = rng.choice((8, 23, 45, 66, 81, 104, 142, 185, 203, 212))
    return f"{first}.{rng.randint(4, 250)}.{rng.randint(0, 255)}.{rng.randint(1, 254)}"


def ipv6(rng: random.Random) -> str:
    groups = [rng.choice(("2a00", "2606", "2400", "2804"))]
    groups += [f"{rng.randrange(0x1000, 0x10000):x}" for _ in range(7)]
    return ":".join(groups) if rng.random() < 0.5 else ":".join(groups[:3]) + "::" + groups[-1]


def email(rng: random.Random) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    name = "".join(rng.choices(letters, k=rng.randint(2, 9)))
    part = rng.choice(("", ".smith", "_92", "-x", "+news"))
    host = "".join(rng.choices(letters, k=6))
    return f"{name}{part}@{host}.{rng.choice(('com', 'co.uk', 'cn', 'org'))}"


KINDS: dict[str, tuple[Callable[[random.Random], str], str]] = {
    "email": (email, "[email]"),
    "identity": (identity, "[id]"),
    "American": (american, "[phone]"),
    "mobile": (mobile, "[phone]"),
    "landline": (landline, "[phone]"),
    "international": (international, "[phone]"),
    "IPv4": (ipv4, "[ip]"),
    "IPv6": (ipv6, "[ip]"),
}
AROUND = (
    "Please note {} before you leave.",
    "You can reach me at {}, any day.",
    "({})",
    "请记下{}，谢谢。",
    "他留下的是：{}",
    "最后一行：{}\n下一行。",
)


def wrong_identity(rng: random.Random) -> str:
    number = identity(rng)
    return number[:17] + rng.choice([c for c in CHECKS if c != number[17]])


ORDINARY: tuple[Callable[[random.Random], str], ...] = (
    lambda r: f"{r.randint(1800, 2030)}-{r.randint(1, 12):02}-{r.randint(1, 28):02}",
    lambda r: f"{r.randint(1, 28)}.{r.randint(1, 12)}.{r.randint(1900, 2030)}",
    lambda r: f"{r.randint(1900, 2030)}年{r.randint(1, 12)}月{r.randint(1, 28)}日",
    lambda r: f"{r.randint(0, 23)}:{r.randint(10, 59)}:{r.randint(10, 59)}",
    lambda r: f"2023-05-{r.randint(10, 28)} {r.randint(10, 23)}:{r.randint(10, 59)}",
    lambda r: f"${r.randint(10**5, 10**9):,}.{r.randint(10, 99)}",
    lambda r: f"¥{r.randint(10**5, 10**8)}",
    lambda r: f"{r.randint(10**6, 10**11):,}",
    lambda r: (
        f"978-{r.randint(0, 9)}-{r.randint(100, 999)}-{r.randint(10000, 99999)}-{r.randint(0, 9)}"
    ),
    lambda r: f"978{digits(r, 10)}",
    lambda r: f"{r.randint(0, 9)}-{r.randint(100, 999)}-{r.randint(10000, 99999)}-X",
    lambda r: f"{r.random():.12f}",
    lambda r: (
        f"version {r.randint(1, 90)}.{r.randint(0, 99)}.{r.randint(0, 99)}.{r.randint(0, 99)}"
    ),
    lambda r: f"版本{r.randint(1, 9)}.{r.randint(0, 99)}.{r.randint(0, 99)}.{r.randint(0, 99)}",
    lambda r: f"192.168.{r.randint(0, 255)}.{r.randint(1, 254)}",
    lambda r: f"{r.randint(1, 9)}.{r.randint(1, 9)}.{r.randint(1, 20)}.{r.randint(1, 9)}",
    lambda r: f"{r.randint(1000, 9999)} × {r.randint(1000, 9999)} = {r.randint(10**6, 10**8)}",
    lambda r: f"{r.randint(1000, 2020)}–{r.randint(1000, 2020)}",
    lambda r: f"No. {digits(r, 8)}",
    lambda r: f"{r.randint(10, 999)}-{r.randint(10, 99)}",
    lambda r: f"{r.randint(10, 99)} {r.randint(100, 999)} {r.randint(100, 999)}",
    lambda r: f"#{r.randint(10**5, 10**6)}, p. {r.randint(100, 999)}",
    wrong_identity,
)


def test_planted_cases_are_found_and_nothing_else() -> None:
    rng = random.Random(7)
    found, planted, wrong = Counter[str](), Counter[str](), []
    for kind, (make, mark) in KINDS.items():
        for _ in range(CASES):
            around = rng.choice(AROUND)
            planted[kind] += 1
            found[kind] += masked(around.format(make(rng))) == around.format(mark)
    for make in ORDINARY:
        for _ in range(CASES // 3):
            text = rng.choice(AROUND).format(make(rng))
            if masked(text) != text:
                wrong.append(text)
    recall = {kind: found[kind] / planted[kind] for kind in KINDS}
    assert min(recall.values()) >= 0.98, recall
    precision = found.total() / (found.total() + len(wrong))
    assert precision >= 0.98, wrong[:20]
    assert len(wrong) <= 0.02 * len(ORDINARY) * (CASES // 3), wrong[:20]


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not beside the checkout")
def test_plays_and_articles_hold_nothing_personal() -> None:
    for name in ("tinyshakespeare.txt", "wikitext-2/test.txt"):
        step = Personal(PersonalConfig())
        step(Document((SHARED / name).read_text(encoding="utf-8"), "", ""))
        assert step.counts.total() <= 1, (name, step.counts)
