# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import logging
import warnings

import pytest

from dcn_d2.quiet import MESSAGES, silence_detectron2_warnings

SAID = [
    "`torch.jit.script` is deprecated. Please switch to `torch.compile`",
    "torch.meshgrid: in an upcoming release, it will be required to pass the indexing argument.",
    "pkg_resources is deprecated as an API.",
    "The `broadcast_buffers` argument is deprecated",
    "`torch.cuda.amp.GradScaler(args...)` is deprecated.",
    "__array__ implementation doesn't accept a copy keyword, so passing copy=False failed.",
]


def test_only_the_warnings_of_detectron2_are_silent() -> None:
    log = logging.getLogger("torch.fx._symbolic_trace")
    before = list(log.filters)
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            silence_detectron2_warnings()
            for message in [*SAID, "something else is deprecated"]:
                warnings.warn(message, FutureWarning, stacklevel=1)
        assert [str(warning.message) for warning in heard] == ["something else is deprecated"]
        for message, passes in (("is_fx_tracing will return true", False), ("another", True)):
            record = logging.LogRecord("torch", logging.WARNING, "", 0, message, (), None)
            assert bool(log.filter(record)) is passes
    finally:
        log.filters = before


def test_each_message_silences_something() -> None:
    assert len(SAID) == len(MESSAGES)


def test_the_tests_ignore_the_same_ones(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("filterwarnings") == [f"ignore:{message}" for message in MESSAGES]
