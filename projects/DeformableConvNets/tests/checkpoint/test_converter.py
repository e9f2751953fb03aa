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


@pytest.mark.parametrize("name", ["same", "relative", "symlink", "hardlink", "dot"])
def test_the_original_is_never_overwritten(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "theirs.pth"
    torch.save({"state_dict": WEIGHTS}, path)
    before = path.read_bytes()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "symlink").symlink_to(path)
    (tmp_path / "hardlink").hardlink_to(path)
    out = {"same": str(path), "relative": "theirs.pth", "dot": f"{tmp_path}/./theirs.pth"}.get(name, name)
    for options in ([], ["--overwrite"]):
        with pytest.raises(SystemExit, match="convert_mmdet.py: OUT is IN"):
            convert_mmdet.main([*options, str(path), out])
        with pytest.raises(SystemExit, match="convert_mmdet.py: OUT is IN"):
            convert_mmdet.main([*options, out, str(path)])
    assert path.read_bytes() == before


def test_another_file_is_overwritten_only_on_request(tmp_path: Path) -> None:
    path, out = str(tmp_path / "theirs.pth"), tmp_path / "out.pth"
    torch.save({"state_dict": WEIGHTS}, path)
    out.write_text("mine")
    with pytest.raises(SystemExit, match="out.pth exists; give another name, or --overwrite"):
        convert_mmdet.main([path, str(out)])
    assert out.read_text() == "mine"
    with pytest.raises(SystemExit, match="is no file, and is not replaced"):
        convert_mmdet.main(["--overwrite", path, str(tmp_path)])
    convert_mmdet.main(["--overwrite", path, str(out)])
    assert torch.load(out)["model"]


def test_a_wrong_digest_and_weights_that_are_none_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS}, tmp_path / "a-12345678.pth")
    torch.save({"state_dict": WEIGHTS | {"rpn_head.rpn_cls.bias": torch.full((3,), float("nan"))}}, tmp_path / "b.pth")
    for name, message in (("a-12345678", "but with 12345678 according"), ("b", "rpn_head.rpn_cls.bias holds NaN")):
        with pytest.raises(SystemExit, match=rf"convert_mmdet.py: (?s:.*){message}"):
            convert_mmdet.main([str(tmp_path / f"{name}.pth"), str(tmp_path / "out.pth")])
