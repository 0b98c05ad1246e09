from __future__ import annotations

import pytest

from instar.planning.speed import Line


def test_a_line_goes_through_its_points() -> None:
    line = Line(0.5, 0.01, 0.0002)
    points = [(n, w, line(n, w)) for n, w in ((256, 32), (2048, 32), (2048, 256))]
    found = Line.through(points[0], points[1], points[2])
    assert found(1000, 100) == pytest.approx(line(1000, 100))


def test_noise_makes_no_part_negative() -> None:
    line = Line.through((256, 32, 1.0), (2048, 32, 0.9), (2048, 256, 0.8))
    assert line.start >= 0 and line.token == 0 and line.pair == 0
