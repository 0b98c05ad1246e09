"""Drawings by hand: widths in proportion, nothing lost, labels that are only text."""

import re
import xml.etree.ElementTree as ET

import pytest

from instar.report.drawn import MIDDLE, THINNEST, Step, histogram, percent, shorten, waterfall


def widths(svg: str, kind: str) -> list[float]:
    return [float(w) for w in re.findall(rf'width="([\d.]+)" height="[\d.]+" class="{kind}"', svg)]


def test_a_flow_is_in_proportion():
    svg = waterfall(
        [Step("read", 1000, 750, {"<b>": 200, "太短": 50}), Step("near", 750, 300, {"c": 450})],
        "documents",
    )
    ET.fromstring(svg)
    assert widths(svg, "kept") == pytest.approx([MIDDLE * s for s in (0.75, 0.3, 0.3)], abs=0.1)
    assert widths(svg, "lost") == pytest.approx([MIDDLE * s for s in (0.2, 0.05, 0.45)], abs=0.1)
    assert "&lt;b&gt;" in svg and "−50 太短 (5.0%)" in svg and "300 (30.0%)" in svg


def test_what_is_rare_is_still_seen():
    svg = waterfall([Step("read", 10**6, 10**6 - 1, {"x": 1})], "documents")
    assert widths(svg, "lost") == [THINNEST] and "−1 x (&lt; 0.1%)" in svg
    assert "999,999 (&gt; 99.9%)" in svg


def test_what_is_added_is_drawn_beside_what_went_on():
    svg = waterfall([Step("fold", 80, 100, {"x": 20})], "characters")
    assert widths(svg, "kept")[0] == pytest.approx(MIDDLE * 60 / 120, abs=0.1)
    assert widths(svg, "added") == pytest.approx([MIDDLE * 40 / 120], abs=0.1)
    assert "+40 added" in svg


@pytest.mark.parametrize(("went", "first"), [(40, "−30 a (30.0%)"), (45, "+5 added")])
def test_many_rules_are_added_up_and_none_is_forgotten(went, first):
    lost = {"a": 30, "b": 20, "c": 7, "d": 3}
    svg = waterfall([Step("q", 100, went, lost)], "documents")
    rest = "−30 by 3 other rules" if went == 40 else "−60 by 4 other rules"
    assert first in svg and rest in svg
    assert len(widths(svg, "lost")) == 4


def test_no_step_and_nothing_at_all():
    ET.fromstring(waterfall([Step("read", 0, 0)], "documents"))


def test_a_histogram_has_a_bar_for_each_power_of_two():
    svg = histogram({3: 10, 5: 5}, range(2, 7), 'of "a" & b')
    ET.fromstring(svg)
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" class="kept"', svg)]
    assert heights == pytest.approx([0, 96, 0, 48, 0])
    assert "4 to 7 characters: 10" in svg and "16 to 31 characters: 5" in svg


def test_texts_are_shortened_by_the_width_of_their_characters():
    assert shorten("abcdef", 6) == "abcdef" and shorten("abcdefg", 6) == "abcdef…"
    assert shorten("春眠不觉晓", 6) == "春眠不…"


def test_shares_are_never_rounded_to_nothing_or_all():
    assert [percent(n, 10_000) for n in (0, 1, 5000, 9999, 10_000)] == [
        "0.0%", "< 0.1%", "50.0%", "> 99.9%", "100%"
    ]  # fmt: skip
    assert percent(0, 0) == "0.0%"
