"""Small puzzles with one right answer each: deduce, compare, count, sort.

All that a puzzle needs is said in its prompt; nothing has to be known beforehand. Names, jobs and
numbers are combined freely, so there are far more puzzles than any training run can see, and
every tenth is kept for exams.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from instar.data.schema import Conversation, Language, Task
from instar.primer.question import Question
from instar.primer.split import Split, split_of
from instar.primer.style import draw_style, say
from instar.primer.tables import table

EXAM_SHARE = 0.1
NAMES: dict[Language, tuple[str, ...]] = {
    "en": ("Tom", "Ann", "Bob", "Sue", "Max", "Amy", "Leo", "Mia"),
    "zh": ("小明", "小红", "小华", "小丽", "小刚", "小美", "小军", "小雪"),
}


@dataclass(frozen=True)
class Puzzle:
    """A question with its topic and the content by which it is split."""

    topic: str
    content: str
    question: Question

    @property
    def split(self) -> Split:
        """Which split the puzzle belongs to, however it is phrased."""
        return split_of(f"{self.topic} {self.content}", EXAM_SHARE)


def syllogism(rng: random.Random, language: Language) -> Puzzle:
    """Four forms of deduction, two with the answer yes and two with the answer no."""
    job, mood = rng.choice(table("jobs")), rng.choice(table("moods"))
    name, form = rng.choice(NAMES[language]), rng.choice(("all", "only", "none", "not"))
    if language == "en":
        article = "an" if job["en"][0] in "aeiou" else "a"
        jobs, one, trait = job["plural"], f"{article} {job['en']}", mood["en"]
        prompt = {
            "all": f"All {jobs} are {trait}. {name} is {one}. Is {name} {trait}?",
            "only": f"Only {jobs} are {trait}. {name} is {trait}. Is {name} {one}?",
            "none": f"No {jobs} are {trait}. {name} is {one}. Is {name} {trait}?",
            "not": f"All {jobs} are {trait}. {name} is not {trait}. Is {name} {one}?",
        }[form]
        answers, sentence = ("yes", "no"), "The answer is {}."
    else:
        one, trait = job["zh"], mood["zh"]
        prompt = {
            "all": f"所有{one}都很{trait}。{name}是{one}。{name}{trait}吗？",
            "only": f"只有{one}才{trait}。{name}很{trait}。{name}是{one}吗？",
            "none": f"所有{one}都不{trait}。{name}是{one}。{name}{trait}吗？",
            "not": f"所有{one}都很{trait}。{name}不{trait}。{name}是{one}吗？",
        }[form]
        answers, sentence = ("是", "否"), "正确的回答：{}。"
    right, wrong = answers if form in ("all", "only") else answers[::-1]
    question = _question(language, prompt, right, sentence, (wrong,))
    return Puzzle("syllogism", f"{form} {job['en']} {mood['en']} {name}", question)


def comparison(rng: random.Random, language: Language) -> Puzzle:
    """Who comes first, or last, of three who are compared two by two."""
    trait, names = rng.choice(table("traits")), rng.sample(NAMES[language], 3)
    ask_last = rng.random() < 0.5
    if language == "en":
        facts = [f"{a} is {trait['comparative']} than {b}." for a, b in pairwise(names)]
        superlative = trait["opposite_superlative" if ask_last else "superlative"]
        ask, sentence, space = f"Who is the {superlative}?", f"{{}} is the {superlative}.", " "
    else:
        facts = [f"{a}比{b}{trait['zh']}。" for a, b in pairwise(names)]
        end = trait["zh_opposite" if ask_last else "zh"]
        ask, sentence, space = f"谁最{end}？", f"最{end}的人就是{{}}。", ""
    rng.shuffle(facts)
    answer = names[-1 if ask_last else 0]
    wrong = tuple(name for name in names if name != answer)
    question = _question(language, space.join([*facts, ask]), answer, sentence, wrong)
    return Puzzle("comparison", f"{trait['en']} {names} {ask_last}", question)


def larger(rng: random.Random, language: Language) -> Puzzle:
    """Which of two numbers is larger, or smaller."""
    top = rng.choice((10, 100, 100, 1000))
    a, b = rng.sample(range(top), 2)
    ask_small = rng.random() < 0.5
    if language == "en":
        word = "smaller" if ask_small else "larger"
        prompt, sentence = f"Which number is {word}, {a} or {b}?", f"The {word} number is {{}}."
    else:
        word = "小" if ask_small else "大"
        prompt, sentence = f"哪个数更{word}，{a} 还是 {b}？", f"更{word}的数是 {{}}。"
    answer, wrong = (min(a, b), max(a, b)) if ask_small else (max(a, b), min(a, b))
    question = _question(language, prompt, str(answer), sentence, (str(wrong),))
    return Puzzle("larger", f"{min(a, b)} {max(a, b)}", question)


def counting(rng: random.Random, language: Language) -> Puzzle:
    """How often a letter occurs in a row of letters."""
    letters = rng.choices("abc", k=rng.randint(3, 7))
    letter, row = rng.choice(letters), " ".join(letters)
    count = letters.count(letter)
    if language == "en":
        prompt, sentence = (
            f"How many {letter} are in this row: {row}?",
            f"The number of {letter} is {{}}.",
        )
    else:
        prompt, sentence = f"这一行里有几个 {letter}：{row}？", f"{letter} 一共有 {{}} 个。"
    wrong = tuple(str(other) for other in (count - 1, count + 1, count + 2) if other > 0)
    question = _question(language, prompt, str(count), sentence, wrong)
    return Puzzle("counting", f"{letter} {row}", question)


def sorting(rng: random.Random, language: Language) -> Puzzle:
    """Three or four numbers, from small to large."""
    numbers = rng.sample(range(rng.choice((10, 100))), rng.choice((3, 3, 4)))
    comma = ", " if language == "en" else "、"

    def row(order: list[int]) -> str:
        return comma.join(map(str, order))

    if language == "en":
        prompt, sentence = f"Sort from small to large: {row(numbers)}.", "From small to large: {}."
    else:
        prompt, sentence = f"把 {row(numbers)} 从小到大排列。", "从小到大：{}。"
    right = sorted(numbers)
    swapped = [right[1], right[0], *right[2:]]
    wrong = [row(order) for order in (numbers, swapped, right[::-1]) if order != right]
    question = _question(language, prompt, row(right), sentence, tuple(dict.fromkeys(wrong)))
    return Puzzle("sorting", " ".join(map(str, right)), question)


TOPICS: tuple[Callable[[random.Random, Language], Puzzle], ...] = (
    syllogism,
    comparison,
    larger,
    counting,
    sorting,
)


def puzzles(rng: random.Random, language: Language, part: Split = "train") -> Iterator[Puzzle]:
    """Endless puzzles of one split (``part``), every topic equally often."""
    while True:
        make = rng.choice(TOPICS)
        puzzle = make(rng, language)
        while puzzle.split != part:
            puzzle = make(rng, language)
        yield puzzle


def questions(rng: random.Random, language: Language, part: Split = "train") -> Iterator[Question]:
    """Endless puzzles of one split as questions."""
    return (puzzle.question for puzzle in puzzles(rng, language, part))


def task(puzzle: Puzzle) -> Task:
    """The puzzle as a task for the verifiers ``integer`` and ``answer``."""
    question = puzzle.question
    return {
        "messages": [{"role": "user", "content": question.prompt}],
        "verifier": "integer" if puzzle.topic in ("larger", "counting") else "answer",
        "answer": question.answer,
        "options": list(question.distractors),
        "tags": {"language": question.language, "kind": puzzle.topic},
    }


def tasks(rng: random.Random, language: Language, part: Split = "train") -> Iterator[Task]:
    """Endless verifiable tasks of one split."""
    return map(task, puzzles(rng, language, part))


def conversations(rng: random.Random, language: Language) -> Iterator[Conversation]:
    """Demonstrations: always right, in mixed manners."""
    for question in questions(rng, language):
        yield {
            "messages": [
                {"role": "user", "content": question.prompt},
                {"role": "assistant", "content": say(question, draw_style(rng), rng)},
            ]
        }


def prose(rng: random.Random, language: Language) -> str:
    """A paragraph of two or three solved puzzles for the readings."""
    stream = questions(rng, language)
    space = " " if language == "en" else ""
    solved = [next(stream) for _ in range(rng.randint(2, 3))]
    return space.join(f"{question.prompt}{space}{question.sentence}" for question in solved)


def _question(
    language: Language, prompt: str, answer: str, sentence: str, wrong: tuple[str, ...]
) -> Question:
    """A question whose ``sentence`` has a gap for the answer."""
    return Question(prompt, answer, sentence.format(answer), wrong, language, "logic")
