import json
import shutil

import pytest

from instar.errors import UserError
from instar.report import page, tables
from instar.report.tables import collect


def test_collects_every_number_by_its_documented_name(run):
    report = collect(run)
    assert list(report["stages"]) == list(tables.LIFE[1:])  # no text of a user
    assert report["total"]["stages_wall_s"] == pytest.approx(723.5)
    assert report["total"]["wall_s"] == pytest.approx(723.5 + 76.5)
    assert report["total"]["peak_rss_bytes"] == int(1.66 * 2**30)
    assert report["stages"]["dpo"]["parents"] == ["sft"]
    assert report["stages"]["sft"]["exams"]["knowledge"]["score"] == 0.71
    assert report["stages"]["reward"]["exams"]["unseen_combinations"]["n"] == 240
    assert report["comparisons"]["ppo_vs_sft"]["kl"] == 6.8
    assert report["baselines"]["ngram"]["zh"]["score"] == 1.31
    json.dumps(report, allow_nan=False)


def test_a_gpus_memory_is_told_where_there_was_one(run):
    assert collect(run)["total"]["peak_gpu_bytes"] == 0, "older lineages do not know of it"
    assert "GPU" not in page.summary(collect(run))
    path = run / "sft" / "lineage.json"
    lineage = json.loads(path.read_text(encoding="utf-8"))
    lineage["cost"]["peak_gpu_bytes"] = 3 * 2**29
    path.write_text(json.dumps(lineage), encoding="utf-8")
    assert collect(run)["total"]["peak_gpu_bytes"] == 3 * 2**29
    assert "1.66 GiB of memory and 1.50 GiB of a GPU's." in page.summary(collect(run))
    titles = " ".join(page._resources(tables.read_run(run)))
    assert "Peak memory of the GPU" in titles


def test_forgetting_is_the_difference_from_sft(run):
    forgetting = collect(run)["forgetting"]
    assert list(forgetting) == ["dpo", "ppo", "rlvr"]
    change = forgetting["rlvr"]["translation"]
    assert change["delta"] == pytest.approx(-0.04)
    # sqrt(0.78 * 0.22 / 240 + 0.74 * 0.26 / 240)
    assert change["stderr"] == pytest.approx(0.038944, abs=1e-6)


def test_shows_what_is_there(run):
    for name in ("data", "sft", "ppo"):
        shutil.rmtree(run / name)
    (run / "rlvr" / "exams.json").unlink()
    report = collect(run)
    assert list(report["stages"]) == ["tokenizer", "pretrain", "reward", "dpo", "rlvr"]
    assert report["forgetting"] == {} and "ppo_vs_sft" not in report["comparisons"]


def test_directories_that_are_being_written_are_no_stages(run):
    shutil.copytree(run / "sft", run / ".sft.writing")
    assert list(collect(run)["stages"]) == list(tables.LIFE[1:])  # no text of a user


def test_an_unfinished_row_is_not_a_row(run):
    stages = {stage.name: stage for stage in tables.read_run(run)}
    assert stages["sft"].metrics[-1]["step"] == 160


def test_says_what_is_wrong(run, tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        collect(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no finished stage"):
        collect(run / "sft")
    (run / "dpo" / "exams.json").write_text("{")
    with pytest.raises(UserError, match=r"dpo/exams.json is not JSON"):
        collect(run)
