# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The report of a run: one HTML file about how it went, for a person to look at.

python -m dcn_d2.report OUTPUT_DIR      writes OUTPUT_DIR/report.html, for any run, as often as wanted

- `runs`: what a training notes while it runs. `history`: what metrics.json holds.
- `evaluation`: AP by class and size, and precision/recall curves, from COCO's own evaluation. `mistakes`: the worst
  images, and classes that are taken for others.
- `plots`, `page`, `sections`, `build`: curves, HTML, the parts of the report, and the file.
"""

from .build import try_report, write_report
from .runs import record_evaluation

__all__ = ["record_evaluation", "try_report", "write_report"]
