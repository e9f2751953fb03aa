# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Data sets of DATASETS.OWN: registration, matching of categories by name, the split, keypoints, the schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from dcn_d2.config import ConfigError, load_config
from dcn_d2.data import check_data, check_data_sets
from dcn_d2.data.needs import read_needs
from dcn_d2.data.own import data_set_name, register_own_data
from dcn_d2.data.own.categories import OwnFile, check_same_classes, match_classes, read_own_file
from dcn_d2.data.own.keypoints import check_sigmas, read_keypoints
from dcn_d2.data.own.schedule import count_training_images, describe_epochs, set_epochs
from dcn_d2.data.own.split import split_file
from dcn_d2.engine import DCNTrainer

from .own_files import CATEGORIES, write_own

NAMES = ("cat", "dog", "bird")
OTHER_ORDER = [(2, "bird"), (3, "cat"), (4, "dog"), (7, "never")]


def config(entries: list[list[str]], *opts: Any, names: tuple[str, ...] = NAMES) -> CfgNode:
    data = ["DATASETS.OWN", entries, "DATASETS.CLASS_NAMES", names, "MODEL.ROI_HEADS.NUM_CLASSES", len(NAMES)]
    return load_config("", [*data, "MODEL.MASK_ON", False, "MODEL.DEVICE", "cpu", *opts])


def entry(file: Path, names: tuple[str, ...] = NAMES) -> list[str]:
    return [data_set_name(str(file), str(file.parent), names), str(file), str(file.parent)]


def own(folder: Path, content: dict[str, Any], name: str = "a", argument: str = "--train-json") -> OwnFile:
    (folder / f"{name}.json").write_text(json.dumps(content))
    needs = read_needs(load_config("", ["MODEL.MASK_ON", False]), train=True)
    return read_own_file(argument, str(folder / f"{name}.json"), str(folder), needs)


def content(per_image: list[list[str]], names: tuple[str, ...] = NAMES, **category: Any) -> dict[str, Any]:
    """A file with objects of these names in each image."""
    images = [{"id": i, "file_name": f"{i}.png", "height": 9, "width": 9} for i in range(1, len(per_image) + 1)]
    objects = [(i, name) for i, found in enumerate(per_image, 1) for name in found]
    annotations = [
        {
            "id": number,
            "image_id": i,
            "category_id": names.index(name) + 1,
            "bbox": [1, 1, 4, 4],
            "area": 16,
            "iscrowd": 0,
        }
        for number, (i, name) in enumerate(objects, 1)
    ]
    categories = [{"id": number, "name": name} | category for number, name in enumerate(names, 1)]
    return {"images": images, "annotations": annotations, "categories": categories, "licenses": ["kept"]}


def test_reading_a_config_registers_its_data(tmp_path: Path) -> None:
    name, file, folder = entry(write_own(tmp_path, "a"))
    cfg = config([[name, file, folder]], "DATASETS.TRAIN", (name,))
    again = load_config(write(tmp_path / "config.yaml", cfg.dump()))
    register_own_data(again)  # a second time
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == [*NAMES] and metadata.json_file == file and metadata.evaluator_type == "coco"
    check_data(again, train=True)  # it replaces the loader for one call, which must not look like another data set
    register_own_data(again)
    records = DatasetCatalog.get(name)
    assert [annotation["category_id"] for annotation in records[0]["annotations"]] == [0, 1, 2]
    assert records[0]["file_name"] == f"{tmp_path}/sub folder/a_1.png"


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_name_does_not_stand_for_two_data_sets(tmp_path: Path) -> None:
    a, b = write_own(tmp_path, "a"), write_own(tmp_path, "b")
    name = f"mine_{tmp_path.name}"
    config([[name, str(a), str(tmp_path)]])
    with pytest.raises(ValueError, match=rf"DATASETS.OWN: the name '{name}' is that of another data set \(.*a.json\)"):
        config([[name, str(b), str(tmp_path)]])
    with pytest.raises(ValueError, match="other DATASETS.CLASS_NAMES: choose another name"):
        config([[name, str(a), str(tmp_path)]], names=("dog", "cat", "bird"))
    with pytest.raises(ValueError, match="'nuclei_train' is that of another data set, or"):
        config([["nuclei_train", str(a), str(tmp_path)]])
    with pytest.raises(ConfigError, match="DATASETS.OWN must have 3 values"):
        config([[name, str(a)]])


