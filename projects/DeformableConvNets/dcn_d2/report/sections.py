# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The parts of a report about the run as a whole. Each gives HTML, or raises `Missing` with the reason."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ..config.access import keys_of, value_of
from .history import is_training_loss, is_validation_loss, split_measure
from .page import details, duration, number, table, text, tiles
from .plots import draw_losses, draw_progress
from .run import Missing, Run, count_annotations

HEADLINES = ("AP", "AP50", "APr", "mIoU", "PQ")  # the measures that a curve over the evaluations shows


def summary(run: Run) -> str:
    """Gives the first lines: what it is, how it ended, and the numbers that one looks for first."""
    facts: list[tuple[str, str]] = []
    for key, series in run.history.items():
        measure = split_measure(key)
        if measure and measure[2] in ("AP", "PQ", "mIoU"):
            facts.append((" ".join([*filter(None, measure[:2]), measure[2]]), number(series.values[-1])))
    loss = run.history.get("total_loss")
    if loss:
        facts.append(("iterations", f"{max(loss.iterations) + 1:,}"))
        facts.append(("last loss", number(loss.values[-1], 3)))
    seconds = [run_["seconds"] for run_ in run.trainings if isinstance(run_.get("seconds"), (int, float))]
    if seconds:
        facts.append(("time" if len(run.trainings) == len(seconds) else "time (at least)", duration(sum(seconds))))
    if speed := images_per_second(run):
        facts.append(("images per second", number(speed)))
    memory = [run_["memory"] for run_ in run.starts if isinstance(run_.get("memory"), dict)]
    for device in ("GPU", "process"):
        if sizes := [entry[device] for entry in memory if entry.get(device)]:
            facts.append((f"peak memory, {device}", f"{max(sizes) / 1e9:.2f} GB"))
            break
    return f'<p class="lead">{text(describe_end(run))}</p>{tiles(facts)}'


def describe_end(run: Run) -> str:
    """Says in a sentence whether the last training of a run came to its end."""
    if not run.starts:
        return "The folder has no notes of a training or an evaluation (runs.json): what the other files tell is here."
    last = run.starts[-1]
    if last.get("status") == "evaluated":
        return f"Evaluated, with the weights {last.get('weights') or 'of the last checkpoint'}."
    done, most = last.get("end"), last.get("max_iter", 0)
    times = len(run.trainings)
    again = f" It was resumed {times - 1} time{'s' if times > 2 else ''}." if times > 1 else ""
    sentences = {
        "finished": f"Trained to the end: {most:,} iterations.",
        "stopped early": f"Stopped early after {done or 0:,} of {most:,} iterations: no longer better (TEST.PATIENCE).",
        "stopped": f"Stopped by a signal after {done or 0:,} of {most:,} iterations.",
        "failed": f"Ended by an error after {done or 0:,} of {most:,} iterations.",
    }
    unfinished = f"Still running, or killed: no end is noted of its {most:,} iterations."
    return sentences.get(str(last.get("status")), unfinished) + again


def images_per_second(run: Run) -> float | None:
    """The batch over the median time of an iteration; evaluations are not counted."""
    times = run.history.get("time")
    batch = next((entry["batch"] for entry in run.trainings[::-1] if entry.get("batch")), None)
    if not times or not batch or not (median := float(np.median(times.values))) > 0:
        return None
    return batch / median


def losses(run: Run) -> str:
    """Losses and learning rate."""
    history = run.history
    training = {key: series for key, series in history.items() if is_training_loss(key)}
    validation = {key: series for key, series in history.items() if is_validation_loss(key)}
    if not training:
        raise Missing("metrics.json has no losses" if history else "there is no metrics.json: it did not train here")
    plot = draw_losses(training, validation, history.get("lr"), run.resumed_at)
    rows = [
        (key, number(series.values[0], 4), number(min(series.values), 4), number(series.values[-1], 4))
        for key, series in sorted({**training, **validation}.items())
    ]
    note = "Each point is the median of 20 iterations."
    if run.resumed_at:
        note += f" Resumed at iteration {', '.join(map(str, run.resumed_at))} (dotted)."
    return f'{plot}<p class="dim">{text(note)}</p>' + details(
        "Values", table(("loss", "first", "lowest", "last"), rows, (1, 2, 3))
    )


