# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import logging
import multiprocessing
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn

from dcn_d2 import model_zoo
from dcn_d2.checkpoint import CorruptCheckpointError, path_handlers, register_path_handlers, to_mmdet
from dcn_d2.checkpoint.files import sha256_of

from ..slim import slim_config
from .conftest import Server
from .test_torchvision import config as resnet_config
from .test_torchvision import features_of, their_resnet

SMALL = {"rpn_head.rpn_cls.weight": torch.rand(3, 8, 1, 1), "rpn_head.rpn_cls.bias": torch.rand(3)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    register_path_handlers()
    return tmp_path / "cache"


def publish(weights: dict, folder: Path, name: str = "model") -> Path:
    """Saves weights as MMDetection does, with the digest in the name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "unnamed.pth"
    meta = {"mmdet_version": "2.0.0", "CLASSES": ("a", "b")}
    torch.save({"meta": meta, "state_dict": OrderedDict(weights)}, path, _use_new_zipfile_serialization=False)
    return path.rename(folder / f"{name}-{sha256_of(path)[:8]}.pth")


def row_config(row: str) -> CfgNode:
    cfg = slim_config(model_zoo.get_config(row), WIDTH_PER_GROUP=1 if "X_101" in row else 16)
    cfg.MODEL.DCN.POOLER_FC_DIM = 16
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    return cfg


def randomise(model: nn.Module) -> None:
    """Gives every parameter and statistic a value of its own, the offset branches too."""
    torch.manual_seed(0)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point():
            value += 0.03 * torch.randn(value.shape)  # the same in all memory formats


@pytest.mark.parametrize("row", model_zoo.list_models())
def test_stock_predictor_detects_the_same(row: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = row_config(row)
    source = DefaultPredictor(cfg)
    randomise(source.model)
    path = publish(to_mmdet(source.model.state_dict()), tmp_path)

    cfg.MODEL.WEIGHTS = f"mmdet://{path}"
    loaded = DefaultPredictor(cfg)
    for name, value in source.model.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], value, rtol=0, atol=0, msg=name)
    assert "not found in the checkpoint" not in caplog.text and "not used by the model" not in caplog.text
    image = torch.randint(0, 256, (64, 96, 3), generator=torch.Generator().manual_seed(1)).numpy().astype("uint8")
    expected, found = source(image)["instances"], loaded(image)["instances"]
    assert len(expected) >= 4
    for field, value in expected.get_fields().items():
        other = found.get(field)
        assert torch.equal(*(getattr(v, "tensor", v) for v in (value, other))), field


def test_published_path_is_fetched_once_checked_and_converted_once(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(path_handlers, "ROOT", f"{server.url}/v2.0/")
    name = publish(SMALL, server.folder / "v2.0" / "dcn").name
    caplog.set_level(logging.INFO)
    paths = {PathManager.get_local_path(f"mmdet://dcn/{name}") for _ in range(3)}
    paths.add(PathManager.get_local_path(f"mmdet://{server.url}/v2.0/dcn/{name}"))
    assert len(paths) == 1 and server.requests == 1
    assert sum("converted to" in record.message for record in caplog.records) == 1
    (path,) = paths
    assert path.startswith(str(cache)) and name.removesuffix(".pth") in path
    converted = torch.load(path, weights_only=True)
    assert converted["__author__"].startswith("MMDetection") and "matching_heuristics" not in converted
    assert torch.equal(
        converted["model"]["proposal_generator.rpn_head.objectness_logits.bias"], SMALL["rpn_head.rpn_cls.bias"]
    )
    with PathManager.open(f"mmdet://dcn/{name}", "rb") as file:
        assert file.read(2) == b"PK"


def test_wrong_digest_is_deleted_and_named(server: Server, cache: Path) -> None:
    good = publish(SMALL, server.folder)
    bad = good.rename(good.with_name("model-00000000.pth"))
    digest = sha256_of(bad)[:8]
    with pytest.raises(
        CorruptCheckpointError,
        match=f"{cache}/dcn_d2/downloads/[0-9a-f]+/{bad.name}: .* begins with {digest}, but with 00000000",
    ):
        PathManager.get_local_path(f"mmdet://{server.url}/{bad.name}")
    assert not list(cache.rglob("*.pth"))
    # Once the publisher has mended the file it is fetched again.
    bad.rename(good)
    good.rename(good.with_name(f"model-{digest}.pth"))
    PathManager.get_local_path(f"mmdet://{server.url}/model-{digest}.pth")


def test_connection_that_breaks_leaves_nothing(server: Server, cache: Path) -> None:
    name = publish(SMALL, server.folder / "short").name
    with pytest.raises(OSError, match=f"short/{name} could not be fetched: .*retrieval incomplete"):
        PathManager.get_local_path(f"mmdet://{server.url}/short/{name}")
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_download_without_digest_that_cannot_be_read_is_deleted(server: Server, cache: Path) -> None:
    (server.folder / "model.pth").write_bytes(b"<html>Please log in</html>")
    with pytest.raises(CorruptCheckpointError, match=f"{cache}/dcn_d2/downloads/[0-9a-f]+/model.pth .* It was deleted"):
        PathManager.get_local_path(f"mmdet://{server.url}/model.pth")
    assert not list(cache.rglob("*.pth"))


def test_missing_file_is_told_with_what_to_do(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_handlers, "ROOT", f"{server.url}/")
    with pytest.raises(OSError, match=r"/dcn/a.pth could not be fetched: HTTP Error 404.* mmdet:///path/to/a.pth"):
        PathManager.get_local_path("mmdet://dcn/a.pth")
    with pytest.raises(FileNotFoundError, match=f"no file {tmp_path}/a.pth"):
        PathManager.get_local_path(f"mmdet://{tmp_path}/a.pth")


def test_advice_for_weights_that_need_no_conversion_named_the_converter(server: Server, cache: Path) -> None:
    advice = r"give its path: MODEL.WEIGHTS /path/to/R-50.pkl$"
    with pytest.raises(OSError, match=advice):
        path_handlers.fetch_weights(f"{server.url}/R-50.pkl")


def test_no_network_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_handlers, "ROOT", "http://127.0.0.1:9/")  # the discard port: nobody listens
    with pytest.raises(OSError, match="could not be fetched: .*refused.* Without a network, copy the file here"):
        PathManager.get_local_path("mmdet://dcn/a.pth")


def test_own_file_with_a_wrong_digest_is_kept(tmp_path: Path) -> None:
    path = publish(SMALL, tmp_path).rename(tmp_path / "model-12345678.pth")
    with pytest.raises(CorruptCheckpointError, match="but with 12345678 according to its name.* rename it"):
        PathManager.get_local_path(f"mmdet://{path}")
    assert path.exists()


@pytest.mark.parametrize("form", ["mmdet://{path}", "mmdet:{path}", "mmdet://{name}", "mmdet://~/{name}"])
def test_local_file_in_all_forms(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Detectron2's checkpointer turns mmdet:///file into mmdet:/file before it asks for the file."""
    path = publish(SMALL, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    converted = torch.load(PathManager.get_local_path(form.format(path=path, name=path.name)))
    assert converted["model"].keys() == {
        "proposal_generator.rpn_head.objectness_logits.weight",
        "proposal_generator.rpn_head.objectness_logits.bias",
    }


def test_changed_file_and_changed_rules_are_converted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pth"
    torch.save({"state_dict": SMALL}, path)
    first = PathManager.get_local_path(f"mmdet://{path}")
    torch.save({"state_dict": {name: value + 1 for name, value in SMALL.items()}}, path)
    second = PathManager.get_local_path(f"mmdet://{path}")
    name = "proposal_generator.rpn_head.objectness_logits.bias"
    torch.testing.assert_close(torch.load(second)["model"][name], torch.load(first)["model"][name] + 1)
    monkeypatch.setattr(path_handlers, "_version", lambda: "newer")
    third = PathManager.get_local_path(f"mmdet://{path}")
    assert len({first, second, third}) == 3
    # A converted file of which a part is missing is made again.
    content = Path(third).read_bytes()
    Path(third).write_bytes(content[:-100])
    assert Path(PathManager.get_local_path(f"mmdet://{path}")).read_bytes() == content


def get_local_path(path: str, results: multiprocessing.Queue) -> None:
    results.put(PathManager.get_local_path(path))


@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_processes_share_one_download_and_one_conversion(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, notes = path_handlers.convert_file, tmp_path / "notes"

    def convert_and_note(path: str) -> dict:
        with notes.open("a") as file:
            file.write("converted\n")
        return original(path)

    monkeypatch.setattr(path_handlers, "convert_file", convert_and_note)
    url = f"mmdet://{server.url}/{publish(SMALL, server.folder).name}"
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=get_local_path, args=(url, results)) for _ in range(4)]
    for process in processes:
        process.start()
    paths = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(timeout=60)
    assert len(paths) == 1 and server.requests == 1
    assert notes.read_text() == "converted\n"


def test_what_is_neither_a_detector_nor_a_resnet_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"backbone.bottom_up.stem.conv1.weight": torch.zeros(1)}}, tmp_path / "own.pth")
    with pytest.raises(
        ValueError, match="own.pth is neither .* backbone.bottom_up.stem.conv1.weight.* needs no conversion"
    ):
        PathManager.get_local_path(f"mmdet://{tmp_path}/own.pth")
    torch.save({"state_dict": {"bbox_head.retina_cls.bias": torch.zeros(1)}}, tmp_path / "retinanet.pth")
    with pytest.raises(ValueError, match=r"(?s)retinanet.pth: .*bbox_head.retina_cls.bias is unknown"):
        PathManager.get_local_path(f"mmdet://{tmp_path}/retinanet.pth")