def test_without_its_files_a_config_still_knows_its_classes_and_says_what_is_missing(tmp_path: Path) -> None:
    name, file, folder = entry(tmp_path / "gone.json")
    config([[name, file, folder]])
    assert MetadataCatalog.get(name).thing_classes == [*NAMES]
    with pytest.raises(
        FileNotFoundError, match=r"gone.json, which does not exist. The config names it in DATASETS.OWN"
    ):
        check_data_sets([name])


def test_a_mistyped_name_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match="no data set 'nuclei_tain'; did you mean 'nuclei_train'?"):
        check_data_sets(["nuclei_tain"])


def test_only_data_sets_below_the_folder_of_detectron2_are_looked_for_there(tmp_path: Path) -> None:
    name = f"elsewhere_{tmp_path.name}"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(json_file=str(tmp_path / "no.json"))
    with pytest.raises(FileNotFoundError, match="It was registered with this path$"):
        check_data_sets([name])


def evaluate(cfg: CfgNode, name: str, found: dict[str, float]) -> dict[str, float]:
    """Evaluates a model that finds the objects of these names, and no others, and gives them the right class or not."""
    records = DatasetCatalog.get(name)
    evaluator = DCNTrainer.build_evaluator(cfg, name)
    evaluator.reset()
    for record in records:
        objects = [o for o in record["annotations"] if NAMES[o["category_id"]] in found]
        result = Instances((record["height"], record["width"]))
        boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float)
        boxes[:, 2:] += boxes[:, :2]
        result.pred_boxes = Boxes(boxes)
        result.pred_classes = torch.tensor([o["category_id"] for o in objects])
        result.scores = torch.tensor([found[NAMES[o["category_id"]]] for o in objects])
        evaluator.process([record], [{"instances": result}])
    return evaluator.evaluate()["bbox"]


@pytest.mark.parametrize("categories", [CATEGORIES, OTHER_ORDER, [(8, "dog"), (3, "cat")]])
def test_categories_in_another_order_are_evaluated_by_name(categories: list, tmp_path: Path) -> None:
    name, file, folder = entry(write_own(tmp_path, "b", categories))
    cfg = config([[name, file, folder]], "DATASETS.TEST", (name,), "OUTPUT_DIR", str(tmp_path))
    result = evaluate(cfg, name, {"cat": 0.9})
    assert result["AP-cat"] == pytest.approx(100) and result["AP-dog"] == 0
    assert result["AP"] == pytest.approx(100 / len([name for _, name in categories if name in NAMES]))
    written = json.loads((tmp_path / "inference" / name / "coco_instances_results.json").read_text())
    assert {entry["category_id"] for entry in written} == {key for key, name in categories if name == "cat"}
    if "bird" not in dict((name, key) for key, name in categories):  # what is found of it does not count
        assert len(MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id) == 3


def test_the_file_of_an_earlier_run_that_got_other_categories_is_refused(tmp_path: Path) -> None:
    name, file, folder = entry(write_own(tmp_path, "c", [(1, "cat"), (2, "bird")]), ("cat", "dog"))
    config([[name, file, folder]], names=("cat", "dog"))
    with pytest.raises(ValueError, match=r"has objects of the categories bird, which are none of the model's classes"):
        DatasetCatalog.get(name)


def test_files_that_train_together_have_the_same_classes(tmp_path: Path) -> None:
    first = own(tmp_path, content([["cat"]]))
    turned = own(tmp_path, content([["cat"]], ("bird", "dog", "cat")), "b")
    assert check_same_classes([first, turned]) == [*NAMES]
    for names, told in (((*NAMES, "fox"), "b.json also has fox"), (NAMES[:2], "b.json lacks bird")):
        with pytest.raises(ValueError, match=f"{told}, compared with the classes of .*a.json"):
            check_same_classes([first, own(tmp_path, content([["cat"]], names), "b")])


def test_tests_may_have_fewer_categories_but_no_objects_of_others(tmp_path: Path) -> None:
    def match(per_image: list[list[str]], names: tuple[str, ...]) -> list[str]:
        return match_classes(own(tmp_path, content(per_image, names), "t", "--test-json"), NAMES)

    assert match([["cat"]], NAMES) == []
    (note,) = match([["cat"]], ("cat", "dog"))
    assert "t.json: it does not list bird: what the model finds of these does not count" in note
    unused, order = match([["cat"]], ("dog", "cat", "bird", "fox"))
    assert "categories fox have no objects and are left out" in unused and "matched by name" in order
    with pytest.raises(ValueError, match=r"categories Cat, which are none of .*did you mean 'cat'\? Rename"):
        match([["Cat"]], ("Cat", "dog"))
    with pytest.raises(ValueError, match=r"its categories \(fox\) are none of the model's classes"):
        match([[]], ("fox",))
    crowd = content([["cat"], ["fox"]], ("cat", "fox"))
    crowd["annotations"][1]["iscrowd"] = 1  # the loader meets it as well
    with pytest.raises(ValueError, match="categories fox"):
        match_classes(own(tmp_path, crowd, "t"), NAMES)