def progress(run: Run) -> str:
    """Results over the evaluations."""
    found = {
        key: series
        for key, series in run.history.items()
        if (measure := split_measure(key)) and measure[2] in HEADLINES
    }
    if not found:
        raise Missing("metrics.json has no evaluations")
    if all(len(series.iterations) < 2 for series in found.values()):
        raise Missing("there was one evaluation only (TEST.EVAL_PERIOD asks for more)")
    rows = []
    for key, series in found.items():
        best = int(np.nanargmax(series.values)) if np.isfinite(series.values).any() else 0
        rows.append((key, number(series.values[best], 2), series.iterations[best], number(series.values[-1], 2)))
    plot = draw_progress(found, run.resumed_at)
    return plot + table(("measure", "best", "at iteration", "last"), rows, (1, 2, 3))


def all_results(run: Run) -> str:
    """A table of all results of the last evaluation, of whatever kind."""
    rows: list[tuple[str, ...]] = []
    for key, series in run.history.items():
        if measure := split_measure(key):
            rows.append((measure[0], measure[1], measure[2], number(series.values[-1], 2)))
    for entry in run.starts[::-1]:
        if entry.get("status") == "evaluated" and isinstance(entry.get("results"), dict):
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["began"]))
            rows += [(f"evaluated {when}", *row) for row in _flat(entry["results"])]
            break
    if not rows:
        raise Missing("no results of an evaluation are recorded")
    return details(f"{len(rows)} numbers", table(("data set", "task", "measure", "value"), rows, (3,)))


def _flat(results: dict[str, Any], path: str = "") -> list[tuple[str, str, str]]:
    rows = []
    for key, value in results.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{path}/{key}" if path else key)
        elif isinstance(value, (int, float)):
            rows.append((path, key, number(float(value), 2)))
    return rows


def data_sets(run: Run) -> str:
    """The data sets with their sizes."""
    rows = []
    for use, key in (("training", "TRAIN"), ("test", "TEST")):
        for name in run.cfg.DATASETS[key]:
            where = run.data_set(name).get("annotations")
            rows.append((name, use, *count_annotations(where), where or "not in COCO's format"))
    if not rows:
        raise Missing("the config names none")
    return table(("name", "for", "images", "objects", "classes", "annotations"), rows, (2, 3, 4))


def settings(run: Run) -> str:
    """The differences of the config to what it is a change of, and all of it."""
    base, origin = _base(run.cfg)
    absent = object()
    pairs = [(key, value_of(run.cfg, key), value_of(base, key, absent)) for key in sorted(keys_of(run.cfg))]
    rows = [
        (key, value, "–" if other is absent else other)
        for key, value, other in pairs
        if other is absent or str(value) != str(other)
    ]
    whole = f"<pre><code>{text(run.cfg.dump())}</code></pre>"
    return (
        f"<p>{text(f'{len(rows)} keys differ from {origin}.')}</p>"
        + details("Differences", table(("key", "here", "there"), rows))
        + details("The whole config", whole)
    )


def _base(cfg: Any) -> tuple[Any, str]:
    """Gives the row of the zoo that a config is made from, by the weights published for it, or the defaults."""
    from .. import model_zoo

    if address := cfg.PUBLISHED.WEIGHTS:
        for name in model_zoo.list_models():
            row = model_zoo.get_config(name)
            if row.PUBLISHED.WEIGHTS == address:
                return row, f"the row {name} of the zoo"
    from detectron2.config import get_cfg

    from ..config import add_dcn_keys

    cfg = get_cfg()
    add_dcn_keys(cfg)
    return cfg, "the defaults"


def circumstances(run: Run) -> str:
    """When and where it ran, and with which versions."""
    if not run.starts:
        raise Missing("there is no runs.json")
    rows = [
        (
            time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.get("began", 0))),
            "evaluation" if entry.get("status") == "evaluated" else f"iteration {entry.get('start', 0)}",
            entry.get("status", ""),
            duration(entry["seconds"]) if "seconds" in entry else "–",
            f"{entry.get('device', '')}, {entry.get('processes', 1)} process(es), batch {entry.get('batch', '')}",
            ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in (entry.get("memory") or {}).items()),
        )
        for entry in run.starts
    ]
    versions = run.starts[-1].get("versions")
    facts = table(("of the last start", ""), versions.items()) if isinstance(versions, dict) else ""
    return table(("began", "from", "", "time", "on", "peak memory"), rows) + details("Versions", facts)
