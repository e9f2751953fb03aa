# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""predict.py as a user runs it, with a tiny model: inputs of all kinds, shards, interruptions, results."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import predict
from benchmarks import predict_memory
from dcn_d2.engine import DCNPredictor, load_config
from dcn_d2.prediction import loop

from .engine.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[1]


def noise(path: Path, height: int = 60, width: int = 90, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def make_model(folder: Path, *changes: Any) -> list[str]:
    """A tiny model with random weights; gives the arguments that name it."""
    torch.manual_seed(0)
    cfg = tiny_config(folder / "unused", "TEST.DETECTIONS_PER_IMAGE", 5, *changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model.pth")
    return ["--config-file", str(folder / "config.yaml"), "--weights", str(folder / "model.pth")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


Run = Callable[..., Path]


@pytest.fixture
def run(model: list[str], tmp_path: Path) -> Run:
    """Runs predict.py on inputs and gives the folder of the results."""

    def start(*arguments: Any, output: str = "out", code: int = 0, given: list[str] = model) -> Path:
        assert predict.run([*given, "--output", str(tmp_path / output), *map(str, arguments)]) == code
        return tmp_path / output

    return start


def detections(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "detections.json").read_text())


def images(output: Path) -> dict[Any, str]:
    return {image["id"]: image["file_name"] for image in json.loads((output / "images.json").read_text())["images"]}


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for part in output.glob("parts/*/*.jsonl") for line in part.read_text().splitlines()]


def same(found: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Whether detections are equal up to rounding: images in other batches are summed in another order."""
    keys = [(d["image_id"], d["category_id"]) for d in found]
    boxes, scores = ([np.array([d[key] for d in each]) for each in (found, others)] for key in ("bbox", "score"))
    return (
        keys == [(d["image_id"], d["category_id"]) for d in others]
        and np.allclose(*boxes, atol=1e-2)
        and np.allclose(*scores, atol=1e-4)
    )


def stopped(start: Callable[[], object]) -> str:
    """The message with which a command ends."""
    with pytest.raises(SystemExit) as error:
        start()
    text = str(error.value.code)
    assert text.startswith("predict.py: ") and "\n" not in text
    return text


def test_a_folder_gives_what_the_predictor_gives(run: Run, model: list[str], tmp_path: Path, capsys: Any) -> None:
    files = [noise(tmp_path / "in" / name, seed=i) for i, name in enumerate(("a b.png", "c.jpg", "sub/a b.png"))]
    noise(tmp_path / "in" / ".hidden.png")
    (tmp_path / "in" / "notes.md").write_text("no image")
    output = run("--input", tmp_path / "in")
    assert images(output) == {i: str(file) for i, file in enumerate(files, 1)}
    predictor = DCNPredictor(load_config(model[1], ["MODEL.WEIGHTS", model[3]]))
    expected = []
    for number, file in enumerate(files, 1):
        found = predictor(str(file))["instances"]
        assert len(found) == 5
        for (x0, y0, x1, y1), value in zip(found.pred_boxes.tensor.tolist(), found.scores.tolist()):
            expected.append({"image_id": number, "category_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": value})
    assert same(detections(output), expected)
    assert capsys.readouterr().out == f"3 image(s) in {output}\n"
    assert not (output / "unreadable.txt").exists()


def test_inputs_of_all_kinds(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x/a.png", "x/ü ß.png", "y/a.png", "y/[1].png", "z/deep/b.png", "l/c.png", "l/d.png", "l/e.png"):
        noise(tmp_path / name)
    (tmp_path / "l" / "list.txt").write_text("\ufeffc.png\r\n\n../x/ü ß.png\r\n", encoding="utf-8")
    (tmp_path / "l" / "list.csv").write_text('label,Path\ncat,"d.png"\n')
    (tmp_path / "l" / "list.jsonl").write_text('{"file_name": "e.png"}\n')
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(os.fsencode(str(tmp_path / "x" / "a.png")))))
    inputs = ["z/**/*.png", "y", "y/[1].png", "l/list.txt", "l/list.csv", "l/list.jsonl"]
    output = run("--input", "-", *(tmp_path / name for name in inputs))
    names = "x/a.png z/deep/b.png y/[1].png y/a.png l/c.png x/ü|ß.png l/d.png l/e.png".split()
    assert [os.path.relpath(os.path.realpath(name), tmp_path) for name in images(output).values()] == [
        name.replace("|", " ") for name in names
    ]


def test_a_coco_file_is_evaluated_by_pycocotools(run: Run, tmp_path: Path) -> None:
    entries = [{"id": key, "file_name": f"{key}.png", "width": 90, "height": 60} for key in (70, 12)]
    for seed, entry in enumerate(entries):
        noise(tmp_path / "photos" / str(entry["file_name"]), seed=seed)
    truth: dict[str, Any] = {"images": entries, "categories": [{"id": 9, "name": "nucleus"}], "annotations": []}
    (tmp_path / "val.json").write_text(json.dumps(truth))
    output = run("--input", tmp_path / "val.json", "--images", tmp_path / "photos")
    found = detections(output)
    assert {d["image_id"] for d in found} == {70, 12} and {d["category_id"] for d in found} == {9}
    # What was found is the truth: so AP must be 100 %.
    truth["annotations"] = [
        {**d, "id": i, "iscrowd": 0, "area": d["bbox"][2] * d["bbox"][3]} for i, d in enumerate(found, 1)
    ]
    (tmp_path / "val.json").write_text(json.dumps(truth))
    for file in (tmp_path / "val.json", output / "images.json"):  # images.json knows the same images
        COCO(str(file)).loadRes(str(output / "detections.json"))
    coco = COCO(str(tmp_path / "val.json"))
    evaluation = COCOeval(coco, coco.loadRes(str(output / "detections.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


def test_masks_and_keypoints_are_written(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    heads = ["MODEL.MASK_ON", True, "MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [8]]
    given = make_model(tmp_path / "heads", *heads, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead")
    file = noise(tmp_path / "a.png")
    output = run("--input", file, "--format", "both", "--pictures", "--confidence", 0, given=given)
    found = detections(output)
    dataset = json.loads((output / "images.json").read_text())
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    results = coco.loadRes(found)
    assert results.annToMask(results.anns[1]).shape == (60, 90)
    assert all(len(d["keypoints"]) == 3 * 17 for d in found)
    rows = parquet.read_table(output / "detections.parquet").to_pylist()
    assert [row["segmentation"] for row in rows] == [d["segmentation"]["counts"] for d in found]
    assert rows[0]["file_name"] == str(file) and rows[0]["category"] == "nucleus"
    assert np.allclose([row["keypoints"] for row in rows], [d["keypoints"] for d in found])
    assert Image.open(output / "pictures" / "a.png").size == (90, 60)


def test_shards_are_together_one_run(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(7):
        noise(tmp_path / "in" / f"{number}.png", 40 + number % 3, 70, seed=number)
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    whole = run("--input", tmp_path / "in", output="whole")
    parts = run("--input", tmp_path / "in", "--shard", "3/3", output="parts")
    assert "shard 3/3 is done; 6 image(s) are not done yet" in capsys.readouterr().out
    assert not (parts / "detections.json").exists()
    assert "6 image(s) are not done yet" in stopped(lambda: predict.run(["--merge", "--output", str(parts)]))
    run("--input", tmp_path / "in", "--shard", "1/3", output="parts")
    run("--input", tmp_path / "in", "--shard", "2/3", output="parts")
    assert same(detections(parts), detections(whole))
    assert images(parts) == images(whole) and len(images(whole)) == 7
    assert (parts / "unreadable.txt").read_text() == (whole / "unreadable.txt").read_text() != ""
    numbers = [line["number"] for line in lines(parts)]
    assert sorted(numbers) == list(range(1, 9)), "no image is predicted twice"
    sizes = [len(part.read_text().splitlines()) for part in sorted(parts.glob("parts/*/*.jsonl"))]
    assert sizes == [3, 3, 2]
    (parts / "detections.json").unlink()
    assert predict.run(["--merge", "--output", str(parts)]) == 0
    assert same(detections(parts), detections(whole))


def test_what_is_done_is_not_done_again(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        noise(tmp_path / "in" / f"{number}.png", seed=number)
    whole = run("--input", tmp_path / "in")
    before = detections(whole)
    part = whole / "parts" / "1-of-1" / "images.jsonl"
    content = part.read_bytes()
    half = content[: content.index(b"\n", content.index(b"\n") + 1) + 200]  # two lines and a piece of the third
    part.write_bytes(half)
    seen: list[int] = []
    line_of = loop._image_line
    monkeypatch.setattr(
        loop, "_image_line", lambda item, *rest: seen.append(item.source.number) or line_of(item, *rest)
    )
    run("--input", tmp_path / "in")
    assert seen == [3, 4]
    assert same(detections(whole), before)
    assert [line["number"] for line in lines(whole)] == [1, 2, 3, 4]
    run("--input", tmp_path / "in")
    assert seen == [3, 4], "nothing was left to do"


@pytest.mark.parametrize(
    "changes, reason",
    [
        (["--score-threshold", "0.6"], "score_threshold was None, is 0.6"),
        (["--pictures"], "pictures was False, is 0.5"),
        (["MODEL.ROI_HEADS.NMS_THRESH_TEST", "0.3"], "MODEL.ROI_HEADS.NMS_THRESH_TEST was 0.5, is 0.3"),
        (["--weights", "OTHER"], "other weights"),
    ],
)
def test_another_command_is_refused_in_a_used_folder(
    run: Run, tmp_path: Path, model: list[str], changes: list[str], reason: str
) -> None:
    file = noise(tmp_path / "in" / "a.png")
    output = run("--input", file)
    given = list(model)
    if "OTHER" in changes:
        weights = torch.load(model[3])
        weights["model"]["roi_heads.box_predictor.cls_score.bias"] += 1
        torch.save(weights, tmp_path / "other.pth")
        given, changes = [*model[:3], str(tmp_path / "other.pth")], []
    text = stopped(lambda: run("--input", file, *changes, given=given))
    assert reason in text and "--overwrite" in text
    before = (output / "run.json").read_text()
    run("--input", file, "--overwrite", *changes, given=given)
    assert (output / "run.json").read_text() != before and len(lines(output)) == 1


def test_other_inputs_and_files_of_others_are_refused(run: Run, tmp_path: Path) -> None:
    first, second = noise(tmp_path / "a.png"), noise(tmp_path / "b.png")
    run("--input", first)
    assert "inputs was 1, is 2" in stopped(lambda: run("--input", first, second))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "detections.json").write_text("mine")
    assert "predict.py has not written it" in stopped(lambda: run("--input", first, output="foreign"))
    assert "predict.py has not written it" in stopped(lambda: run("--input", first, "--overwrite", output="foreign"))
    assert (tmp_path / "foreign" / "detections.json").read_text() == "mine"
    assert "is a file" in stopped(lambda: run("--input", first, output="b.png"))


def test_a_run_with_pictures_was_thrown_away_and_its_folder_refused(run: Run, tmp_path: Path) -> None:
    file = noise(tmp_path / "a.png")
    output = run("--input", file, "--pictures")
    run("--input", file, "--overwrite")
    assert not (output / "pictures").exists()
    run("--input", file, "--overwrite", "--pictures")
    (output / "pictures" / "mine.txt").touch()
    run("--input", file, "--overwrite")
    assert os.listdir(output / "pictures") == ["mine.txt"]


def test_overwriting_removed_files_beside_a_run_json_of_others(run: Run, tmp_path: Path) -> None:
    file, folder = noise(tmp_path / "a.png"), tmp_path / "out"
    (folder / "parts").mkdir(parents=True)
    for name in ("run.json", "detections.json", "parts/mine.txt"):
        (folder / name).write_text("{}")
    assert "was not written by predict.py" in stopped(lambda: run("--input", file, "--overwrite"))
    assert (folder / "parts" / "mine.txt").exists() and (folder / "detections.json").exists()


def test_shards_that_overwrite_do_not_throw_away_each_other(run: Run, tmp_path: Path) -> None:
    for number in range(2):
        noise(tmp_path / "in" / f"{number}.png", seed=number)
    run("--input", tmp_path / "in", "--score-threshold", "0.9")
    for shard in ("1/2", "2/2"):
        output = run("--input", tmp_path / "in", "--shard", shard, "--overwrite")
    assert [line["number"] for line in lines(output)] == [1, 2]
    assert len(images(output)) == 2


def test_unreadable_images_are_listed_and_tried_again(run: Run, tmp_path: Path, capsys: Any) -> None:
    good, gone, cut = noise(tmp_path / "good.png"), tmp_path / "gone.png", noise(tmp_path / "cut.jpg")
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    narrow = noise(tmp_path / "narrow.png", 1, 5000)
    inputs = ["--input", gone, cut, good, narrow]
    output = run(*inputs)
    printed = capsys.readouterr()
    assert printed.out == f"1 image(s) in {output}; 3 could not be read, see {output / 'unreadable.txt'}\n"
    assert f"skipped {gone}: No such file" in printed.err  # the reason names the file, and so the line does so once
    listed = (output / "unreadable.txt").read_text().splitlines()
    expected = [(gone, "No such file"), (cut, "cannot be read"), (narrow, "too narrow")]
    assert len(listed) == 3
    assert all(line.startswith(str(file)) and reason in line for line, (file, reason) in zip(listed, expected))
    run(*inputs, "--strict", code=1)
    cut.write_bytes(whole)
    noise(gone)
    run(*inputs)
    assert images(output) == {1: str(gone), 2: str(cut), 3: str(good)}
    assert len((output / "unreadable.txt").read_text().splitlines()) == 1


def test_pictures_of_one_name_do_not_overwrite_each_other(run: Run, tmp_path: Path) -> None:
    for seed, name in enumerate(("x/a.png", "y/a.png", "y/A.jpg")):
        noise(tmp_path / "in" / name, seed=seed)
    output = run("--input", tmp_path / "in", "--pictures", "--confidence", 0)
    assert sorted(path.name for path in (output / "pictures").iterdir()) == ["A_2.png", "a.png", "a_3.png"]
    assert len({path.read_bytes() for path in (output / "pictures").iterdir()}) == 3


def make_video(path: Path, frames: int = 7) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (96, 64))
    for seed in range(frames):
        writer.write(np.random.default_rng(seed).integers(0, 255, (64, 96, 3), dtype=np.uint8))
    writer.release()
    return path


def test_a_link_to_itself_does_not_end_a_run_with_pictures(run: Run, tmp_path: Path) -> None:
    noise(tmp_path / "in" / "a.png")
    os.symlink("b.png", tmp_path / "in" / "b.png")
    output = run("--input", tmp_path / "in", "--pictures")
    assert (
        os.listdir(output / "pictures") == ["a.png"] and len((output / "unreadable.txt").read_text().splitlines()) == 1
    )


def test_every_second_frame_of_a_video_in_shards(run: Run, tmp_path: Path) -> None:
    film = make_video(tmp_path / "film.avi")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    photo = noise(tmp_path / "film.png")
    inputs = ["--input", photo, film, tmp_path / "broken.mp4", "--frames", 2]
    options = ["--pictures", "--video", "--confidence", 0]
    whole = run(*inputs, *options, output="whole")
    ids = [1, *(2 * 10**9 + frame for frame in (0, 2, 4, 6))]
    assert list(images(whole)) == ids == sorted({d["image_id"] for d in detections(whole)})
    frames = [image.get("frame") for image in json.loads((whole / "images.json").read_text())["images"]]
    assert frames == [None, 0, 2, 4, 6]
    assert "broken.mp4 is not a video" in (whole / "unreadable.txt").read_text()
    pictures = {str(path.relative_to(whole / "pictures")) for path in whole.rglob("pictures/**/*") if path.is_file()}
    assert pictures == {"film.png", "film_2.mp4", *(f"film_2.frames/{i:06d}.png" for i in (0, 2, 4, 6))}
    drawn = cv2.VideoCapture(str(whole / "pictures" / "film_2.mp4"))
    assert drawn.get(cv2.CAP_PROP_FPS) == 5 and sum(1 for _ in iter(drawn.grab, False)) == 4
    for shard in ("2/2", "1/2"):
        parts = run(*inputs, "--shard", shard, output="parts")
    assert same(detections(parts), detections(whole)) and images(parts) == images(whole)
    assert sum(line["kind"] == "image" for line in lines(parts)) == 5


def start_process(model: list[str], *arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "predict.py", *model, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_lines(output: Path, number: int, process: subprocess.Popen[str]) -> None:
    part = output / "parts" / "1-of-1" / "images.jsonl"
    deadline = time.monotonic() + 120
    while not (part.exists() and part.read_bytes().count(b"\n") >= number):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_and_a_stopped_run_go_on(run: Run, model: list[str], tmp_path: Path) -> None:
    for number in range(150):
        noise(tmp_path / "in" / f"{number:03d}.png", seed=number)
    output = tmp_path / "out"
    arguments = ["--input", tmp_path / "in", "--output", output]
    killed = start_process(model, *arguments)
    wait_for_lines(output, 20, killed)
    killed.send_signal(signal.SIGSTOP)  # so that it is not done before this process has looked
    assert "another process predicts the same part (1-of-1)" in stopped(lambda: run("--input", tmp_path / "in"))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = len(lines(output))
    assert 20 <= before < 150 and not (output / "detections.json").exists()
    asked = start_process(model, *arguments)
    wait_for_lines(output, before + 20, asked)
    asked.send_signal(signal.SIGTERM)
    _, errors = asked.communicate(timeout=60)
    assert asked.returncode == 128 + signal.SIGTERM, errors
    assert "goes on" in errors and "the same command goes on" in errors
    assert before + 20 <= len(lines(output)) < 150
    run("--input", tmp_path / "in")
    numbers = [line["number"] for line in lines(output)]
    assert sorted(numbers) == list(range(1, 151)), "no image is missing, none was predicted twice"
    assert len(images(output)) == 150
    assert same(detections(output), detections(run("--input", tmp_path / "in", output="whole")))


def test_an_interrupt_during_the_imports_was_a_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    class Interrupt:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "dcn_d2.prediction.run":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "dcn_d2.prediction.run")
    monkeypatch.setattr(sys, "meta_path", [Interrupt(), *sys.meta_path])
    run("--input", "a.png", code=128 + signal.SIGINT)
    assert capsys.readouterr().err == "predict.py: interrupted; the same command goes on\n"


@pytest.mark.slow
def test_memory_stays_flat_over_2000_images(model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the memory of a process is read from Linux's /proc")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    predict_memory.make_images(tmp_path / "in", 2000)
    row = predict_memory.watch(model, tmp_path / "in", tmp_path / "out")
    assert row["images"] == len(images(tmp_path / "out")) == 2000
    assert row["grown_mb"] <= predict_memory.GOAL_MB, row


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--shard 0/4 --input a", "shards count from 1, so those of 4 are 1/4 to 4/4"),
        ("--shard 5/4 --input a", "shards count from 1"),
        ("--shard 2 --input a", "must be written as 2/4"),
        ("--input", "expected at least one argument"),
        ("", "--input PATH is needed"),
        ("--input a --published --weights b", "not allowed with argument"),
        ("--input a --frames 0", "--frames: must be at least 1"),
        ("--merge --shard 1/2", "--merge only writes results again"),
        ("--input a MODEL.DEVICE", "KEY VALUE must come in pairs"),
    ],
)
def test_mistyped_arguments_are_usage_errors(arguments: str, message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as error:
        predict.run(["--config-file", "any.yaml", "--output", "out", *arguments.split()])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_inputs_without_images_are_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "columns.csv").write_text("name,label\na.png,1\n")
    (tmp_path / "no.json").write_text("[]")
    for name, message in {
        "empty": "there are no images in",
        "empty.txt": "there are no images in",
        "*.nosuch": "no file fits the pattern",
        "columns.csv": "no column is called file_name, filename, path, image, image_path, file; there are name, label",
        "no.json": "is not a file in COCO's format",
        "nosuch.png": "none of the 1 image(s) could be read; the first",
    }.items():
        assert message in stopped(lambda name=name: run("--input", tmp_path / name, output=f"out {name[:5]}"))
    assert "PathManager has no handler for s3://a/b.png" in stopped(lambda: run("--input", "s3://a/b.png"))
    assert "no prediction was started there" in stopped(
        lambda: predict.run(["--merge", "--output", str(tmp_path / "empty")])
    )


def test_a_row_without_trained_weights_is_refused_with_the_line_that_loads_them(run: Run, tmp_path: Path) -> None:
    row = "faster_rcnn_R_50_FPN_1x_mdconv_c3-c5"
    file = noise(tmp_path / "a.png")
    text = stopped(lambda: run("--input", file, given=["--config-file", row]))
    assert "the heads are not trained: MODEL.WEIGHTS is detectron2://ImageNetPretrained/torchvision/R-50.pkl" in text
    assert f"predict.py --config-file {row} --published" in text
    arguments = ["--input", file, "MODEL.WEIGHTS", ""]
    text = stopped(lambda: run(*arguments, given=["--config-file", row]))
    assert "no weights are given: --weights FILE" in text and "--published" in text


def test_categories_that_do_not_fit_are_refused(run: Run, tmp_path: Path) -> None:
    noise(tmp_path / "a.png")
    truth = {"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "val.json").write_text(json.dumps(truth))
    text = stopped(lambda: run("--input", tmp_path / "val.json"))
    assert "the model has 1 classes (nucleus), and the COCO file 1 categories (cat)" in text
    text = stopped(lambda: run("--input", tmp_path / "val.json", tmp_path / "a.png"))
    assert "must be the only input" in text


def test_help_is_light() -> None:
    code = "import sys, predict\ntry: predict.run(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("False\n") and "--shard I/N" in done.stdout