@pytest.mark.parametrize(
    "names, told",
    [(("cat", "cat"), "several categories are called cat"), (("cat", " "), "empty or not printable: ' '")],
)
def test_names_that_cannot_be_those_of_classes_are_refused(names: tuple[str, ...], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"--train-json .*a.json: .*{told}"):
        own(tmp_path, content([["cat"]], names))


def test_files_are_read_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--train-json .*a.json: the file has no categories"):
        own(tmp_path, content([["cat"]]) | {"categories": []})
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf{}")
    needs = read_needs(load_config(""), train=True)
    with pytest.raises(ValueError, match=r"--test-json: .*b.json begins with a byte order mark"):
        read_own_file("--test-json", str(tmp_path / "b.json"), str(tmp_path), needs)
    windows = json.dumps(content([["cat"]]), indent=1).replace("\n", "\r\n")
    (tmp_path / "c.json").write_bytes(windows.encode())
    assert read_own_file("--test-json", str(tmp_path / "c.json"), str(tmp_path), needs._replace(masks=False)).names


class TestSplit:
    def test_divides_in_the_same_way_whatever_the_order(self, tmp_path: Path) -> None:
        whole = content([["cat"], ["dog"], [], ["cat", "bird"], ["bird"], ["dog"], ["cat"], [], ["cat"], []])
        whole["annotations"][0]["iscrowd"] = 1
        turned = whole | {key: whole[key][::-1] for key in ("images", "annotations", "categories")}
        one, other = (split_file(own(tmp_path, data), 0.7) for data in (whole, turned))
        ids = [{image["id"] for image in part["images"]} for part in (one.train, one.test)]
        assert [{image["id"] for image in part["images"]} for part in (other.train, other.test)] == ids
        assert not ids[0] & ids[1] and ids[0] | ids[1] == set(range(1, 11))  # empty images too
        assert [len(part) for part in ids] == [7, 3]
        parts = one.train["annotations"] + one.test["annotations"]
        assert sorted(a["id"] for a in parts) == [a["id"] for a in whole["annotations"]]  # the crowd too
        assert all(a["image_id"] in ids[0] for a in one.train["annotations"])
        assert one.train["licenses"] == ["kept"] and one.test["categories"] == whole["categories"]

    def test_every_class_is_in_both_parts_where_possible(self, tmp_path: Path) -> None:
        per_image = [["cat"]] * 30 + [["dog"], ["cat", "dog"]] + [["bird"]]
        split = split_file(own(tmp_path, content(per_image)), 0.9)
        names = {number: name for number, name in enumerate(NAMES, 1)}
        found = [{names[a["category_id"]] for a in part["annotations"]} for part in (split.train, split.test)]
        assert found[0] == {"cat", "dog", "bird"} and found[1] == {"cat", "dog"}
        assert split.only_in_train == ["bird"] and split.only_in_test == []
        assert len(split.train["images"]) == 30

    @pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
    def test_no_part_is_empty(self, fraction: float, tmp_path: Path) -> None:
        split = split_file(own(tmp_path, content([["cat"], ["dog"], []])), fraction)
        assert split.train["images"] and split.test["images"]
        with pytest.raises(ValueError, match="--split: .*a.json has 1 image, which cannot be divided"):
            split_file(own(tmp_path, content([["cat"]])), fraction)

    def test_an_image_that_is_listed_twice_is_not_in_both_parts(self, tmp_path: Path) -> None:
        data = content([["cat"]] * 6)
        for image in data["images"]:
            image["file_name"] = f"{image['id'] // 2}.png"
        split = split_file(own(tmp_path, data), 0.5)
        train, test = ({image["file_name"] for image in part["images"]} for part in (split.train, split.test))
        assert not train & test


