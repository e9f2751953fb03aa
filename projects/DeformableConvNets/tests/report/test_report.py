# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import json
import logging
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO

from dcn_d2.report import try_report, write_report
from dcn_d2.report.__main__ import main
from dcn_d2.report.evaluation import MEASURES, run_evaluation, summarize
from dcn_d2.report.run import Run

from .made_run import CLASSES, forget, make_run

NAME = "report_test"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Reader(HTMLParser):
    """Reads a page: its tags must nest, and nothing may come from elsewhere or run."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.pictures = 0
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "b") or (
            tag == "b" and "div" in self.open
        )
        values = dict(attributes)
        assert not any(key.startswith("on") for key in values)
        for key in ("src", "href", "xlink:href"):
            assert (values.get(key) or "#").startswith(("#", "data:image/")), values
        self.pictures += tag in ("img", "svg")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("run")
    found = make_run(folder, NAME)
    forget(NAME)
    return {"folder": folder, **found}


@pytest.fixture
def folder(results: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the run, whose data stay where they were."""
    return Path(shutil.copytree(results["folder"], tmp_path / "run", ignore=shutil.ignore_patterns("data")))


def read(folder: Path) -> Reader:
    return Reader(write_report(folder).read_text(encoding="utf-8"))


def test_numbers_are_those_of_the_evaluation(results: dict[str, Any]) -> None:
    (found,) = Run(results["folder"]).test_sets()
    done = run_evaluation(COCO(str(found.annotations)), found.read_results(), "bbox")
    summary = summarize(done, "bbox")
    for measure in MEASURES["bbox"]:
        assert summary.ap[measure] == pytest.approx(results["bbox"][measure], abs=1e-9, nan_ok=True)
    for one in summary.classes:
        assert one.ap["AP"] == pytest.approx(results["bbox"][f"AP-{one.name}"], abs=1e-9)
    assert [one.name for one in summary.classes] == list(CLASSES)
    assert 20 < summary.ap["AP"] < 90, "a comparison of zeros would say nothing"
    assert summary.curves[0].mean() * 100 == pytest.approx(summary.ap["AP50"])
    assert summary.curves[1].mean() * 100 == pytest.approx(summary.ap["AP75"])
    assert sum(one.objects for one in summary.classes) == 30


def test_page_is_whole_harmless_and_needs_nothing_else(folder: Path, results: dict[str, Any]) -> None:
    page = read(folder)
    for name in CLASSES:
        assert name in page.text
    assert "a<2>.png : 4 missed, 4 wrong, 1 right" in page.text
    assert "1 of 6 images have no mistakes in boxes" in page.text
    assert f"{results['bbox']['AP']:.2f}" in page.text and f"{results['bbox']['APs']:.2f}" in page.text
    assert "Trained to the end: 400 iterations. It was resumed 1 time." in page.text
    assert "Resumed at iteration 200" in page.text
    assert "images per second" in page.text and "64.0" in page.text  # 16 images in 0.25 s
    assert "Left out" not in page.text and "Not drawn" not in page.text and "metrics.json has" not in page.text
    assert page.pictures == 6 + 5, "curves, bars and the images"
    assert "SOLVER.MAX_ITER" in page.text and "torch" in page.text
    assert "prefers-color-scheme: dark" in (folder / "report.html").read_text()


def test_figures_take_the_colour_of_the_page_and_share_no_names(folder: Path) -> None:
    page = write_report(folder).read_text(encoding="utf-8")
    assert page.count("currentColor") > 100 and "#010203" not in page
    names = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(names) == len(set(names)) > 4


def test_report_may_be_made_again_and_replaces_only_its_own(folder: Path) -> None:
    first = write_report(folder).stat().st_ino
    assert write_report(folder).stat().st_ino != first
    assert not list(folder.glob(".*.part"))
    (folder / "report.html").write_text("<h1>mine</h1>")
    with pytest.raises(FileExistsError, match="report.html was not written by dcn_d2"):
        write_report(folder)
    assert (folder / "report.html").read_text() == "<h1>mine</h1>"


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("metrics.json", None, "Left out: there is no metrics.json: it did not train here."),
        ("metrics.json", "{", "Left out: metrics.json has no evaluations."),
        ("metrics.json", '[1]\n{"iteration": 3, "sem_seg/mIoU": 51.25}\n', "51.25"),
        ("config.yaml", None, "Left out: there is no config.yaml."),
        ("config.yaml", "MODEL: [", "Left out: ConfigError"),
        ("runs.json", '{"runs": 3, "data_sets": DATA_SETS}', "Left out: there is no runs.json."),
        (f"inference/{NAME}/coco_instances_results.json", "[", "Left out: JSONDecodeError"),
        (f"inference/{NAME}/coco_instances_results.json", "[]", "Left out: the model has found nothing in it."),
        (f"inference/{NAME}/coco_instances_results.json", '[{"a": 1}]', "Left out: "),
    ],
)
def test_missing_or_damaged_file_costs_its_part_alone(folder: Path, file: str, content: str | None, line: str) -> None:
    data_sets = json.loads((folder / "runs.json").read_text())["data_sets"]
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content.replace("DATA_SETS", json.dumps(data_sets)))
    page = read(folder)
    assert line in page.text
    assert "Times and versions" in page.text
    assert ("The worst images" in page.text) == (not file.startswith("inference"))


def test_data_that_are_gone_are_told(folder: Path, results: dict[str, Any], tmp_path: Path) -> None:
    record = json.loads((folder / "runs.json").read_text())
    record["data_sets"][NAME]["images"] = str(tmp_path / "gone")
    (folder / "runs.json").write_text(json.dumps(record))
    assert "Not drawn: a<" in read(folder).text
    record["data_sets"][NAME]["annotations"] = str(tmp_path / "gone.json")
    (folder / "runs.json").write_text(json.dumps(record))
    assert "its annotation file is not where it was" in read(folder).text


def test_run_without_notes_is_reported(folder: Path) -> None:
    (folder / "runs.json").unlink()
    page = read(folder)
    assert "no notes of a training" in page.text and "its annotation file is not where it was" in page.text
    assert "Left out: there is no runs.json." in page.text and "SOLVER.MAX_ITER" in page.text


def test_results_of_another_evaluation_are_noticed(folder: Path) -> None:
    with (folder / "metrics.json").open("a") as file:
        file.write('{"iteration": 420, "bbox/AP": 12.5}\n')
    assert "metrics.json has 12.50 as the last AP of the training" in read(folder).text


def test_interrupted_run_is_reported(folder: Path) -> None:
    record = json.loads((folder / "runs.json").read_text())
    record["runs"] = record["runs"][:1]
    (folder / "runs.json").write_text(json.dumps(record))
    assert "Stopped by a signal after 200 of 400 iterations." in read(folder).text
    record["runs"][0] |= {"status": "training"}
    (folder / "runs.json").write_text(json.dumps(record))
    assert "Still running, or killed: no end is noted of its 400 iterations." in read(folder).text


def test_report_never_fails_a_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no ink")

    with caplog.at_level(logging.WARNING):
        try_report(folder / "nowhere")
        try_report("s3://bucket/run")
        monkeypatch.setattr("dcn_d2.report.build.page", fail)
        try_report(folder)
    assert [record.message.partition(": ")[0] for record in caplog.records] == ["no report.html was written"] * 3
    assert "there is no folder" in caplog.text and "not on a local disk" in caplog.text and "no ink" in caplog.text
    assert not (folder / "report.html").exists()


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(folder)])
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="holds nothing of a run"):
        main([str(tmp_path / "empty")])
