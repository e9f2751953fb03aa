# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""python -m dcn_d2.info."""

import pytest
import torch

from dcn_d2 import __version__, info, ops


def test_it_says_what_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    info.main([])
    printed = capsys.readouterr().out
    for fact in (__version__, torch.__version__, "detectron2", "kernels for   cpu", "cache"):
        assert fact in printed


def test_all_operators_agree_with_their_references_in_all_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        info.main(["--check"])
    assert stopped.value.code == 0, capsys.readouterr().out


def test_a_wrong_operator_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = ops.deform_roi_pool
    monkeypatch.setattr(ops, "deform_roi_pool", lambda x, *others: right(x, *others) * 1.2)
    with pytest.raises(SystemExit) as stopped:
        info.main(["--check"])
    assert stopped.value.code == 1
    faults = [line for line in capsys.readouterr().out.splitlines() if "differs" in line]
    assert faults and all("deform_roi_pool" in line for line in faults)


def test_other_strides_than_promised_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "strides_of_fake", lambda operator, operands: (1, 2, 3, 4))
    assert any("promised are (1, 2, 3, 4)" in fault for fault in info.check("cpu"))
