# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""`python -m dcn_d2.checkpoint`."""

import errno
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from dcn_d2 import model_zoo
from dcn_d2.checkpoint import path_handlers
from dcn_d2.checkpoint.__main__ import main
from dcn_d2.checkpoint.files import sha256_of

from .conftest import Server
from .layouts import published_layout
from .test_mmdet import as_v1
from .test_torchvision import their_resnet

WEIGHTS = {  # all but the big ones
    name: torch.rand(shape)
    for name, shape in published_layout("mask_rcnn_R_50_FPN_1x_mdconv_c3-c5").items()
    if name.startswith(("rpn_head", "roi_head.mask_head.conv_logits", "backbone.layer1.0.conv1"))
}
SMALL = {"rpn_head.rpn_cls.weight": torch.rand(3, 8, 1, 1), "rpn_head.rpn_cls.bias": torch.rand(3)}
SMALL_CONVERTED = {
    "proposal_generator.rpn_head.objectness_logits.weight": SMALL["rpn_head.rpn_cls.weight"],
    "proposal_generator.rpn_head.objectness_logits.bias": SMALL["rpn_head.rpn_cls.bias"],
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")


def run(*arguments: object, script: tuple[str, ...] = ("-m", "dcn_d2.checkpoint")) -> subprocess.CompletedProcess:
    command = [sys.executable, *script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def read(path: object) -> dict:
    return torch.load(str(path), weights_only=True)


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


def failure(*arguments: object) -> str:
    """What `main` ends with, in a line of its own."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    message = str(ended.value.code)  # Python prints a text, and the exit code is 1
    assert message.startswith("dcn_d2.checkpoint: ") and "\n" not in message
    return message


def assert_one_line(done: subprocess.CompletedProcess, text: str) -> None:
    assert done.returncode == 1 and done.stdout == ""
    assert text in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("dcn_d2.checkpoint: ")


@pytest.mark.parametrize("row", model_zoo.list_models())
def test_every_row_there_and_back_has_the_same_bits(row: str, tmp_path: Path) -> None:
    """With all names and types of the published file; all sizes but the first are cut to 1."""
    torch.manual_seed(0)
    theirs = {}
    for name, shape in published_layout(row).items():
        counter = name.endswith("num_batches_tracked")
        theirs[name] = torch.tensor(12345) if counter else torch.randn(shape[0], *[1] * (len(shape) - 1))
    published, mine, back, again = (str(tmp_path / name) for name in ("published", "mine", "back", "again"))
    torch.save({"meta": {"epoch": 12}, "state_dict": OrderedDict(theirs), "optimizer": {}}, published)
    main([published, mine])
    main(["--to-mmdet", mine, back])
    main([back, again])
    assert_same_bits(read(back)["state_dict"], theirs)
    assert_same_bits(read(again)["model"], read(mine)["model"])
    assert len(read(mine)["model"]) == len(theirs)


def test_there_and_back_as_a_command(tmp_path: Path) -> None:
    theirs, mine, back = (tmp_path / name for name in ("theirs.pth", "mine.pth", "back.pth"))
    torch.save({"meta": {"epoch": 12}, "state_dict": OrderedDict(WEIGHTS), "optimizer": {}}, theirs)
    done = run(theirs, mine)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == (f"wrote {mine} with {len(WEIGHTS)} entries\n", "")
    assert "roi_heads.mask_head.predictor.weight" in read(mine)["model"]
    done = run("--to-mmdet", mine, back)
    assert done.stdout == f"wrote {back} with {len(WEIGHTS)} entries\n", done.stderr
    assert isinstance(read(back)["meta"], dict)
    assert_same_bits(read(back)["state_dict"], WEIGHTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.pth", "mine.pth", "theirs.pth"]


def test_the_former_script_takes_the_same_arguments(project: Path, tmp_path: Path) -> None:
    theirs, mine, back = (tmp_path / name for name in ("theirs.pth", "mine.pth", "back.pth"))
    torch.save({"state_dict": SMALL}, theirs)
    script = (str(project / "dev" / "convert_mmdet.py"),)
    assert run(theirs, mine, script=script).returncode == 0
    assert run("--to-mmdet", mine, back, script=script).returncode == 0
    assert_same_bits(read(back)["state_dict"], SMALL)
    assert_one_line(run(theirs, mine, script=script), "mine.pth exists; give another name, or --overwrite")


def test_help_names_what_in_may_be() -> None:
    done = run("--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m dcn_d2.checkpoint ")
    for text in ("--to-mmdet", "--overwrite", "mmdet://", *path_handlers.IMAGENET, "detectron2://", "https://"):
        assert text in done.stdout, text


def test_a_file_needs_neither_detectron2_nor_mmdetection(tmp_path: Path) -> None:
    torch.save({"state_dict": SMALL}, tmp_path / "theirs.pth")
    code = (
        "import runpy, sys; "
        "sys.modules |= dict.fromkeys(['detectron2', 'fvcore', 'iopath', 'mmdet', 'mmcv', 'mmengine']); "
        "runpy.run_module('dcn_d2.checkpoint', run_name='__main__', alter_sys=True)"
    )
    done = run(tmp_path / "theirs.pth", tmp_path / "mine.pth", script=("-c", code))
    assert done.returncode == 0, done.stderr
    assert_same_bits(read(tmp_path / "mine.pth")["model"], SMALL_CONVERTED)
    assert_one_line(run(tmp_path / "none.pth", tmp_path / "out.pth", script=("-c", code)), "No such file")
    assert_one_line(run("mmdet://none.pth", tmp_path / "out.pth", script=("-c", code)), "detectron2")


@pytest.mark.parametrize("form", ["mmdet://{path}", "mmdet://{url}", "{url}"])
def test_addresses_are_fetched(form: str, server: Server, tmp_path: Path) -> None:
    path = server.folder / "unnamed.pth"
    torch.save({"state_dict": SMALL}, path)
    path = path.rename(server.folder / f"model-{sha256_of(path)[:8]}.pth")
    main([form.format(path=path, url=f"{server.url}/{path.name}"), str(tmp_path / "out.pth")])
    assert_same_bits(read(tmp_path / "out.pth")["model"], SMALL_CONVERTED)
    assert server.requests == ("url" in form)


@pytest.mark.parametrize("name", path_handlers.IMAGENET)
def test_names_of_imagenet_weights(
    name: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    theirs = their_resnet().state_dict()
    torch.save(theirs, server.folder / "resnet.pth")
    monkeypatch.setitem(path_handlers.IMAGENET, name, f"{server.url}/resnet.pth")
    main([name, str(tmp_path / "out.pth")])
    converted = read(tmp_path / "out.pth")
    assert capsys.readouterr().out.endswith(f"with {len(converted['model'])} entries\n")
    assert converted["matching_heuristics"]
    assert_same_bits(
        {"": converted["model"]["res5.2.conv3.norm.running_var"]}, {"": theirs["layer4.2.bn3.running_var"]}
    )


def test_an_address_that_fails_is_told_in_a_line(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    assert "has a user name" in failure("ftp://user@host/a.pth", out)
    assert f"there is no file {tmp_path}/none.pth" in failure(f"mmdet://{tmp_path}/none.pth", out)
    assert "404" in failure(f"{server.url}/none.pth", out)
    assert "there is no file nothing://a.pth" in failure("nothing://a.pth", out)
    assert not out.exists()


def test_version_1_is_converted_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = {"rpn_head.rpn_cls.bias": torch.rand(3), "roi_head.bbox_head.fc_cls.bias": torch.arange(3.0)}
    old = {name: torch.from_numpy(v) for name, v in as_v1({n: v.numpy() for n, v in weights.items()}).items()}
    torch.save({"state_dict": old}, tmp_path / "old.pth")
    main([str(tmp_path / "old.pth"), str(tmp_path / "mine.pth")])
    (warning,) = caplog.messages
    assert "old.pth is of MMDetection 1.x, which computed boxes" in warning
    # The way back gives the layout of 2.x.
    main(["--to-mmdet", str(tmp_path / "mine.pth"), str(tmp_path / "new.pth")])
    assert len(caplog.messages) == 1
    assert_same_bits(read(tmp_path / "new.pth")["state_dict"], weights)


def test_arrays_of_a_pickle_become_tensors(tmp_path: Path) -> None:
    arrays = {name: value.numpy() for name, value in SMALL_CONVERTED.items()}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    main(["--to-mmdet", str(tmp_path / "model.pkl"), str(tmp_path / "out.pth")])
    assert_same_bits(read(tmp_path / "out.pth")["state_dict"], SMALL)


def test_all_entries_without_a_place_are_listed(tmp_path: Path) -> None:
    path, out = tmp_path / "mine.pth", tmp_path / "out.pth"
    extra = {
        "roi_heads.keypoint_head.score_lowres.bias": torch.zeros(1),
        "roi_heads.box_head.conv1.weight": torch.zeros(1),
        "backbone.top_block.p6.weight": torch.zeros(1),
        "backbone.fpn_output2.norm.weight": torch.zeros(1),  # a GroupNorm, which has no statistics
        "backbone.fpn_output2.norm.bias": torch.zeros(1),
    }
    torch.save({"model": SMALL_CONVERTED | extra, "iteration": 3}, path)
    done = run("--to-mmdet", path, out)
    first, *listed = done.stderr.splitlines()
    assert done.returncode == 1 and first.startswith(f"dcn_d2.checkpoint: {path}: these are not the weights of")
    assert listed == [
        "  roi_heads.keypoint_head.score_lowres.bias is unknown",
        "  roi_heads.box_head.conv1.weight is unknown",
        "  backbone.top_block.p6.weight is unknown",
        "  backbone.fpn_output2.norm.running_mean is missing",
        "  backbone.fpn_output2.norm.running_var is missing",
    ]
    assert not out.exists()


def test_what_cannot_be_converted_is_told_in_a_line(tmp_path: Path) -> None:
    path, out = tmp_path / "a.pth", tmp_path / "out.pth"
    torch.save({"model": {"head.weight": torch.zeros(1)}}, path)
    assert_one_line(run(path, out), "a.pth is neither a detector of MMDetection nor a ResNet of torchvision")
    assert "No such file" in failure(tmp_path / "nothing.pth", out)
    path.write_text("text")
    assert "a.pth (4 bytes) is truncated, corrupted, or not a checkpoint" in failure(path, out)
    torch.save({"state_dict": {3: torch.zeros(1)}}, path)
    for options in ([], ["--to-mmdet"]):
        assert "a.pth: an entry is called '3', which is of type int, not text" in failure(*options, path, out)
    torch.save({"state_dict": SMALL}, path)
    assert "has the names of MMDetection, not those of Detectron2" in failure("--to-mmdet", path, out)
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
        for source, target in ((str(path), out), (out, str(path)), (f"mmdet://{path}", out)):
            with pytest.raises(SystemExit, match="dcn_d2.checkpoint: .*(OUT is IN|exists; give another name)") as ended:
                main([*options, source, target])
            assert "OUT is IN" in str(ended.value) or (not options and source.startswith("mmdet:"))
    assert path.read_bytes() == before


def test_another_file_is_overwritten_only_on_request(tmp_path: Path) -> None:
    path, out = str(tmp_path / "theirs.pth"), tmp_path / "out.pth"
    torch.save({"state_dict": WEIGHTS}, path)
    out.write_text("mine")
    with pytest.raises(SystemExit, match="out.pth exists; give another name, or --overwrite"):
        main([path, str(out)])
    assert out.read_text() == "mine"
    with pytest.raises(SystemExit, match="is not a file, and is not replaced"):
        main(["--overwrite", path, str(tmp_path)])
    main(["--overwrite", path, str(out)])
    assert torch.load(out)["model"]


def test_a_full_disk_leaves_out_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = str(tmp_path / "theirs.pth"), tmp_path / "out.pth"
    torch.save({"state_dict": WEIGHTS}, path)
    out.write_text("mine")

    def no_space(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(SystemExit, match="out.pth could not be written: No space left on device; .* is untouched"):
        main(["--overwrite", path, str(out)])
    assert out.read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.pth", "theirs.pth"]


def test_a_wrong_digest_and_weights_that_are_none_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS}, tmp_path / "a-12345678.pth")
    torch.save({"state_dict": WEIGHTS | {"rpn_head.rpn_cls.bias": torch.full((3,), float("nan"))}}, tmp_path / "b.pth")
    torch.save({"model": {"backbone.fpn_lateral2.bias": torch.full((3,), float("inf"))}}, tmp_path / "c.pth")
    for name, options, message in (
        ("a-12345678", [], "but with 12345678 according"),
        ("b", [], "rpn_head.rpn_cls.bias holds NaN"),
        ("c", ["--to-mmdet"], "backbone.fpn_lateral2.bias holds NaN or infinite"),
    ):
        with pytest.raises(SystemExit, match=rf"dcn_d2.checkpoint: (?s:.*){message}"):
            main([*options, str(tmp_path / f"{name}.pth"), str(tmp_path / "out.pth")])
