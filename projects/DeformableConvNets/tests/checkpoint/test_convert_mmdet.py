# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from dev import convert_mmdet

from .layouts import published_layout

WEIGHTS = {  # all but the big ones
    name: torch.rand(shape)
    for name, shape in published_layout("mask_rcnn_R_50_FPN_1x_mdconv_c3-c5").items()
    if name.startswith(("rpn_head", "roi_head.mask_head.conv_logits", "backbone.layer1.0.conv1"))
}


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    theirs, mine, back = (str(tmp_path / name) for name in ("theirs.pth", "mine.pth", "back.pth"))
    torch.save({"meta": {"epoch": 12}, "state_dict": OrderedDict(WEIGHTS), "optimizer": {}}, theirs)
    convert_mmdet.main([theirs, mine])
    assert capsys.readouterr().out == f"wrote {mine} with {len(WEIGHTS)} entries\n"
    assert "roi_heads.mask_head.predictor.weight" in torch.load(mine, weights_only=True)["model"]
    convert_mmdet.main(["--to-mmdet", mine, back])
    found = torch.load(back, weights_only=True)
    assert isinstance(found["meta"], dict) and found["state_dict"].keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        torch.testing.assert_close(found["state_dict"][name], value, rtol=0, atol=0)


def test_what_cannot_be_converted_is_told_in_a_line(tmp_path: Path) -> None:
    path, out = str(tmp_path / "a.pth"), tmp_path / "out.pth"
    torch.save({"model": {"head.weight": torch.zeros(1)}}, path)
    with pytest.raises(SystemExit, match="convert_mmdet.py: .*a.pth is neither a detector of MMDetection"):
        convert_mmdet.main([path, str(out)])
    with pytest.raises(SystemExit, match=r"(?s)convert_mmdet.py: .*a.pth: .*head.weight is unknown"):
        convert_mmdet.main(["--to-mmdet", path, str(out)])
    with pytest.raises(SystemExit, match="No such file"):
        convert_mmdet.main([str(tmp_path / "nothing.pth"), str(out)])
    assert not out.exists()
