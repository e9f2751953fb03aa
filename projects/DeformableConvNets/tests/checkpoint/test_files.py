# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import hashlib
import os
from pathlib import Path

import pytest

from dcn_d2.checkpoint.files import digest_in_name, sha256_of
from dcn_d2.files import write_atomically


def test_digest_is_found_in_the_name() -> None:
    assert digest_in_name("faster_rcnn_r50_fpn_mdconv_c3-c5_group4_1x_coco_20200130-01262257.pth") == "01262257"
    assert digest_in_name("cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco-e75f90c8.pth") == "e75f90c8"
    assert digest_in_name("resnet50-19c8e357.pth") == "19c8e357"
    for name in (
        "epoch_12.pth",
        "model-20200130.pth",
        "model_final_65c703.pkl",
        "a-d68aed1e.log.json",
        "a-D68AED1E.pth",
    ):
        assert digest_in_name(name) is None


def test_digest_is_sha256(tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.pth"
    with write_atomically(path) as file:
        file.write(b"old")
    with pytest.raises(KeyboardInterrupt), write_atomically(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["a.pth"]
    mask = os.umask(0o022)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
