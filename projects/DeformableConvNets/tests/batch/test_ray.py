# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""examples/ray_predict.py on a Ray of this machine, with two workers, finds what one process finds."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcn_d2.batch import DetectorActor

from ..engine.test_predictor import config, images, trained


@pytest.fixture(scope="module")
def example(project: Path) -> ModuleType:
    path = project / "examples" / "ray_predict.py"
    spec = importlib.util.spec_from_file_location("ray_predict", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ray(project: Path) -> Any:
    module = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[data]'")
    pytest.importorskip("pyarrow")
    path = os.pathsep.join([str(project), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    module.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    module.data.DataContext.get_current().enable_progress_bars = False
    yield module
    module.shutdown()


@pytest.mark.slow
@pytest.mark.unsanitized
def test_two_workers_find_what_one_process_finds(ray: Any, example: ModuleType, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    cfg = trained(config("mask"), tmp_path)
    (tmp_path / "model.yaml").write_text(cfg.dump())
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, image in enumerate(images()):
        Image.fromarray(image[:, :, ::-1]).save(photos / f"{number}.png")
    (photos / "broken.png").write_bytes(b"no image")
    arguments = ["--model", str(tmp_path / "model.yaml"), "--input", str(photos), "--workers", "2", "--batch-size", "2"]
    example.main([*arguments, "--output", str(tmp_path / "parquet")])
    example.main([*arguments, "--output", str(tmp_path / "json"), "--format", "json"])
    rows = {Path(row["path"]).name: row for row in parquet.read_table(tmp_path / "parquet").to_pylist()}
    lines = [line for file in (tmp_path / "json").glob("*.json") for line in file.read_text().splitlines()]
    again = {Path(row["path"]).name: row for row in map(json.loads, lines)}

    paths = sorted(str(path) for path in photos.iterdir())
    alone = DetectorActor(tmp_path / "model.yaml", score_threshold=0.05)({"path": np.array(paths)})
    assert sorted(rows) == sorted(again) == [Path(path).name for path in paths]
    assert sum(map(len, alone["scores"])) > 10
    for number, path in enumerate(paths):
        for found in (rows[Path(path).name], again[Path(path).name]):
            assert set(found) == {"path", *alone} and found["classes"] == alone["classes"][number]
            np.testing.assert_allclose(found["scores"], alone["scores"][number], rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(np.ravel(found["boxes"]), np.ravel(alone["boxes"][number]), rtol=1e-3, atol=0.1)
            assert [mask["size"] for mask in found["masks"]] == [mask["size"] for mask in alone["masks"][number]]
    assert "broken.png" in [Path(path).name for path, error in zip(paths, alone["error"]) if error]
    assert "is not an image" in rows["broken.png"]["error"] and rows["broken.png"]["boxes"] == []


def test_the_example_names_what_is_missing(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=r"ray_predict.py: Ray Data is not installed: pip install 'ray\[data\]'"):
        example.main(["--model", "faster_rcnn_R_50_FPN_1x_dconv_c3-c5", "--input", "photos", "--output", "found"])
