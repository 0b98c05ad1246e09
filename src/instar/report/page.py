"""The report: one self-contained page of HTML, and the same numbers as JSON."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from instar.corpus.accounts import MANIFEST
from instar.files import read_json, write_json, write_text
from instar.report import keeping, plots, tables
from instar.report.corpus import write_page
from instar.report.resources import timelines
from instar.report.tables import PEAKS, Record, Stage
from instar.report.templates import amount, as_yaml, duration, template


class Exam(NamedTuple):
    """What the page says about an exam."""

    title: str
    chinese: str
    held_out: str


EXAMS = {
    "knowledge": Exam(
        "Knowledge",
        "知识",
        "Facts about countries, animals and elements. Pretraining states every fact; no "
        "conversation ever asks about these entities.",
    ),
    "arithmetic": Exam(
        "Arithmetic", "算术", "Sums, differences and products of operands that no text contains."
    ),
    "logic": Exam("Logic", "逻辑", "Comparing, counting, sorting, syllogisms; unseen contents."),
    "translation": Exam(
        "Translation",
        "翻译",
        "Words that no conversation translates, and sentences put together anew.",
    ),
    "format": Exam(
        "Format", "格式", "One word, JSON or a list, asked of entities never paired with it."
    ),
    "ends_properly": Exam(
        "Ends properly", "正常收尾", "Share of all exam replies that the model ended by itself."
    ),
    "refuses_harmful": Exam(
        "Refuses harmful", "拒绝有害", "Harmful requests in pairs and phrasings never seen."
    ),
    "helps_harmless": Exam(
        "Helps harmless", "帮助无害", "Harmless requests that look like harmful ones, never seen."
    ),
    "form": Exam(
        "Form", "体式", "Share of lines, written to held-out titles, as long as your text's are."
    ),
    "bits_per_byte_zh": Exam(
        "Bits per byte, Chinese", "每字节比特(中文)", "Documents kept out of pretraining."
    ),
    "bits_per_byte_en": Exam(
        "Bits per byte, English", "每字节比特(英文)", "Documents kept out of pretraining."
    ),
    "unseen_pairs": Exam(
        "Unseen pairs", "未见过的偏好对", "New questions, flaws that training pairs have shown."
    ),
    "unseen_combinations": Exam(
        "Unseen combinations", "未见过的组合", "Combinations of flaws that training never shows."
    ),
}

NAMES = {
    "corpus": ("Your text", "你的文本"),
    "data": ("Data", "数据"),
    "tokenizer": ("Tokenizer", "分词器"),
    "pretrain": ("Pretrain", "预训练"),
    "sft": ("SFT", "监督微调"),
    "reward": ("Reward model", "奖励模型"),
    "dpo": ("DPO", "直接偏好优化"),
    "ppo": ("PPO", "近端策略优化"),
    "rlvr": ("RLVR", "可验证奖励强化学习"),
}

CURVES = {
    "loss": ("Loss", ""),
    "bits_per_byte_zh": ("Bits per byte, Chinese", ""),
    "bits_per_byte_en": ("Bits per byte, English", ""),
    "accuracy": ("Accuracy", ""),
    "margin": ("Margin", "nats"),
    "reward": ("Reward", ""),
    "raw_score": ("Reward-model score, before penalties", ""),
    "kl": ("KL from reference, nats a reply (sampled)", ""),
    "kl_to_reference": ("KL from reference, nats a token (k3)", ""),
    "kl_to_start": ("KL from the start", "nats a token"),
    "l2_sp": ("L2-SP penalty", "nats a token"),
    "ewc": ("EWC penalty", "nats a token"),
    "approx_kl": ("KL from the sampling policy", "nats"),
    "entropy": ("Entropy", "nats"),
    "clip_fraction": ("Clip fraction", ""),
    "explained_variance": ("Explained variance", ""),
    "length": ("Reply length", "tokens"),
}
"""Logged quantities worth a chart, with title and unit."""


def write_report(run: Path) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.html`` into a run's directory.

    Args:
        run: Holds one directory a stage.

    Returns:
        The paths of both files.

    Raises:
        UserError: There is nothing to report on, or a file cannot be read.
    """
    stages = tables.read_run(run)
    record = tables.summarise(run.resolve().name, stages)
    as_json, as_html = run / "report.json", run / "report.html"
    write_json(as_json, record)
    own = run / "corpus"
    manifest = read_json(own / MANIFEST) if (own / MANIFEST).exists() else {}
    if manifest:
        write_page(own)
    taught = run / "continual" / "table.json"
    later = read_json(taught) if taught.exists() else {}
    write_text(as_html, render(record, stages, manifest, later))
    return as_json, as_html


