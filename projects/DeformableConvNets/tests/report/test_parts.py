# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Numbers of the report that can be checked by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from pycocotools.coco import COCO

from dcn_d2.report.evaluation import best_threshold, run_evaluation, summarize
from dcn_d2.report.history import Series, is_training_loss, is_validation_loss, read_history, split_measure
from dcn_d2.report.mistakes import confusion, find_mistakes
from dcn_d2.report.page import duration, number, table
from dcn_d2.report.plots import _with_gaps, draw_losses
from dcn_d2.report.run import count_annotations


def test_best_threshold_by_hand() -> None:
    right = np.array([True, False, True, True, False])
    best = best_threshold(np.array([0.9, 0.8, 0.7, 0.3, 0.2]), right, 4)
    # At 0.3: precision 3/4, recall 3/4. At 0.7: 2/3 and 1/2.
    assert (best.score, best.f1, best.precision, best.recall) == pytest.approx((0.3, 0.75, 0.75, 0.75))
    # Of equal scores, all or none are taken.
    assert best_threshold(np.array([0.5, 0.5]), np.array([True, False]), 1).precision == 0.5
    assert math.isnan(best_threshold(np.array([0.5]), np.array([False]), 3).score)
    assert math.isnan(best_threshold(np.zeros(0), np.zeros(0, bool), 0).score)


def make_truth(path: Path) -> COCO:
    """Three images: in the first two a cat and a dog side by side, in the third a crowd of dogs."""

    def entry(number: int, image: int, category: int, x: float, crowd: int = 0) -> dict[str, Any]:
        box = [x, 0.0, 40.0, 40.0]
        return {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": 1600, "iscrowd": crowd}

    annotations = [entry(1, 1, 1, 0), entry(2, 1, 2, 50), entry(3, 2, 1, 0), entry(4, 2, 2, 50), entry(5, 3, 2, 0, 1)]
    images = [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 50} for i in (1, 2, 3)]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return COCO(str(path))


def found(image: int, category: int, x: float, score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": [x, 0.0, 40.0, 40.0], "score": score}


def test_mistakes_and_confusion_by_hand(tmp_path: Path) -> None:
    detections = [
        found(1, 1, 0, 0.9),  # the cat
        found(1, 1, 50, 0.8),  # the dog, taken for a cat
        found(1, 2, 51, 0.3),  # the dog, but below the threshold
        found(2, 1, 1, 0.9),
        found(2, 2, 49, 0.9),
        found(2, 2, 0, 0.7),  # the cat again, as a dog
        found(3, 2, 2, 0.9),  # one of the crowd: neither right nor wrong
    ]
    done = run_evaluation(make_truth(tmp_path / "truth.json"), detections, "bbox")
    worst = find_mistakes(done, 0.5)
    assert [(one.image, one.found, one.missed, len(one.right), len(one.wrong)) for one in worst] == [
        (1, [1], [2], 1, 1),
        (2, [3, 4], [], 2, 1),
    ]
    assert find_mistakes(done, 0.2)[-1].missed == []
    table = confusion(done, 0.5)
    assert table.tolist() == [[2, 0, 0], [1, 1, 0], [0, 1, 0]]
    summary = summarize(done, "bbox")
    assert [one.objects for one in summary.classes] == [2, 2]
    # Above 0.9 are three right ones of four objects.
    assert (summary.best.score, summary.best.precision, summary.best.recall) == pytest.approx((0.9, 1.0, 0.75))


def test_history_has_what_a_kill_left(tmp_path: Path) -> None:
    lines = ['{"iteration": 1, "total_loss": 2.0, "name": "x"}', "3", '{"iteration": 2, "total_loss": NaN}', '{"iterat']
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    series = read_history(tmp_path)["total_loss"]
    assert series.iterations == [1, 2] and series.values[0] == 2 and math.isnan(series.values[1])
    series.iterations, series.values = list(range(1000)), [float(value) for value in range(1000)]
    x, y = series.thinned(10)
    assert len(x) == 10 and x.tolist() == y.tolist() and x[0] == 49.5


def test_keys_are_told_apart() -> None:
    assert split_measure("bbox/AP") == ("", "bbox", "AP")
    assert split_measure("my/val/segm/AP-a/b") == ("my/val", "segm", "AP-a/b")
    assert split_measure("bbox_TTA/AP50") == ("", "bbox_TTA", "AP50")
    assert split_measure("roi_head/num_fg_samples") is None
    assert is_training_loss("loss_cls") and is_training_loss("total_loss") and not is_training_loss("val_loss")
    assert is_validation_loss("validation/total_loss") and not is_validation_loss("loss_value")


def test_gaps_interrupt_a_line() -> None:
    x, _ = _with_gaps(np.array([0.0, 20, 40, 400, 420]), np.zeros(5))
    assert np.isnan(x).tolist() == [False, False, False, True, False, False]


def test_words_for_numbers() -> None:
    assert [duration(value) for value in (5, 65, 3700, 90000, float("nan"))] == [
        "5 s",
        "1 min 5 s",
        "1 h 1 min",
        "1 d 1 h",
        "–",
    ]
    assert (number(float("nan")), number(None), number(1234.56)) == ("–", "–", "1,234.6")
    assert "<td>&lt;i&gt;&quot;</td>" in table(["a"], [['<i>"']])


def test_annotation_files_that_are_too_large_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_truth(tmp_path / "truth.json")
    assert count_annotations(str(tmp_path / "truth.json")) == ("3", "5", "2")
    monkeypatch.setattr("dcn_d2.report.run.LARGEST_COUNTED", 10)
    assert count_annotations(str(tmp_path / "truth.json"))[0].startswith("not counted: the file has")
    assert count_annotations(str(tmp_path / "gone"))[0] == "its annotation file is gone"


def test_the_legend_of_many_losses_was_cut_off_and_pressed_the_plot_to_half_its_width(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    series, names = Series([0, 1, 2], [1.0, 2.0, 3.0]), [f"loss_box_reg_{i}" for i in range(5)]
    draw_losses(dict.fromkeys(names, series), {f"validation_loss/{name}": series for name in names}, None, [])
    figure = drawn[0]
    axes = figure.axes[0]
    legend = axes.get_legend().get_window_extent()
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.x1 and legend.y1 <= figure.bbox.y1
    assert axes.get_window_extent().width > 0.8 * figure.bbox.width
