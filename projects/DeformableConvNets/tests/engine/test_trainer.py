# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import json
import logging
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_train_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import HookBase
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn

from dcn_d2.engine import DCNPredictor, DCNTrainer, load_config, one_line
from dcn_d2.engine.optimizer import fit_saved_state

from .tiny import tiny_config

PROJECT = Path(__file__).resolve().parents[2]


def train(folder: Path, *others: Any, resume: bool = False, overwrite: bool = False) -> DCNTrainer:
    trainer = DCNTrainer(tiny_config(folder, *others))
    trainer.resume_or_load(resume=resume, overwrite=overwrite)
    trainer.train()
    return trainer


def iterations(folder: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in (folder / "metrics.json").read_text().splitlines()]


def rates(trainer: DCNTrainer) -> dict[str, float]:
    names = {parameter: name for name, parameter in trainer.checkpointer.model.named_parameters()}
    return {names[p]: group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("frozen", [False, True])
def test_learning_rate_is_scaled_by_the_trainer_and_never_twice(tmp_path: Path, frozen: bool) -> None:
    cfg = tiny_config(tmp_path, "SOLVER.BASE_LR", 0.02, "SOLVER.REFERENCE_IMS_PER_BATCH", 16, "SOLVER.IMS_PER_BATCH", 2)
    if frozen:
        cfg.freeze()
    for _ in range(3):  # the config that runs gives the same again
        trainer = DCNTrainer(cfg)
        assert trainer.cfg.SOLVER.BASE_LR == pytest.approx(0.0025)
        assert all(rate == pytest.approx(0.0025) for rate in rates(trainer).values())
        assert trainer.cfg.is_frozen() == frozen
        cfg = trainer.cfg


def test_callers_config_is_left_alone(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "SOLVER.REFERENCE_IMS_PER_BATCH", 16)
    before = cfg.dump()
    DCNTrainer(cfg)
    assert cfg.dump() == before


def test_scaling_by_processes_and_by_batch_size_are_not_added_up(tmp_path: Path) -> None:
    keys = ["SOLVER.BASE_LR", 0.02, "SOLVER.REFERENCE_IMS_PER_BATCH", 16, "SOLVER.IMS_PER_BATCH", 16]
    cfg = DCNTrainer(tiny_config(tmp_path, *keys, "SOLVER.REFERENCE_WORLD_SIZE", 8, "SOLVER.MAX_ITER", 10)).cfg
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (2, pytest.approx(0.0025))
    assert DCNTrainer(cfg).cfg.SOLVER.BASE_LR == pytest.approx(0.0025)


def test_plain_script_logs_saves_its_config_and_gets_results_once_each(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from dcn_d2.engine import DCNTrainer
from tests.engine.tiny import tiny_config
for name in "a", "b":  # twice in one process
    cfg = tiny_config(Path(sys.argv[1]) / name, "DATASETS.TEST", ("nuclei_val",), "SOLVER.MAX_ITER", 5)
    trainer = DCNTrainer(cfg)
    trainer.resume_or_load(resume=False)
    print("AP50 of", name, trainer.train()["bbox"]["AP50"])
"""
    env = os.environ | {"PYTHONPATH": str(PROJECT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    out = subprocess.run(command, env=env, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert out.count("training on cpu, in 1 process(es)") == out.count("Starting training from iteration 0") == 2
    assert out.count("eta: ") == out.count("total_loss: ") == out.count("AP50 of") == 2
    for name in "ab":
        log = (tmp_path / name / "log.txt").read_text()
        assert log.count("total_loss: ") == log.count("training on cpu") == 1, "each log holds its own run, once"
        cfg = load_config(str(tmp_path / name / "config.yaml"))
        assert cfg.OUTPUT_DIR == str(tmp_path / name) and cfg.MODEL.DEVICE == "cpu"


def test_trained_model_outlives_its_trainer(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    model, batch = trainer.model, next(iter(trainer.data_loader))
    del trainer
    with EventStorage():
        assert "loss_cls" in pickle.loads(pickle.dumps(model))(batch)


def test_second_run_in_a_used_folder_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")}
    with pytest.raises(FileExistsError, match="holds an earlier run .*model_final.pth.*--resume.*--overwrite"):
        train(tmp_path)
    trainer = DCNTrainer(tiny_config(tmp_path))
    with pytest.raises(FileExistsError, match="holds an earlier run"):
        trainer.train()  # without resume_or_load
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")} == before


def test_trainer_that_trains_again_does_not_overwrite_its_run(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    before = (tmp_path / "model_final.pth").read_bytes()
    with pytest.raises(FileExistsError, match="holds an earlier run .*resume_or_load"):
        trainer.train()
    assert (tmp_path / "model_final.pth").read_bytes() == before


def test_used_folder_may_be_overwritten_on_purpose(tmp_path: Path) -> None:
    train(tmp_path, "SOLVER.CHECKPOINT_PERIOD", 1)
    (tmp_path / "mine.pth").write_bytes(b"1")
    curves = set(tmp_path.glob("events.out.tfevents.*"))
    train(tmp_path, "SOLVER.MAX_ITER", 2, overwrite=True)
    assert {path.name for path in tmp_path.glob("*.pth")} == {"mine.pth", "model_final.pth"}
    assert iterations(tmp_path) == [1]
    assert curves and not curves & set(tmp_path.glob("events.out.tfevents.*"))


def test_resumed_run_records_each_iteration_once(tmp_path: Path) -> None:
    keys = ["SOLVER.CHECKPOINT_PERIOD", 2]
    train(tmp_path, *keys, "DATASETS.TEST", ("nuclei_val",))
    assert iterations(tmp_path) == [3, 4]  # Detectron2 records the last evaluation as one iteration later
    average = json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])["bbox/AP50"]
    trainer = train(tmp_path, *keys, "SOLVER.MAX_ITER", 5, resume=True)
    assert trainer.start_iter == 4 and iterations(tmp_path) == [3, 4]
    last, new = (json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines())
    assert last["bbox/AP50"] == average and "total_loss" in last and "total_loss" in new
    # Killed after iteration 4 was recorded, but not saved.
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "model_0000003.pth").unlink()
    trainer = train(tmp_path, *keys, "SOLVER.MAX_ITER", 5, resume=True)
    assert trainer.start_iter == 2 and iterations(tmp_path) == [4]


@pytest.mark.parametrize(
    "before, after", [((0.02, 0.1), (0.01, 0.5)), ((0.02, 0.1), (0.02, 1.0)), ((0.02, 1.0), (0.01, 0.1))]
)
def test_resumed_run_learns_at_the_rates_of_its_config(
    before: tuple[float, float], after: tuple[float, float], tmp_path: Path
) -> None:
    def keys(rate: float, factor: float) -> list:
        return ["SOLVER.BASE_LR", rate, "SOLVER.OFFSET_LR_FACTOR", factor, "SOLVER.MOMENTUM", 0.9]

    first = train(tmp_path, *keys(*before))
    trainer = DCNTrainer(tiny_config(tmp_path, *keys(*after), "SOLVER.MAX_ITER", 6))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 4
    for name, rate in rates(trainer).items():
        assert rate == pytest.approx(after[0] * (after[1] if "_offset." in name else 1)), name
    for group in trainer.optimizer.param_groups:
        assert group["lr"] == pytest.approx(group["initial_lr"]), "no warm-up and no step: at once"
    momentum, saved = momenta(trainer), momenta(first)
    assert momentum.keys() == saved.keys()
    assert all(torch.equal(momentum[name], saved[name]) for name in saved)
    trainer.train()
    last = json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])
    assert last["lr"] == pytest.approx(after[0])


def momenta(trainer: DCNTrainer) -> dict[str, torch.Tensor]:
    named = trainer.checkpointer.model.named_parameters()
    state = trainer.optimizer.state
    return {name: state[p]["momentum_buffer"] for name, p in named if p in state}


def test_log_names_the_rate_that_changes(tmp_path: Path) -> None:
    train(tmp_path, "SOLVER.BASE_LR", 0.02)
    DCNTrainer(tiny_config(tmp_path, "SOLVER.BASE_LR", 0.01)).resume_or_load(resume=True)
    assert (
        "base learning rates change from the checkpoint to this config at iteration 4: 0.02 to 0.01"
        in (tmp_path / "log.txt").read_text()
    )


def test_checkpoint_without_groups_for_offsets_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # as before the groups were the same for all factors
        patch.setattr("dcn_d2.engine.trainer.split_offset_branches", lambda *args: None)
        first = train(tmp_path)
    trainer = DCNTrainer(tiny_config(tmp_path, "SOLVER.OFFSET_LR_FACTOR", 0.1, "SOLVER.MAX_ITER", 5))
    assert len(trainer.optimizer.param_groups) == len(first.optimizer.param_groups) + 1
    trainer.resume_or_load(resume=True)
    assert all(torch.equal(value, momenta(trainer)[name]) for name, value in momenta(first).items())
    trainer.train()


def test_optimizer_of_another_model_is_refused() -> None:
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD([model.weight], lr=0.1)
    with pytest.raises(ValueError, match=r"groups of \[1\] parameters, this run's has \[2\].*MODEL.WEIGHTS"):
        fit_saved_state(other.state_dict(), optimizer, lambda: [[model.weight, model.bias]])


def test_checkpoints_that_cannot_be_resumed_are_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path)
    trainer = DCNTrainer(tiny_config(tmp_path))
    monkeypatch.setattr(trainer.checkpointer, "resume_or_load", lambda *args, **kwargs: {})
    with pytest.raises(FileExistsError, match="model_final.pth, but none that training could go on from"):
        trainer.resume_or_load(resume=True)


@pytest.mark.parametrize(
    "keys, message",
    [
        (["SOLVER.CHECKPOINT_PERIOD", 0], "SOLVER.CHECKPOINT_PERIOD must be a whole number of at least 1, got 0"),
        (["SOLVER.MAX_ITER", 0], "SOLVER.MAX_ITER must be a whole number of at least 1, got 0"),
        (["SOLVER.STEPS", (3, 2)], r"SOLVER.STEPS must be in increasing order, got \(3, 2\)"),
        (["TEST.EVAL_PERIOD", -1], "TEST.EVAL_PERIOD must be a whole number of at least 0"),
        (["DATASETS.TRAIN", ()], "DATASETS.TRAIN is empty"),
        (["DATASETS.TEST", ("nothing",)], "there is no data set 'nothing'"),
        (["TEST.EXPECTED_RESULTS", [["bbox", "AP", 1.0, 1.0]]], "DATASETS.TEST is empty: there will be nothing"),
        (
            ["DATASETS.TEST", ("nuclei_val",), "TEST.EXPECTED_RESULTS", [["bbox", "AP", 1.0]]],
            r"entries like \['bbox', 'AP', 41.3, 0.5\].*got \['bbox', 'AP', 1.0\]",
        ),
        (
            ["TEST.AUG.ENABLED", True, "MODEL.KEYPOINT_ON", True],
            "TEST.AUG.ENABLED is True, but test-time augmentation does not work with MODEL.KEYPOINT_ON True",
        ),
    ],
)
def test_what_would_fail_late_is_refused_before_anything_is_built(
    keys: list, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DCNTrainer, "build_model", lambda cfg: pytest.fail("built"))
    with pytest.raises(ValueError, match=message):
        DCNTrainer(tiny_config(tmp_path, *keys))


def test_folder_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(OSError, match="OUTPUT_DIR /proc/nothing cannot be written"):
        DCNTrainer(tiny_config(Path("/proc/nothing")))


def test_data_sets_that_nothing_measures_are_refused(tmp_path: Path) -> None:
    DatasetCatalog.register("odd", lambda: DatasetCatalog.get("nuclei_val"))
    MetadataCatalog.get("odd").set(evaluator_type="mine", thing_classes=["nucleus"])
    try:
        cfg = tiny_config(tmp_path, "DATASETS.TEST", ("odd",))
        message = "data set odd has the evaluator type 'mine', which is none of coco, coco_panoptic_seg, sem_seg, lvis"
        message += ".*: name one of them where the data set is registered"  # Detectron2 lets no one set it again
        for refused in (
            lambda: DCNTrainer(cfg),
            lambda: DCNTrainer.test(cfg, nn.Identity()),
            lambda: DCNTrainer.build_evaluator(cfg, "odd"),
        ):
            with pytest.raises(ValueError, match=message):
                refused()

        class Own(DCNTrainer):
            @classmethod
            def build_evaluator(cls, cfg: Any, dataset_name: str) -> Any:
                return None

        Own.check(cfg)  # an evaluator of one's own may measure it
        Own.check_data(cfg)
    finally:
        DatasetCatalog.remove("odd")
        MetadataCatalog.remove("odd")


class OwnLoader(DCNTrainer):
    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        return build_detection_train_loader(cfg, mapper=DatasetMapper(cfg, is_train=True))


class OwnEvaluator(DCNTrainer):
    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str) -> Any:
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)


@pytest.mark.parametrize("kind", [OwnLoader, OwnEvaluator])
def test_own_loader_or_evaluator_was_no_reason_to_check_nothing(
    kind: type[DCNTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 2, "bbox": [8, 8, 20, 20], "area": 400}],
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
    }
    (tmp_path / "odd.json").write_text(json.dumps(coco))
    register_coco_instances("odd", {}, str(tmp_path / "odd.json"), str(tmp_path))
    keys = {OwnLoader: "DATASETS.TRAIN", OwnEvaluator: "DATASETS.TEST"}
    faults = {
        OwnLoader: r"NUM_CLASSES is 1, but the data set has 2 categories .* the last ones train as background",
        OwnEvaluator: "1 of 1 annotations have no 'iscrowd', which COCO's evaluation reads",
    }
    cfg = tiny_config(tmp_path / "out", "MODEL.ROI_HEADS.NUM_CLASSES", 1 if kind is OwnLoader else 2)
    cfg.merge_from_list(["DATASETS.TRAIN", (), keys[kind], ("odd",)])
    try:
        with pytest.raises(ValueError, match=faults[kind]):
            DCNTrainer.check_data(cfg, train=kind is OwnLoader)
        caplog.clear()
        kind.check_data(cfg, train=kind is OwnLoader)
        (message,) = [
            record.getMessage()
            for record in caplog.records
            if record.name.startswith("dcn_d2") and record.levelno >= logging.WARNING
        ]
        assert re.search(faults[kind], message)
        assert "only a warning because the trainer has its own build_" in message
        if kind is OwnLoader:  # which may take its data from anywhere
            cfg.merge_from_list([keys[kind], ("not registered",)])
            kind.check_data(cfg)
    finally:
        DatasetCatalog.remove("odd")
        MetadataCatalog.remove("odd")


def test_keypoints_without_tolerances_failed_after_the_training(tmp_path: Path) -> None:
    keypoints = ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3)
    cfg = tiny_config(tmp_path, "DATASETS.TEST", ("nuclei_val",), *keypoints)
    message = "TEST.KEYPOINT_OKS_SIGMAS has 0 values, but MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is 3"
    with pytest.raises(ValueError, match=message):
        DCNTrainer.check(cfg)


def test_tolerances_of_keypoints_were_ignored(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "MODEL.KEYPOINT_ON", True, "TEST.KEYPOINT_OKS_SIGMAS", [0.1] * 17)
    assert DCNTrainer.build_evaluator(cfg, "nuclei_val")._kpt_oks_sigmas == [0.1] * 17


def test_config_made_without_dcn_d2_trains_and_predicts(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", ("nuclei_val",))
    for node, key in (
        (cfg.MODEL, "DCN"),
        (cfg, "PUBLISHED"),
        (cfg.INPUT, "RESIZE_WITH"),
        (cfg.SOLVER, "REFERENCE_IMS_PER_BATCH"),
        (cfg.SOLVER, "OFFSET_LR_FACTOR"),
        (cfg.TEST, "COCO_EVAL"),
        (cfg.TEST, "PANOPTIC_QUALITY"),
    ):
        del node[key]
    trainer = DCNTrainer(cfg)
    assert set(trainer.train()) == {"bbox"}
    assert "PUBLISHED" not in cfg and trainer.cfg.SOLVER.OFFSET_LR_FACTOR == 1
    DCNTrainer.test(cfg, trainer.model)
    DCNTrainer.build_optimizer(cfg, trainer.model)
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    assert "instances" in DCNPredictor(cfg)(np.zeros((50, 60, 3), np.uint8))


def test_predictor_takes_the_config_that_the_trainer_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = tiny_config(tmp_path, "SOLVER.MAX_ITER", 1, "MODEL.DEVICE", "cuda")
    cfg.freeze()
    DCNTrainer(cfg).train()
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    cfg.freeze()
    predictor = DCNPredictor(cfg)
    assert next(predictor.model.parameters()).device.type == "cpu" and cfg.MODEL.DEVICE == "cuda"
    assert "instances" in predictor(np.zeros((50, 60, 3), np.uint8))


def test_full_disk_ends_training_with_its_own_error_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = DCNTrainer(tiny_config(tmp_path))

    def fill(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "no room for model_final.pth")

    monkeypatch.setattr(trainer.checkpointer, "save", fill)
    with pytest.raises(OSError, match="no room for model_final.pth"):
        trainer.train()
    assert "Traceback" not in (tmp_path / "log.txt").read_text()


def test_little_space_is_told_before_the_first_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    train(tmp_path, "SOLVER.CHECKPOINT_PERIOD", 2)
    log = (tmp_path / "log.txt").read_text()
    assert "is going to write 3 checkpoint(s) of about" in log
    assert log.index("is going to write") < log.index("Starting training")


class FailInData(HookBase):
    """Makes the next batch fail as an image does that vanished."""

    def before_step(self) -> None:
        def batches() -> Any:
            raise FileNotFoundError(2, "No such file or directory", "gone.png")
            yield

        self.trainer._trainer._data_loader_iter_obj = batches()


def test_file_that_vanished_during_training_is_named_without_a_traceback(tmp_path: Path) -> None:
    trainer = DCNTrainer(tiny_config(tmp_path))
    trainer.register_hooks([FailInData()])
    with pytest.raises(FileNotFoundError, match="gone.png"):
        trainer.train()
    assert "Traceback" not in (tmp_path / "log.txt").read_text()


def test_importing_the_engine_registers_everything() -> None:
    code = """
import dcn_d2.engine
from detectron2.data import DatasetCatalog
from detectron2.layers import DeformConv
from detectron2.modeling import BACKBONE_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.backbone import resnet
from detectron2.utils.file_io import PathManager
BACKBONE_REGISTRY.get("build_dcn_resnet_fpn_backbone"), ROI_HEADS_REGISTRY.get("DCNROIHeads")
assert "nuclei_train" in DatasetCatalog
assert resnet.DeformConv.__module__.startswith("dcn_d2"), resnet.DeformConv
assert any(prefix.startswith("mmdet:") for prefix in PathManager._path_handlers)
"""
    env = os.environ | {"PYTHONPATH": str(PROJECT)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=env)


@pytest.mark.parametrize(
    "error, line",
    [
        (KeyError("no key"), "no key"),
        (KeyError("p7"), "KeyError: p7"),
        (AssertionError(), "AssertionError:"),
        (RuntimeError("no\n  room"), "RuntimeError: no room"),
        (OSError(28, "no room for a.pth"), "no room for a.pth"),
        (FileNotFoundError(2, "No such file or directory", "a"), "a: No such file or directory"),
        (ValueError("one\n  two\n"), "one two"),
        (
            ValueError("Caught ValueError in process 0.\nTraceback (most recent call last):\n x\nValueError: y"),
            "ValueError: y",
        ),
    ],
)
def test_errors_become_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line


@pytest.fixture(autouse=True)
def loggers_as_before() -> Any:
    """What a trainer does to the loggers ends with the test: others read them through pytest."""
    from dcn_d2.engine import logs

    found = {name: logging.getLogger(name) for name in logs.NAMES}
    state = {name: (x.level, x.propagate, list(x.handlers)) for name, x in found.items()}
    logs.setup_logger.cache_clear()
    yield
    for name, (level, propagate, handlers) in state.items():
        found[name].setLevel(level)
        found[name].propagate, found[name].handlers = propagate, handlers
    for file in logs._files.values():
        file.close()
    logs._files.clear()
    logs.setup_logger.cache_clear()


def test_overwriting_keeps_the_weights_that_training_starts_from(tmp_path: Path) -> None:
    train(tmp_path, "SOLVER.MAX_ITER", 1)
    weights = tmp_path / "model_final.pth"
    before = weights.read_bytes()
    with pytest.raises(FileExistsError, match="would remove .*model_final.pth"):
        train(tmp_path, "SOLVER.MAX_ITER", 1, "MODEL.WEIGHTS", str(weights), overwrite=True)
    assert weights.read_bytes() == before


def test_checkpoint_beyond_the_last_iteration_is_named(tmp_path: Path) -> None:
    train(tmp_path, "SOLVER.MAX_ITER", 3)
    with pytest.raises(ValueError, match="checkpoint is of iteration 2, but SOLVER.MAX_ITER is 2"):
        train(tmp_path, "SOLVER.MAX_ITER", 2, resume=True)
    train(tmp_path, "SOLVER.MAX_ITER", 3, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_config_of_the_user_in_the_folder_is_kept(resume: bool, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("# mine\n_BASE_: a.yaml\n")
    with pytest.raises(FileExistsError, match="was not written by a run"):
        train(tmp_path, resume=resume)
    assert (tmp_path / "config.yaml").read_text() == "# mine\n_BASE_: a.yaml\n"


def test_resuming_without_the_checkpoints_of_a_run_started_at_0(tmp_path: Path) -> None:
    train(tmp_path)
    record = (tmp_path / "metrics.json").read_text()
    for name in ("model_final.pth", "last_checkpoint"):
        (tmp_path / name).unlink()
    with pytest.raises(FileExistsError, match=f"OUTPUT_DIR {tmp_path} .* of 4 iterations, but no checkpoint.*--overwr"):
        train(tmp_path, resume=True)
    assert (tmp_path / "metrics.json").read_text() == record
    trainer = train(tmp_path, overwrite=True)
    assert trainer.start_iter == 0 and iterations(tmp_path) == [3]


def test_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"iteration": 1}\n{"iteration"')
    assert train(tmp_path, "SOLVER.CHECKPOINT_PERIOD", 3, resume=True).start_iter == 0
    assert "ended before its first checkpoint: training starts from iteration 0" in (tmp_path / "log.txt").read_text()
    assert iterations(tmp_path) == [3]