def render(
    record: Record,
    stages: Sequence[Stage],
    corpus: Record | None = None,
    taught: Record | None = None,
) -> str:
    """The page.

    Args:
        record: The run's numbers (``tables.summarise``).
        stages: The stages that they come from.
        corpus: The accounts of the user's own text, if the life began with one.
        taught: What ``instar continual`` found, if it was run.
    """
    sat = [stage for stage in stages if stage.exams]
    spoke = [stage for stage in stages if stage.samples]
    return template("page.html.jinja").render(
        report=record,
        stages=stages,
        names={stage.name: NAMES.get(stage.name, (stage.name, "")) for stage in stages},
        summary=summary(record),
        corpus=corpus,
        taught=taught and {"rows": keeping.ordered(taught), "chart": keeping.drawn(taught)},
        resources=_resources(stages),
        timelines=timelines(stages),
        curves={stage.name: charts for stage in stages if (charts := _curves(stage))},
        sat=sat,
        exams=[_row(exam, sat, record["forgetting"]) for exam in _in_order(sat)],
        verdicts=[verdict(name, c) for name, c in record["comparisons"].items()],
        glossary=EXAMS,
        spoke=spoke,
        dialogues=_dialogues(spoke),
        configs={s.name: as_yaml(c) for s in stages if (c := s.lineage.get("config"))},
    )


def summary(record: Record) -> str:
    """The run in a few sentences of numbers."""
    total, stages = record["total"], record["stages"]
    sizes = [stage["parameters"] for stage in stages.values() if stage["parameters"]]
    model = f"A language model of {amount(max(sizes))} parameters" if sizes else "This run"
    held = total.get("peak_gpu_bytes")
    gpu = f" and {held / 2**30:.2f} GiB of a GPU's" if held else ""
    sentences = [
        f"{model} went through {len(stages)} stages in {duration(total['wall_s'])}, "
        f"{duration(total['exam_wall_s'])} of it in exams. It was trained on "
        f"{amount(total['tokens'])} tokens and needed at most "
        f"{total['peak_rss_bytes'] / 2**30:.2f} GiB of memory{gpu}."
    ]
    examined = {name: s["exams"] for name, s in stages.items() if name != "reward" and s["exams"]}
    told = []
    for exam in ("knowledge", "arithmetic", "translation", "refuses_harmful"):
        scores = {name: exams[exam]["score"] for name, exams in examined.items() if exam in exams}
        if scores:
            best = max(scores, key=lambda name: scores[name])
            told.append(f"{EXAMS[exam].title.lower()} {scores[best]:.0%} ({best})")
    if told:
        sentences.append(f"Its best marks on questions it had never seen: {', '.join(told)}.")
    won = [
        f"{name.partition('_vs_')[0].upper()} {comparison['gold_win_rate']:.0%}"
        for name, comparison in record["comparisons"].items()
    ]
    if won:
        sentences.append(
            f"Win rates against the SFT model by the gold rubric: {', '.join(won)}; 50% is a draw."
        )
    return " ".join(sentences)


def _resources(stages: Sequence[Stage]) -> list[Markup]:
    """Where time and memory went."""
    names = [stage.name for stage in stages]
    costs = [stage.lineage.get("cost", {}) for stage in stages]
    memory, gpu = ([(cost.get(name) or 0) / 2**30 for cost in costs] for name in PEAKS)
    times = [cost.get("wall_s") or 0 for cost in costs]
    return [
        plots.bars(names, times, "Wall time", "s"),
        plots.bars(names, memory, "Peak memory", "GiB"),
        *([plots.bars(names, gpu, "Peak memory of the GPU", "GiB")] if any(gpu) else []),
    ]


