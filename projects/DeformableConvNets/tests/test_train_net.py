# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from PIL import Image

from dcn_d2 import engine, model_zoo
from dcn_d2.checkpoint import to_mmdet
from dcn_d2.command_line.train import build_parser
from dcn_d2.engine import precision
from dcn_d2.engine.precision import why_not_on_cpu
from dcn_d2.report import write_report
from dcn_d2.report.runs import read_runs

from .slim import SLIM, slim_config

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
import train_net  # noqa: E402  it is a script, not part of the package

ROW = PROJECT / "configs" / "cascade_mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml"
NUCLEI = PROJECT / "examples" / "nuclei_faster_rcnn_slim_R_50_FPN_mdconv_c3-c5.yaml"
FAST = [*("INPUT.MIN_SIZE_TRAIN", "(96,)"), *("INPUT.MIN_SIZE_TEST", "96"), *("SOLVER.IMS_PER_BATCH", "2")]
Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs train_net.py in a folder of its own; its output goes to `out` there."""

    def run(*arguments: object, fails: bool = False, **environment: object) -> subprocess.CompletedProcess:
        env = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
        env.pop("DETECTRON2_DATASETS", None)
        command = [sys.executable, str(PROJECT / "train_net.py"), *map(str, arguments)]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=env | {key: str(value) for key, value in environment.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert (done.returncode != 0) == fails, done.stdout[-5000:]
        return done

    return run


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


@pytest.mark.slow
def test_trains_resumes_and_evaluates(run: Run, tmp_path: Path) -> None:
    arguments = ["--config-file", NUCLEI, *FAST, "OUTPUT_DIR", "out", "SOLVER.STEPS", "()"]
    # Batch 2 for a base learning rate that is meant for 4.
    log = run(*arguments, "SOLVER.MAX_ITER", 3, "SOLVER.REFERENCE_IMS_PER_BATCH", 4, "SOLVER.AMP.ENABLED", True).stdout
    assert "MODEL.DEVICE is cuda, but there is no GPU: running on the CPU" in log
    assert ("SOLVER.AMP.ENABLED is switched off" in log) == bool(why_not_on_cpu("auto"))
    assert "SOLVER.BASE_LR goes from 0.02 to 0.01" in log
    assert "eta: " in log and "Starting training from iteration 0" in log
    assert "|  AP   |  AP50  |" in log
    assert "is deprecated" not in log and "meshgrid" not in log
    out = tmp_path / "out"
    assert list(out.glob("events.out.tfevents.*")) and (out / "inference" / "nuclei_val").is_dir()
    assert "bbox/AP" in metrics(out)[-1]
    assert "report of the run: out/report.html" in log
    assert "Trained to the end: 3 iterations." in (out / "report.html").read_text()

    run("--resume", *arguments, "SOLVER.MAX_ITER", 5)
    checkpoint = torch.load(out / "model_final.pth")
    assert checkpoint["iteration"] == 4
    assert "Starting training from iteration 3" in (out / "log.txt").read_text()

    # The same weights give the same numbers again.
    trained = [line["bbox/AP50"] for line in metrics(out) if "bbox/AP50" in line][-1]
    weights = ["MODEL.WEIGHTS", out / "model_final.pth", "TEST.EXPECTED_RESULTS"]
    run("--eval-only", *arguments, *weights, f"[['bbox', 'AP50', {trained}, 1e-6]]")
    log = run("--eval-only", *arguments, *weights, f"[['bbox', 'AP50', {trained + 1}, 0.5]]", fails=True).stdout
    assert "Result verification failed" in log
    assert [(entry["status"], entry.get("end")) for entry in read_runs(out)] == [
        *[("finished", 3), ("finished", 5)],
        *[("evaluated", None), ("evaluated", None)],
    ]
    assert "Evaluated, with the weights out/model_final.pth." in write_report(out).read_text().replace(str(out), "out")


@pytest.mark.slow
def test_two_processes_train_and_evaluate(run: Run, tmp_path: Path) -> None:
    arguments = ["--num-gpus", 2, "--config-file", NUCLEI, *FAST, "OUTPUT_DIR", "out", "SOLVER.STEPS", "()"]
    arguments += ["DATALOADER.NUM_WORKERS", 2]
    log = run(*arguments, "SOLVER.MAX_ITER", 2).stdout
    assert "World size: 2" in log and "|  AP   |  AP50  |" in log
    assert "DATALOADER.NUM_WORKERS goes from 2 to 0" in log
    assert (tmp_path / "out" / "log.txt.rank1").exists()
    assert torch.load(tmp_path / "out" / "model_final.pth")["iteration"] == 1
    predictions = json.loads((tmp_path / "out/inference/nuclei_val/coco_instances_results.json").read_text())
    assert {prediction["image_id"] for prediction in predictions} == {1, 2, 3, 4}  # gathered from both


def write_coco(root: Path) -> None:
    """A data set in COCO's layout: bright squares on grey, with masks, of two of COCO's 80 categories."""
    random = np.random.default_rng(0)
    for split in ("train2017", "val2017"):
        (root / "coco" / split).mkdir(parents=True)
        (root / "coco" / "annotations").mkdir(exist_ok=True)
        images, annotations = [], []
        for number in (1, 2):
            pixels = np.full((80, 96, 3), 90, np.uint8)
            for category in (1, 18):
                x, y, size = (int(v) for v in random.integers([2, 2, 20], [40, 40, 36]))
                pixels[y : y + size, x : x + size] = 150 + 3 * category
                polygon = [x, y, x + size, y, x + size, y + size, x, y + size]
                annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": 0}
                annotation |= {"bbox": [x, y, size, size], "area": size**2, "segmentation": [polygon]}
                annotations.append(annotation)
            name = f"{number:012d}.jpg"
            Image.fromarray(pixels).save(root / "coco" / split / name)
            images.append({"id": number, "file_name": name, "height": 80, "width": 96})
        names = MetadataCatalog.get("coco_2017_val")
        ids = names.thing_dataset_id_to_contiguous_id
        categories = [{"id": key, "name": names.thing_classes[value]} for key, value in ids.items()]
        data = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        (root / "coco" / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))


@pytest.mark.slow
def test_row_of_the_zoo_trains_on_coco(run: Run, tmp_path: Path) -> None:
    write_coco(tmp_path / "data")
    arguments = ["--config-file", ROW, *SLIM, *FAST, "OUTPUT_DIR", "out", "MODEL.BACKBONE.FREEZE_AT", 0]
    arguments += [
        "SOLVER.MAX_ITER",
        2,
        "SOLVER.STEPS",
        "()",
        "DATALOADER.NUM_WORKERS",
        0,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        0.0,
    ]
    log = run(*arguments, DETECTRON2_DATASETS=tmp_path / "data").stdout
    assert "Evaluation results for segm" in log
    losses = next(line for line in metrics(tmp_path / "out") if "total_loss" in line)
    assert {"loss_box_reg_stage2", "loss_mask_stage2"} <= losses.keys() and np.isfinite(losses["total_loss"])


def save_published(path: Path) -> list[object]:
    """Saves a slim model of ROW as MMDetection does; returns the arguments that evaluate it as published."""
    torch.manual_seed(0)
    model = build_model(engine.load_config(str(ROW), SLIM))
    torch.save({"meta": {}, "state_dict": to_mmdet(model.state_dict())}, path)
    return ["--published", "--config-file", ROW, *SLIM[:2], *SLIM[4:], *FAST, "PUBLISHED.WEIGHTS", path]


def test_published_weights_are_evaluated_and_compared(run: Run, tmp_path: Path) -> None:
    write_coco(tmp_path / "data")
    arguments = save_published(tmp_path / "published.pth")
    # Untrained weights have an AP of about 0, so that 0.1 is near enough and 41.1 is not.
    arguments += ["PUBLISHED.BOX_AP", 0.1, "PUBLISHED.MASK_AP", 41.1, "OUTPUT_DIR", "out", "DATALOADER.NUM_WORKERS", 0]
    arguments += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "SEED", 0]
    done = run(*arguments, fails=True, DETECTRON2_DATASETS=tmp_path / "data", FVCORE_CACHE=tmp_path / "cache")
    assert f"mmdet://{tmp_path}/published.pth" in done.stdout
    assert re.search(
        r"published +measured +difference\nbox AP +0\.1 +0\.\d+ .*\nmask AP +41\.1 +0\.\d+ +-41", done.stdout
    )
    assert "more than 0.15 away from the published value: mask AP" in done.stdout
    assert "Traceback" not in done.stdout


def test_published_weights_that_score_as_published_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_coco(tmp_path)
    arguments = [*map(str, save_published(tmp_path / "published.pth")), "OUTPUT_DIR", str(tmp_path / "out")]
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dcn_d2.engine.evaluating.check_data_sets", lambda names: None)
    monkeypatch.setattr("dcn_d2.engine.start.load_config", lambda *args: pytest.fail("the config was read twice"))
    published = model_zoo.get_published(ROW.stem)
    results = {"bbox": {"AP": published["BOX_AP"] - 0.1}, "segm": {"AP": published["MASK_AP"] + 0.1}}
    monkeypatch.setattr(engine.DCNTrainer, "test", lambda cfg, model: results)
    train_net.run(arguments)
    results["bbox"]["AP"] -= 0.1
    with pytest.raises(SystemExit, match="more than 0.15 away from the published value: box AP$"):
        train_net.run(arguments)


def test_comparison_with_published_numbers() -> None:
    published = {"BOX_AP": 41.8, "MASK_AP": 37.4}
    table, off = train_net.compare_with_published(published, {"bbox": {"AP": 41.71}, "segm": {"AP": 37.0}})
    assert table.splitlines()[1:] == [
        "box AP          41.8     41.71       -0.09",
        "mask AP         37.4     37.00       -0.40",
    ]
    assert off == ["mask AP"]
    # A model without masks, and an evaluation without a result.
    assert train_net.compare_with_published({"BOX_AP": 41.3, "MASK_AP": 0.0}, {"bbox": {"AP": 41.4}})[1] == []
    assert train_net.compare_with_published(published, {"bbox": {"AP": float("nan")}})[1] == ["box AP", "mask AP"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config-file", str(NUCLEI)], "nuclei_.*yaml' has no PUBLISHED.WEIGHTS"),
        (["--config-file", str(ROW), "DATASETS.TEST", "('nuclei_val',)"], "is for coco_2017_val, DATASETS.TEST is"),
        (["--config-file", str(ROW), "PUBLISHED.WEIGHTS", "/nowhere/a.pth"], "there is no file /nowhere/a.pth"),
    ],
)
def test_published_needs_a_row_its_data_and_its_file(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcn_d2.engine.evaluating.check_data_sets", lambda names: None)
    with pytest.raises(SystemExit, match=f"^train_net.py: .*{message}"):
        train_net.run(["--published", *arguments])


def test_missing_data_set_is_named_with_its_place(run: Run, tmp_path: Path) -> None:
    log = run("--config-file", ROW, fails=True, DETECTRON2_DATASETS=tmp_path).stdout
    expected = tmp_path / "coco" / "annotations" / "instances_train2017.json"
    assert f"data set coco_2017_train: its annotations are expected at {expected}, which does not exist" in log
    assert "Traceback" not in log


def test_data_sets_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data set 'nuclei_test'.*; registered are .*nuclei_train"):
        engine.check_data_sets(["nuclei_test"])
    engine.check_data_sets(["nuclei_train", "nuclei_val"])
    (tmp_path / "a.json").write_text("{}")
    DatasetCatalog.register("half_there", list)
    try:
        MetadataCatalog.get("half_there").set(json_file=str(tmp_path / "a.json"), image_root=str(tmp_path / "images"))
        with pytest.raises(FileNotFoundError, match=f"half_there: its images are expected at {tmp_path}/images"):
            engine.check_data_sets(["half_there"])
    finally:
        DatasetCatalog.remove("half_there")
        MetadataCatalog.remove("half_there")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config-file", "nothing.yaml"], "Config file 'nothing.yaml' does not exist"),
        (
            ["--config-file", "configs/faster_rcnn_R_50_FPN_mdconv_c3-c5.yaml"],
            "does not exist; did you mean 'faster_rcnn_R_50_FPN_1x_mdconv_c3-c5'?",
        ),
        (["MODEL.NOTHING", "1"], "Non-existent key: MODEL.NOTHING"),
        (["MODEL.DCN.NORM_EVAL", "maybe"], "Type mismatch"),
        (["DATASETS.TRAIN", "('nothing',)"], "there is no data set 'nothing'"),
    ],
)
def test_mistakes_in_the_config_are_told_in_a_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as error:
        train_net.run(arguments)
    assert message in str(error.value.code)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_mistakes_that_only_loading_shows_end_in_a_line(run: Run, tmp_path: Path, processes: int) -> None:
    torch.save({"model": {"proposal_generator.weight": torch.zeros(2)}}, tmp_path / "odd.pth")
    arguments = ["--num-gpus", processes, "--config-file", NUCLEI, *FAST, "OUTPUT_DIR", "out"]
    done = run(*arguments, "MODEL.WEIGHTS", "odd.pth", fails=True)
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert sum(line.startswith("train_net.py: ") for line in done.stdout.splitlines()) == 1
    assert "Traceback" in (tmp_path / "out" / "log.txt").read_text(), "for whoever looks for the reason"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["MODEL.WEIGHTS", "/nosuch.pth"], "MODEL.WEIGHTS: there is no file /nosuch.pth"),
        (["--eval-only"], r"heads are not trained: MODEL.WEIGHTS is empty"),
        (["SOLVER.CHECKPOINT_PERIOD", "0"], "SOLVER.CHECKPOINT_PERIOD must be a whole number of at least 1"),
        (
            ["TEST.AUG.ENABLED", "True", "MODEL.KEYPOINT_ON", "True"],
            "TEST.AUG.ENABLED is True, but .*KEYPOINT_ON",
        ),
        (["OUTPUT_DIR", "/proc/nothing"], "OUTPUT_DIR /proc/nothing cannot be written"),
    ],
)
def test_mistakes_are_told_before_processes_start(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "launch", lambda *args, **kwargs: pytest.fail("started"))
    start = ["--eval-only"] if "--eval-only" in arguments else []
    keys = [text for text in arguments if text != "--eval-only"]
    out = [] if "OUTPUT_DIR" in keys else ["OUTPUT_DIR", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=f"^train_net.py: .*{message}"):
        train_net.run([*start, "--config-file", str(NUCLEI), *keys, *out])


def test_training_snippet_of_the_documents_may_be_imported(repository: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (repository / "docs" / "training.md").read_text(), re.DOTALL)
    (snippet,) = [block for block in blocks if "trainer.train()" in block]
    # As in a process that loads data and is not forked: the file has another name there, and must not train.
    names: dict = {"__name__": "__mp_main__"}
    exec(compile(snippet, "snippet", "exec"), names)
    assert callable(names["main"]) and "my_train" not in DatasetCatalog


def test_processes_that_cannot_find_each_other_are_refused_by_one_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("dcn_d2.engine.torchrun.PATIENCE", 0.0)
    monkeypatch.setattr("dcn_d2.command_line.cluster.PATIENCE", 0.0)
    for rank, message in (("0", "torchrun has started 2 processes .*MASTER_ADDR"), ("1", "1")):
        for key, value in {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(key, value)
        with pytest.raises(SystemExit, match=message):
            train_net.run(["--config-file", str(NUCLEI), "OUTPUT_DIR", str(tmp_path)])
        with pytest.raises(SystemExit):
            train_net.run(["--config-file", str(NUCLEI), "OUTPUT_DIR"])
    assert capfd.readouterr().err.count("must come in pairs") == 1


def test_evaluation_leaves_the_config_of_the_training(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("of the training")
    arguments = ["--eval-only", "--config-file", str(NUCLEI), "OUTPUT_DIR", str(tmp_path)]
    engine.setup(Namespace(**vars(train_net.parse_arguments(arguments))))
    assert (tmp_path / "config.yaml").read_text() == "of the training"


def test_weights_of_the_backbone_alone_are_not_evaluated(tmp_path: Path) -> None:
    arguments = ["--config-file", str(NUCLEI), "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out")]
    model = build_model(engine.load_config(str(NUCLEI), ["MODEL.DEVICE", "cpu"]))
    bottom = {k.removeprefix("backbone.bottom_up."): v for k, v in model.state_dict().items() if ".bottom_up." in k}
    torch.save({"model": bottom}, tmp_path / "imagenet.pth")
    with pytest.raises(SystemExit, match="heads are not trained: .*imagenet.pth holds weights for 291 of "):
        train_net.run(["--eval-only", *arguments, "MODEL.WEIGHTS", str(tmp_path / "imagenet.pth")])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num-gpus", "0"], "must be at least 1, got 0 and 1"),
        (["--num-machines", "2", "--machine-rank", "2"], "--machine-rank must be below --num-machines"),
        (["--num-machines", "2"], "several machines need --dist-url"),
        (["SEED"], "KEY VALUE must come in pairs, got SEED"),
        (["OUTPUT_DIR", "a", "--resume"], "--resume must come before the first KEY VALUE, OUTPUT_DIR"),
        (["OUTPUT_DIR", "a", "--num-gpus", "8"], "--num-gpus must come before the first KEY VALUE, OUTPUT_DIR"),
        (["--published", "--resume"], "--published chooses the weights: leave out --resume"),
        (["--published", "MODEL.WEIGHTS", "a.pth"], "--published chooses the weights"),
        ([], "--config-file FILE is needed"),
        (["--overwrite", "--resume", "--config-file", "a"], "--overwrite starts a new training"),
    ],
)
def test_mistakes_on_the_command_line_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        train_net.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_more_gpus_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--num-gpus is 2, but this machine has 1"):
        train_net.read_job(train_net.parse_arguments(["--num-gpus", "2", "--config-file", str(NUCLEI)]))


def test_arguments_are_those_of_detectron2() -> None:
    def facts(parser: object) -> dict:
        return {
            action.dest: (action.option_strings, action.default or None, action.type, type(action))
            for action in parser._actions
        }

    mine, theirs = facts(build_parser()), facts(default_argument_parser())
    assert mine.pop("dist_url")[0] == theirs.pop("dist_url")[0]
    assert {name: mine.get(name) for name in theirs} == theirs  # others are ours alone


def test_help_is_fast() -> None:
    code = "import sys, train_net; from dcn_d2.command_line.train import build_parser; build_parser().format_help(); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT)


@pytest.fixture
def cfg(monkeypatch: pytest.MonkeyPatch) -> CfgNode:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    cfg = slim_config()
    cfg.MODEL.DEVICE = "cuda"
    return cfg


def test_config_is_left_alone_where_there_is_a_gpu(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg.SOLVER.AMP.ENABLED, cfg.DATALOADER.NUM_WORKERS = True, 100
    before = cfg.dump()
    engine.fit_to_machine(cfg, processes=2)
    assert cfg.dump() == before


def test_cpu_without_bfloat16_has_no_mixed_precision_and_a_worker_for_a_core(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    cfg.SOLVER.AMP.ENABLED, cfg.DATALOADER.NUM_WORKERS = True, 100
    engine.fit_to_machine(cfg)
    assert (cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED, cfg.DATALOADER.NUM_WORKERS) == ("cpu", False, 4)


def test_processes_share_the_cores(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    engine.fit_to_machine(cfg, processes=2)
    assert threads == [2] and cfg.DATALOADER.NUM_WORKERS == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    engine.fit_to_machine(cfg, processes=2)
    assert threads == [2]


def test_processes_on_the_cpu_of_a_machine_with_gpus_are_refused(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg.MODEL.DEVICE = "cpu"
    with pytest.raises(ValueError, match="cpu with 2 processes.* CUDA_VISIBLE_DEVICES"):
        engine.fit_to_machine(cfg, processes=2)


@pytest.mark.parametrize(
    "reference, batch_size, expected", [(0, 2, 0.02), (16, 16, 0.02), (16, 2, 0.0025), (16, 64, 0.08)]
)
def test_learning_rate_follows_the_batch_size(reference: int, batch_size: int, expected: float) -> None:
    cfg = slim_config()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 0.02, batch_size, reference
    for _ in range(2):  # the config that is saved can be used again
        engine.scale_learning_rate(cfg)
        assert cfg.SOLVER.BASE_LR == pytest.approx(expected)


def test_setup_saves_the_config_that_runs(tmp_path: Path) -> None:
    arguments = ["--config-file", str(NUCLEI), "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path)]
    cfg = engine.setup(Namespace(**vars(train_net.parse_arguments(arguments))))
    assert cfg.is_frozen()
    saved = engine.load_config(str(tmp_path / "config.yaml"))
    assert json.dumps(saved) == json.dumps(cfg)  # which takes a tuple and a list for the same


@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_offset_branches_may_learn_more_slowly(factor: float) -> None:
    cfg = slim_config(DEFORM_ON_PER_STAGE=[False, False, True, True], DEFORM_MODULATED=True)
    cfg.SOLVER.BASE_LR, cfg.SOLVER.OFFSET_LR_FACTOR = 0.02, factor
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True  # makes Detectron2 wrap the optimizer's class
    model = engine.DCNTrainer.build_model(cfg)
    optimizer = engine.DCNTrainer.build_optimizer(cfg, model)
    rates = [(id(parameter), group["lr"]) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(rates) == len(dict(rates)) == len(list(model.parameters())), "each parameter is there once"
    slow = {name for name, parameter in model.named_parameters() if dict(rates)[id(parameter)] != 0.02}
    branches = {name for name, _ in model.named_parameters() if ".conv2_offset." in name}
    assert len(branches) == 2 * (6 + 3), "weight and bias of each block of res4 and res5"
    assert slow == (branches if factor != 1 else set())
    assert all(dict(rates)[id(p)] == 0.02 * factor for name, p in model.named_parameters() if name in branches)
