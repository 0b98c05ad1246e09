import re
import xml.etree.ElementTree as ET

import numpy as np

from instar.report.plots import INK, POINTS, Line, _running_mean, _thin, bars, curve


def ids(svg: str) -> list[str]:
    return re.findall(r'\bid="([^"]*)"', svg)


def test_a_curve_is_small_sound_and_follows_the_page():
    steps = list(range(1, 2001))
    values = [5 / step for step in steps]
    svg = curve(
        [Line("train", steps, values), Line("valid", [1000, 2000], [1, 0.5])], "A < B", "x", "sft"
    )
    ET.fromstring(svg)
    assert len(svg) < 40_000
    assert INK not in svg and "currentColor" in svg and "font-family" not in svg
    assert 'aria-label="A &lt; B over the steps of sft: train ends at 0.0025, valid' in svg
    assert "<text" in svg and "<style" not in svg


def test_names_are_unique_and_none_is_missing():
    first = curve([Line("train", [1, 2], [1, 2])], "Loss", "nats", "sft")
    second = curve([Line("train", [1, 2], [2, 1])], "Loss", "nats", "sft")
    both = first + second + bars(["a", "b"], [1, 2], "Time", "s")
    assert len(ids(both)) == len(set(ids(both)))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]*)', both)) <= set(ids(both))
    assert first == curve([Line("train", [1, 2], [1, 2])], "Loss", "nats", "sft")


def test_thinning_keeps_the_mean_and_smoothing_keeps_straight_lines():
    values = np.arange(3000.0)
    assert len(_thin(values)) == POINTS and _thin(values).mean() == values.mean()
    assert np.allclose(_running_mean(values, 7), values[7:-7])
    assert np.allclose(_running_mean(np.array([0, 3, 0, 6]), 1), [1, 3])


def test_bars_tell_their_values():
    assert "pretrain 301; sft 84" in bars(["pretrain", "sft"], [301.4, 84], "Wall time", "s")