def test_version_1_is_told_to_compute_differently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = SMALL | {"bbox_head.fc_cls.bias": torch.arange(3.0)}
    path = publish(weights, tmp_path)
    for _ in range(2):  # also when it was converted before
        converted = torch.load(PathManager.get_local_path(f"mmdet://{path}"))
        assert converted["model"]["roi_heads.box_predictor.cls_score.bias"].tolist() == [1, 2, 0]
        (warning,) = caplog.messages
        assert "is of MMDetection 1.x, which computed boxes with another width" in warning
        caplog.clear()


@pytest.mark.parametrize("published", [False, True])
def test_stock_checkpointer_starts_from_imagenet_weights(
    published: bool, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, folder = their_resnet(), server.folder / "pretrain"
    folder.mkdir()
    torch.save(theirs.state_dict(), folder / "resnext.pth")
    path = f"mmdet://{folder}/resnext.pth"
    if published:  # a plain address of a publisher, as the rows with ResNeXt have
        monkeypatch.setattr(path_handlers, "PUBLISHERS", (f"{server.url}/pretrain/",))
        register_path_handlers()
        path = f"{server.url}/pretrain/resnext.pth"
    model = build_model(resnet_config()).eval()
    missing = DetectionCheckpointer(model).load(path)
    assert missing["__author__"] == "torchvision, converted by dcn_d2"
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        res5 = model.backbone.bottom_up(images)["res5"]
        torch.testing.assert_close(res5, features_of(theirs, images), rtol=1e-3, atol=1e-3)


def test_addresses_of_imagenet_weights_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def fetch(url: str, cache: Path, force: bool) -> tuple[Path, bool]:
        fetched.append(url)
        raise OSError("no network in tests")

    monkeypatch.setattr(path_handlers.download, "fetch", fetch)
    resnext = "https://download.openmmlab.com/pretrain/third_party/resnext101_32x4d-a5af3160.pth"
    assert model_zoo.get_config("faster_rcnn_X_101_32x4d_FPN_1x_dconv_c3-c5").MODEL.WEIGHTS.endswith(resnext)
    for path in ("open-mmlab://resnext101_32x4d", resnext, f"mmdet://{resnext}", "torchvision://resnet50"):
        with pytest.raises(OSError, match="no network in tests"):
            PathManager.get_local_path(path)
    assert fetched == [resnext] * 3 + ["https://download.pytorch.org/models/resnet50-19c8e357.pth"]


def test_other_files_of_a_publisher_stay_as_they_are(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path_handlers, "PUBLISHERS", (f"{server.url}/mmdetection/",))
    register_path_handlers()
    (server.folder / "mmdetection").mkdir()
    (server.folder / "mmdetection" / "a.log.json").write_text("{}")
    with PathManager.open(f"{server.url}/mmdetection/a.log.json") as file:
        assert file.read() == "{}"
    with pytest.raises(ValueError, match="can only be read, not opened with mode 'w'"):
        PathManager.open("mmdet://a.pth", "w")