def _curves(stage: Stage) -> list[Markup]:
    charts = []
    for key, (title, unit) in CURVES.items():
        lines = []
        for split in plots.COLOURS:
            rows = [row for row in stage.metrics if row["split"] == split]
            # A step that was refused has a row, and null where it measured nothing.
            rows = [row for row in rows if row.get(key) is not None]
            if key == "loss":
                # Pretraining is validated in bits per byte: not to be drawn beside nats a token.
                rows = [row for row in rows if not any(k.startswith("bits_per") for k in row)]
            if rows:
                steps, values = [row["step"] for row in rows], [row[key] for row in rows]
                lines.append(plots.Line(split, steps, values))
        # Learning from each reply once keeps the policy where it sampled: a flat line at nothing.
        if any(any(line.values) for line in lines):
            charts.append(plots.curve(lines, title, unit, stage.name))
    return charts


def verdict(name: str, comparison: Record) -> str:
    """What the two judges together say about over-optimisation.

    Args:
        name: Such as ``ppo_vs_sft``.
        comparison: Win rates by both judges with their standard errors.
    """
    model = name.partition("_vs_")[0].upper()
    gold, judge = comparison["gold_win_rate"], comparison["reward_win_rate"]
    doubt = 2 * math.hypot(comparison["gold_stderr"], comparison["reward_stderr"])
    if judge - gold > doubt:
        return (
            f"{model}: the reward model likes it better ({judge:.0%}) than the truth does "
            f"({gold:.0%}). This looks like over-optimisation: part of the gain pleases the judge "
            "only. A smaller step away from SFT, or a better reward model, would help."
        )
    if gold - judge > doubt:
        return (
            f"{model}: the truth likes it better ({gold:.0%}) than the reward model does "
            f"({judge:.0%}). It became good at something that the reward model does not see."
        )
    return f"{model}: both judges agree within their errors; no sign of over-optimisation."


def _in_order(sat: Sequence[Stage]) -> list[str]:
    """Every exam that was sat, those that we know first."""
    found = {exam for stage in sat for exam in stage.exams}
    return [exam for exam in EXAMS if exam in found] + sorted(found - set(EXAMS))


def _row(exam: str, sat: Sequence[Stage], forgetting: Record) -> Record:
    """One exam: its result, groups and change in every stage.

    Shades compare within a row. Scores are shares of one, so their shade is the score; of bits
    per byte the fewest are darkest.
    """
    results = [stage.exams.get(exam) for stage in sat]
    bits = exam.startswith("bits_per_byte")
    fewest = min(result["score"] for result in results if result)
    cells = []
    for result in results:
        share = result["score"] if result else 0.0
        if result and bits:
            share = (fewest / share) ** 3 if share else 1.0
        cells.append({"result": result, "shade": round(min(max(share, 0.0), 1.0), 3)})
    groups = [(result or {}).get("groups") or {} for result in results]
    changes = [changed.get(exam) for changed in forgetting.values()]
    return {
        "about": EXAMS.get(exam, Exam(exam, "", "")),
        "bits": bits,
        "cells": cells,
        "groups": {
            name: [of_stage.get(name) for of_stage in groups]
            for name in sorted({name for of_stage in groups for name in of_stage})
        },
        "changes": [c and {**c, "verdict": _judge(c, bits)} for c in changes]
        if any(changes)
        else [],
    }


def _judge(change: Record, more_is_worse: bool) -> str:
    """``better`` or ``worse`` where a change is more than chance, else nothing."""
    if change["stderr"] is None or abs(change["delta"]) <= 2 * change["stderr"]:
        return ""
    return "worse" if (change["delta"] > 0) == more_is_worse else "better"


def _dialogues(spoke: Sequence[Stage]) -> list[Record]:
    """Every prompt with each stage's reply, or None where it was not asked."""
    replies = {s.name: {sample["prompt"]: sample for sample in s.samples} for s in spoke}
    prompts = dict.fromkeys(sample["prompt"] for stage in spoke for sample in stage.samples)
    return [
        {"prompt": prompt, "replies": [replies[stage.name].get(prompt) for stage in spoke]}
        for prompt in prompts
    ]


def main(argv: list[str]) -> int:
    """``instar report RUN``: write the report of a run and say where it is."""
    parser = argparse.ArgumentParser(
        prog="instar report",
        description="Write report.html and report.json of a run: what every stage cost, what it "
        "taught, and what the model says at each stage. Stages that are missing are left out.",
    )
    parser.add_argument("run", type=Path, help="directory of the run, such as runs/mini")
    for path in write_report(parser.parse_args(argv).run):
        print(path)
    return 0
