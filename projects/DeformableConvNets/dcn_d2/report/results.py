# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The parts of a report about one test set: AP by class and size, curves, thresholds, and mistakes."""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .drawing import draw_mistakes
from .evaluation import MEASURES, SIZES, ClassResult, TaskResult, run_evaluation, summarize, tasks_of
from .history import split_measure
from .mistakes import confusion, find_mistakes
from .page import details, number, picture, table, text
from .plots import draw_bars, draw_curves
from .run import Missing, Run, SetResults

WORST = 8  # images that are drawn
MOST_CLASSES = 20  # in one plot or matrix
SHOWN_OF_MANY = 8  # best and worst classes, where there are more
NAMES = {"bbox": "Boxes", "segm": "Masks", "keypoints": "Keypoints"}
LARGEST_IMAGE = 60_000_000  # pixels


def test_set(run: Run, results: SetResults) -> str:
    """Gives all about one test set."""
    if results.annotations is None:
        raise Missing("its annotation file is not where it was, so that nothing can be compared with it")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(results.annotations))
    if "annotations" not in truth.dataset:
        raise Missing("its file has no annotations")
    found = results.read_results()
    if not found:
        raise Missing("the model has found nothing in it")
    parts = []
    if not (tasks := tasks_of(found)):
        raise Missing("its results have neither boxes nor masks nor keypoints")
    mistakes = ""
    for task in tasks:
        sigmas = run.cfg.TEST.KEYPOINT_OKS_SIGMAS if task == "keypoints" else ()
        done = run_evaluation(truth, found, task, sigmas)
        result = summarize(done, task)
        parts.append(f"<h3>{NAMES[task]}</h3>{_numbers(result)}{_differences(run, results, result)}{_plots(result)}")
        parts.append(_classes(result))
        if task == "bbox":
            mistakes = _mistakes(results, done, result)
        del done  # hundreds of MB for COCO
    objects = f"{len(truth.imgs):,} images, {len(truth.anns):,} objects, {len(found):,} detections"
    return f'<p class="dim">{text(objects)}</p>' + "".join(parts) + mistakes


def _numbers(result: TaskResult) -> str:
    names = MEASURES[result.task]
    sizes = {short: long for long, short in SIZES.items()}
    head = [f"{name} ({sizes[name]})" if name in sizes else name for name in names]
    best = result.best
    sentence = (
        f"One threshold for all classes: at a score of {best.score:.2f} F1 is best, {best.f1:.2f} (precision "
        f"{best.precision:.2f}, recall {best.recall:.2f}), at IoU 0.5."
        if math.isfinite(best.score)
        else "No detection is right at IoU 0.5, so that no threshold of the score is best."
    )
    row = table(head, [[number(result.ap[name], 2) for name in names]], range(len(names)))
    return row + f"<p>{text(sentence)}</p>"


def _differences(run: Run, results: SetResults, result: TaskResult) -> str:
    """Says where metrics.json has another AP: another evaluation has written the results since, or before."""
    for key, series in run.history.items():
        measure = split_measure(key)
        if measure and measure[0] in ("", results.name) and measure[1:] == (result.task, "AP"):
            last = series.values[-1]
            same = abs(last - result.ap["AP"]) < 1e-6 or (math.isnan(last) and math.isnan(result.ap["AP"]))
            if not same and results.title == results.name:
                return (
                    f'<p class="warn">metrics.json has {number(last, 2)} as the last AP of the training. The results '
                    "in the folder are of another evaluation, with other weights or settings.</p>"
                )
    return ""


def _plots(result: TaskResult) -> str:
    measure = "OKS" if result.task == "keypoints" else "IoU"
    curves = {f"{measure} 0.5": result.curves[0], f"{measure} 0.75": result.curves[1]}
    plots = [draw_curves(result.recalls, curves, "precision over recall, mean of the classes")]
    if len(result.classes) > 1:
        shown, which = _choose(result.classes)
        own = {one.name: one.curves[0] for one in shown}
        plots.append(draw_curves(result.recalls, own, f"{which} at {measure} 0.5"))
        plots.append(draw_bars([one.name for one in shown], [one.ap["AP"] for one in shown], f"AP, {which}"))
    sizes = {long: result.ap[short] for long, short in SIZES.items() if short in result.ap}
    plots.append(draw_bars(list(sizes), list(sizes.values()), "AP by size of the object"))
    return f'<div class="row">{"".join(f"""<div class="plot">{plot}</div>""" for plot in plots)}</div>'


def _choose(classes: list[ClassResult]) -> tuple[list[ClassResult], str]:
    """Gives the classes that a plot shows, the best first, and what to call them."""
    ordered = sorted(classes, key=lambda one: -np.nan_to_num(one.ap["AP"], nan=-1))
    if len(ordered) <= MOST_CLASSES:
        return ordered, "by class"
    measured = [one for one in ordered if not math.isnan(one.ap["AP"])]
    chosen = [*measured[:SHOWN_OF_MANY], *measured[SHOWN_OF_MANY:][-SHOWN_OF_MANY:]]
    return chosen, "the best and the worst classes"


