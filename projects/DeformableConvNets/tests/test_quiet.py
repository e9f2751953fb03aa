# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What scripts do not show of Detectron2's warnings, and that they show all others."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest

from dcn_d2.quiet import silence_detectron2_warnings


@pytest.fixture(autouse=True)
def tracing_log() -> Iterator[logging.Logger]:
    log = logging.getLogger("torch.fx._symbolic_trace")
    before = log.filters[:]
    yield log
    log.filters[:] = before


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("`torch.jit.script` is deprecated. Please switch to `torch.compile`.", False),
        ("torch.meshgrid: in an upcoming release, it will be required to pass the indexing argument.", False),
        ("pkg_resources is deprecated as an API", False),
        ("`torch.cuda.amp.GradScaler(args...)` is deprecated.", False),
        ("torch.jit.trace is deprecated", True),
        ("something else", True),
    ],
)
def test_warnings_that_users_can_do_nothing_about_are_silent(text: str, shown: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        silence_detectron2_warnings()
        warnings.warn(text, FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ([text] if shown else [])


def test_the_tracing_log_keeps_its_other_lines(tracing_log: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    silence_detectron2_warnings()
    tracing_log.warning("is_fx_tracing will return true for both")
    tracing_log.warning("another line")
    assert caplog.messages == ["another line"]
