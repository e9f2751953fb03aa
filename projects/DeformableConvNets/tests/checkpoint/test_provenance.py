# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import numpy as np
import pytest

from dcn_d2.checkpoint.provenance import Provenance, convert_checkpoint, read_author, recognise, warn_of_v1

VALUE = np.zeros(3)
RESNET = {"conv1.weight": VALUE, "layer1.0.conv1.weight": VALUE, "bn1.weight": VALUE}
EXAMPLES = {
    Provenance.MMDET_V1: {"rpn_head.rpn_cls.bias": VALUE, "bbox_head.fc_cls.bias": VALUE},
    Provenance.MMDET: {"rpn_head.rpn_cls.bias": VALUE, "roi_head.bbox_head.fc_cls.bias": VALUE},
    Provenance.TORCHVISION: RESNET,
}


@pytest.mark.parametrize("provenance", Provenance)
def test_the_maker_is_recognised_before_and_after_the_conversion(provenance: Provenance) -> None:
    for checkpoint in (EXAMPLES[provenance], {"state_dict": EXAMPLES[provenance]}):
        assert recognise(checkpoint) is provenance
        converted = convert_checkpoint(checkpoint, "a.pth")
        assert recognise(converted) is None  # it has Detectron2's names
        assert read_author(converted["__author__"]) is provenance
        assert converted.get("matching_heuristics", False) == (provenance is Provenance.TORCHVISION)


# What version 0.1.0 wrote: the cache of a user, and files that were converted by hand, say this.
@pytest.mark.parametrize(
    ("author", "provenance"),
    [
        ("MMDetection 1.x, converted by dcn_d2", Provenance.MMDET_V1),
        ("MMDetection, converted by dcn_d2", Provenance.MMDET),
        ("torchvision, converted by dcn_d2", Provenance.TORCHVISION),
        ("torchvision", None),  # Detectron2's own file of these weights
        ("MMDetection", None),
        (None, None),
        (["a list"], None),
    ],
)
def test_authors_of_existing_files(author: object, provenance: Provenance | None) -> None:
    assert read_author(author) is provenance


@pytest.mark.parametrize(
    "checkpoint",
    [
        {},
        {"model": {"backbone.bottom_up.stem.conv1.weight": VALUE}},
        {"state_dict": {"head.weight": VALUE}},
        {name: value for name, value in RESNET.items() if name != "bn1.weight"},
    ],
)
def test_other_files_are_not_taken(checkpoint: dict) -> None:
    assert recognise(checkpoint) is None
    with pytest.raises(ValueError, match=r"^a.pth is neither a detector of MMDetection nor a ResNet of torchvision"):
        convert_checkpoint(checkpoint, "a.pth")


def test_errors_of_the_conversion_name_the_file() -> None:
    with pytest.raises(ValueError, match=r"(?s)^a.pth: .*neck.a is unknown"):
        convert_checkpoint({"neck.a": VALUE}, "a.pth")
    with pytest.raises(ValueError, match=r"(?s)^a.pth: .*layer9.a is unknown"):
        convert_checkpoint(RESNET | {"layer9.a": VALUE}, "a.pth")


@pytest.mark.parametrize("provenance", [*Provenance, None])
def test_only_version_1_is_warned_of(provenance: Provenance | None, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_v1(provenance, "a.pth")
    if provenance is Provenance.MMDET_V1:
        (warning,) = caplog.messages
        assert warning.startswith("a.pth is of MMDetection 1.x, which computed boxes with another width")
    else:
        assert not caplog.messages


def test_needs_neither_torch_nor_detectron2() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['detectron2'] = None; "
        "from dcn_d2.checkpoint import files, names, provenance"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
