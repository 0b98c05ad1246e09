import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

from instar.report.plots import Stretch, timeline
from instar.report.resources import _on_one_clock, timelines
from instar.report.tables import Stage, read_run

GPU = {"gpu0_percent": 40, "gpu0_bytes": 2**30, "gpu0_watts": 100.0}
GPU |= {"gpu1_percent": 60, "gpu1_bytes": 2**30, "gpu1_watts": 150.0}


def told(svg: str) -> str:
    ET.fromstring(svg)
    return re.findall(r'aria-label="([^"]*)"', svg)[0]


def test_a_second_sitting_goes_on_where_the_first_stopped():
    rows = [{"elapsed_s": t} for t in (2.0, 4.0, 6.0, 2.0, 4.0)]
    assert [at for at, _ in _on_one_clock(rows)] == [2, 4, 6, 8, 10]


def test_a_cpu_life_has_two_charts(run: Path):
    charts = timelines(read_run(run))
    assert [told(chart).partition(":")[0] for chart in charts] == [
        "Processor in % of one core over the whole life",
        "Memory of the process in GiB over the whole life",
    ]
    # Stages that train nothing are not sampled.
    assert "pretrain at most 1.21" in told(charts[1]) and "tokenizer" not in told(charts[1])


def test_gpus_are_added_up_or_averaged():
    row = {"elapsed_s": 2.0, "cpu_percent": 100.0, "rss_bytes": 2**30, **GPU}
    charts = timelines([Stage("sft", {}, resources=[row])])
    assert [told(chart).rpartition(" ")[2] for chart in charts] == ["100", "1", "50", "2", "250"]


def test_a_run_without_samples_has_no_charts(run: Path):
    for path in run.glob("*/resources.jsonl"):
        path.unlink()
    assert timelines(read_run(run)) == []


def test_a_row_that_was_still_being_written_is_left_out(run: Path):
    path = run / "sft" / "resources.jsonl"
    whole = len(path.read_text(encoding="utf-8").splitlines())
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"elapsed_s": 1})[:5])
    sft = next(stage for stage in read_run(run) if stage.name == "sft")
    assert len(sft.resources) == whole


def test_short_stages_go_without_their_name():
    svg = timeline([Stretch("long", [0, 99], [1, 2]), Stretch("short", [1], [2])], "CPU", "%")
    assert ">long<" in svg and ">short<" not in svg and "short at most 2" in told(svg)