class TestKeypoints:
    def read(self, folder: Path, **category: Any) -> Any:
        return read_keypoints([own(folder, content([[]], ("person",), **category))])

    def test_come_from_the_category(self, tmp_path: Path) -> None:
        points = ["nose", "left_eye", "right_eye"]
        found = self.read(tmp_path, keypoints=points)
        assert found.names == (*points,) and found.flip_map == (("left_eye", "right_eye"),) and found.sigmas == ()
        with pytest.raises(ValueError, match="have no tolerances for COCO's evaluation"):
            check_sigmas(found, [])
        check_sigmas(found, [0.1, 0.1, 0.1])
        found = self.read(tmp_path, keypoints=["tip", "a", "b"], flip_map=[["a", "b"]], sigmas=[0.1, 0.2, 0.3])
        assert found.flip_map == (("a", "b"),) and found.sigmas == (0.1, 0.2, 0.3)
        check_sigmas(found, [])

    @pytest.mark.parametrize(
        "category, told",
        [
            ({}, 'no category has a list "keypoints"'),
            ({"keypoints": ["a", "a"]}, "must be a list of names that differ"),
            ({"keypoints": ["a", "b"], "flip_map": [["a"]]}, "must be a list of pairs"),
            ({"keypoints": ["a", "b"], "flip_map": [["a", "c"]]}, "and nothing else"),
            ({"keypoints": ["a", "b"], "sigmas": [0.1]}, '"sigmas" must be 2 numbers above 0'),
        ],
    )
    def test_mistakes_are_named(self, category: dict[str, Any], told: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=told):
            self.read(tmp_path, **category)

    def test_differ_between_files(self, tmp_path: Path) -> None:
        files = [
            own(tmp_path, content([[]], ("x",), keypoints=points), name) for name, points in zip("ab", (["p"], ["q"]))
        ]
        with pytest.raises(ValueError, match=r"b.json, category 'x': its keypoints \(q\).*a.json, category 'x' \(p\)"):
            read_keypoints(files)

    def test_are_in_the_metadata_of_the_training(self, tmp_path: Path) -> None:
        name, file, folder = entry(write_own(tmp_path, "k"), ("cat",))
        opts = ["DATASETS.KEYPOINT_NAMES", ["l", "r"], "DATASETS.KEYPOINT_FLIP_MAP", [["l", "r"]]]
        config([[name, file, folder]], *opts, names=("cat",))
        metadata = MetadataCatalog.get(name)
        assert metadata.keypoint_names == ["l", "r"] and metadata.keypoint_flip_map == [("l", "r")]


class TestSchedule:
    def test_epochs_keep_the_proportions_of_the_row(self) -> None:
        from dcn_d2 import model_zoo

        cfg = model_zoo.get_config("faster_rcnn_R_50_FPN_1x_mdconv_c3-c5")
        line = set_epochs(cfg, 12, 117267)  # COCO's images with objects
        assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.CHECKPOINT_PERIOD) == (87951, (58634, 80622), 7330)
        assert cfg.SOLVER.WARMUP_ITERS == 500 and line.startswith(
            "12 epochs of 117267 images, 16 at a time: SOLVER.MAX_ITER"
        )

    def test_a_few_images_do_not_make_hundreds_of_checkpoints(self) -> None:
        cfg = load_config("", ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.STEPS", (20000, 30000), "TEST.EVAL_PERIOD", 500])
        set_epochs(cfg, 100, 6, given=["SOLVER.WARMUP_ITERS"])
        assert cfg.SOLVER.MAX_ITER == 300 and cfg.SOLVER.STEPS == (150, 225) and cfg.SOLVER.WARMUP_ITERS == 1000
        assert cfg.SOLVER.CHECKPOINT_PERIOD == cfg.TEST.EVAL_PERIOD == 25
        set_epochs(cfg, 0.1, 6)
        assert cfg.SOLVER.MAX_ITER == 1 and cfg.SOLVER.STEPS == () and cfg.SOLVER.WARMUP_ITERS == 0
        assert cfg.SOLVER.CHECKPOINT_PERIOD == 1

    def test_images_without_objects_do_not_count_where_the_training_leaves_them_out(self, tmp_path: Path) -> None:
        data = content([["cat"], [], ["dog"]])
        data["annotations"][1]["iscrowd"] = 1
        cfg = load_config("")
        assert count_training_images([own(tmp_path, data)], cfg) == 1
        cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
        assert count_training_images([own(tmp_path, data)], cfg) == 3
        assert "each of the 100 images is seen 6,400 times" in describe_epochs(cfg, 100)
