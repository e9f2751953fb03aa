# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Makes the report of a run and writes it. A part that cannot be made says why; the others stay."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from .. import __version__
from ..files import is_local, write_atomically
from .page import page, text
from .results import test_set
from .run import Missing, Run
from .sections import all_results, circumstances, data_sets, losses, progress, settings, summary

logger = logging.getLogger(__name__)

FILE = "report.html"
MARK = b'<meta name="generator" content="dcn_d2">'


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Writes report.html into OUTPUT_DIR of a run that is done, interrupted or only evaluated, and gives its path.

    Raises:
        FileNotFoundError: The folder does not exist, or holds nothing of a run.
        FileExistsError: It has a report.html that is not ours.
    """
    where = Path(folder)
    if not where.is_dir():
        raise FileNotFoundError(f"there is no folder {where}")
    path = where / FILE
    if path.exists() and MARK not in path.read_bytes()[:2000]:
        raise FileExistsError(f"{path} was not written by dcn_d2, and is not replaced: give it another name")
    run = Run(where)
    if not (run.starts or run.history or (where / "config.yaml").is_file() or any(run.test_sets())):
        raise FileNotFoundError(
            f"{where} holds nothing of a run: no runs.json, metrics.json, config.yaml or inference/"
        )
    content = build_page(run).encode("utf-8", "replace")
    with write_atomically(path) as file:
        file.write(content)
    return path


def build_page(run: Run) -> str:
    """Gives the HTML of a report."""
    parts: list[tuple[str, Callable[[], str]]] = [
        ("Losses", lambda: losses(run)),
        ("Evaluations", lambda: progress(run)),
        *((f"Results: {found.title}", lambda found=found: test_set(run, found)) for found in run.test_sets()),
        ("All results", lambda: all_results(run)),
        ("Data sets", lambda: data_sets(run)),
        ("Settings", lambda: settings(run)),
        ("Times and versions", lambda: circumstances(run)),
    ]
    name = run.folder.resolve().name or str(run.folder)
    made = f"{run.folder.resolve()}, reported on {time.strftime('%Y-%m-%d %H:%M')} by dcn_d2 {__version__}"
    lead = f'<p class="dim">{text(made)}</p>{_try("summary", lambda: summary(run))}'
    return page(f"Report: {name}", lead, [(title, _try(title, make)) for title, make in parts])


def _try(title: str, make: Callable[[], str]) -> str:
    try:
        return make()
    except Missing as reason:
        return f'<p class="missing">Left out: {text(reason)}.</p>'
    except Exception as error:  # what users leave in a folder fails in ways that nobody foresees
        logger.warning(f"report, {title}: {type(error).__name__}: {error}", exc_info=logger.isEnabledFor(logging.DEBUG))
        return f'<p class="missing">Left out: {text(f"{type(error).__name__}: {error}")}</p>'


def try_report(folder: str | os.PathLike[str]) -> None:
    """Writes a report; if that fails, there is a warning and nothing else."""
    try:
        if not is_local(os.fspath(folder)):
            raise OSError(f"OUTPUT_DIR {os.fspath(folder)} is not on a local disk")
        logger.info(f"report of the run: {write_report(folder)}")
    except Exception as error:  # a report is not worth a training
        logger.warning(f"no {FILE} was written: {type(error).__name__}: {error}")