def _classes(result: TaskResult) -> str:
    measures = [name for name in MEASURES[result.task] if name != "AP"]
    head = ["class", "objects", "AP", *measures, "best score", "F1", "precision", "recall"]
    rows = [
        [
            one.name,
            f"{one.objects:,}",
            *(number(one.ap.get(name), 1) for name in ("AP", *measures)),
            *(number(value, 2) for value in (one.best.score, one.best.f1, one.best.precision, one.best.recall)),
        ]
        for one in sorted(result.classes, key=lambda one: -np.nan_to_num(one.ap["AP"], nan=-1))
    ]
    listed = table(head, rows, range(1, len(head)))
    return listed if len(rows) <= MOST_CLASSES else details(f"All {len(rows)} classes", listed)


def _mistakes(results: SetResults, done: COCOeval, result: TaskResult) -> str:
    threshold = result.best.score if math.isfinite(result.best.score) else 0.5
    worst = find_mistakes(done, threshold)
    images = len(done.params.imgIds)
    sentence = f"{images - len(worst):,} of {images:,} images have no mistakes in boxes at a score of {threshold:.2f} "
    sentence += "and IoU 0.5."
    parts = [f"<h3>Mistakes</h3><p>{text(sentence)}</p>"]
    if len(result.classes) > 1:
        parts.append(_confusion(result, confusion(done, threshold)))
    if worst:
        colors = "Left the objects: green found, yellow missed. Right the detections: green right, red wrong."
        parts.append(f'<h3>The worst images</h3><p class="dim">{text(colors)}</p>')
    unread = []
    for mistakes in worst[:WORST]:
        file_name = str(done.cocoGt.imgs[mistakes.image].get("file_name", mistakes.image))
        try:
            caption = f"<code>{text(file_name)}</code>: {len(mistakes.missed)} missed, {len(mistakes.wrong)} wrong, "
            caption += f"{len(mistakes.right)} right"
            parts.append(picture(draw_mistakes(_read(results, file_name), done, mistakes), caption))
        except Exception as error:  # a damaged image or annotation must not cost the rest of the report
            unread.append(f"{file_name}: {error}")
    if unread:
        parts.append(f'<p class="missing">Not drawn: {text("; ".join(unread))}</p>')
    return "".join(parts)


def _read(results: SetResults, file_name: str) -> np.ndarray:
    from PIL import Image, ImageOps

    path = results.find_image(file_name)
    if path is None:
        raise Missing("the image is not where it was")
    with Image.open(path) as image:
        if image.width * image.height > LARGEST_IMAGE:
            raise Missing(f"{image.width} x {image.height} pixels are too many to draw")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            return np.repeat((np.asarray(image) // 256).astype(np.uint8)[:, :, None], 3, axis=2)
        return np.asarray(image.convert("RGB"))


def _confusion(result: TaskResult, counts: np.ndarray) -> str:
    names = [one.name for one in result.classes]
    title = "<h3>Classes that are taken for others</h3>"
    if len(names) <= MOST_CLASSES:
        note = "Rows: what it is. Columns: what was found. Boxes of IoU 0.5 or more, whatever their class."
        return f'{title}<p class="dim">{text(note)}</p>{_matrix(names, counts)}'
    pairs = counts[:-1, :-1].copy()
    np.fill_diagonal(pairs, 0)
    order = np.argsort(-pairs, axis=None)[:MOST_CLASSES]
    rows: list[tuple[Any, ...]] = []
    for row, column in zip(*np.unravel_index(order, pairs.shape)):
        if pairs[row, column]:
            share = pairs[row, column] / max(1, counts[row].sum())
            rows.append((names[row], names[column], int(pairs[row, column]), f"{share:.0%}"))
    if not rows:
        return f"{title}<p>None.</p>"
    return title + table(("an object of class", "was taken for", "times", "of its objects"), rows, (2, 3))


def _matrix(names: list[str], counts: np.ndarray) -> str:
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    head = "".join(f"<th>{text(name)}</th>" for name in [*names, "nothing"])
    lines = []
    for row, name in enumerate([*names, "nothing"]):
        cells = []
        for column, count in enumerate(counts[row]):
            right = row == column
            color = f"rgba({'47,160,132' if right else '214,96,77'},{0.75 * share[row, column]:.2f})"
            shown = "" if row == column == len(names) else int(count)
            cells.append(f'<td class="n" style="background:{color}">{shown}</td>')
        lines.append(f"<tr><th>{text(name)}</th>{''.join(cells)}</tr>")
    return f'<table class="matrix"><tr><th></th>{head}</tr>{"".join(lines)}</table>'
