#!/usr/bin/env python
# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Draws what a trained detector finds, and where its deformable layers look to find it.

For every image two pictures are written: NAME_detections.png, with classes, scores and masks, beside the ground truth
where the data set has one, and NAME_sampling.png: for the centres of the most confident detections, the locations that
the last three deformable layers of each backbone stage sample, from the stage of the FPN level that the detection was
pooled from upwards.

Of images with the same name in different folders the later ones get a number, NAME_2. Only pictures that an earlier run
wrote are replaced. An image that cannot be read is left out and named at the end; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dcn_d2.quiet import silence_detectron2_warnings

if TYPE_CHECKING:  # the imports that take seconds happen after the arguments are known to be right
    import numpy as np
    from detectron2.config import CfgNode
    from detectron2.structures import Instances
    from PIL import Image

    from dcn_d2.engine import DCNPredictor
    from dcn_d2.outputs import PictureFolder
    from dcn_d2.visualizer import SamplingRecord

silence_detectron2_warnings()

PANEL, SMALL_PANEL = 640, 420  # pixels of a panel's longer side
TRUTH_COLOR, DETECTION_COLOR = (0.55, 0.9, 0.45), (1.0, 0.75, 0.2)


def count(least: int) -> Callable[[str], int]:
    """Makes the type of an argument that is a whole number of at least `least`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    parse.__name__ = "whole number"  # argparse's message has this word if the text is not a number
    return parse


def score(text: str) -> float:
    """The type of an argument that is a score: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:  # nan is refused too
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return value


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ``--help`` needs neither torch nor Detectron2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="a YAML of configs/ or examples/")
    parser.add_argument("--weights", metavar="FILE", help="checkpoint; MODEL.WEIGHTS of the config by default")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--dataset", help="a registered data set; the first of DATASETS.TEST by default")
    source.add_argument("--input", nargs="+", metavar="IMAGE", help="image files (another option ends the list)")
    parser.add_argument("--output", default="output/pictures", metavar="FOLDER", help="where the pictures go")
    parser.add_argument("--max-images", type=count(1), default=8, metavar="N", help="of a data set, how many to draw")
    parser.add_argument("--points", type=count(0), default=3, metavar="N", help="detections whose sampling is drawn")
    parser.add_argument("--confidence", type=score, default=0.5, metavar="SCORE", help="lowest score that is drawn")
    parser.add_argument(
        "--stretch-contrast",
        action="store_true",
        help="brighten what is drawn, for dark images as those of microscopes; the model sees the image as it is",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes to the config")
    args = parser.parse_args(arguments)
    if late := [word for word in args.opts if word.startswith("--")]:
        parser.error(f"{late[0]} must come before the first KEY VALUE, {args.opts[0]}")
    if len(args.opts) % 2:
        parser.error(f"KEY VALUE must come in pairs, got {' '.join(args.opts)}")
    return args


def setup_config(args: argparse.Namespace) -> CfgNode:
    """Builds the config from the command line; a config for the GPU runs on the CPU where there is no GPU."""
    from dcn_d2.engine import fit_to_machine, load_config

    cfg = load_config(args.config_file, args.opts)
    if args.weights is not None:
        cfg.MODEL.WEIGHTS = args.weights
    fit_to_machine(cfg)
    return cfg


def list_images(args: argparse.Namespace, cfg: CfgNode) -> list[dict[str, Any]]:
    """Gives data set dictionaries; for image files they hold the file name only."""
    from detectron2.data import DatasetCatalog

    from dcn_d2.engine import check_data_sets

    if args.input:
        # A file that is named twice is drawn once.
        return [{"file_name": name} for name in {Path(name).resolve(): name for name in args.input}.values()]
    if not (args.dataset or cfg.DATASETS.TEST):
        raise ValueError("the config names no DATASETS.TEST: say what to draw with --input or --dataset")
    name = args.dataset or cfg.DATASETS.TEST[0]
    check_data_sets([name])
    samples = DatasetCatalog.get(name)  # a list, or what has a length and is read by numbers
    samples = [samples[index] for index in range(min(len(samples), args.max_images))]
    if not samples:
        raise ValueError(f"data set {name} has no images")
    if any("file_name" not in sample for sample in samples):
        raise ValueError(f"data set {name} has images without 'file_name'")
    return samples


class Names(NamedTuple):
    """Names of the classes of the model, and of the data set that is drawn, which may have others."""

    model: list[str]
    truth: list[str]


def find_names(args: argparse.Namespace, predictor: DCNPredictor) -> Names:
    """Gives the names of classes for detections and for ground truth."""
    from detectron2.data import MetadataCatalog

    cfg = predictor.cfg
    model = predictor.class_names or class_names(args, cfg)
    drawn = "" if args.input else args.dataset or cfg.DATASETS.TEST[0]
    return Names(model, list(MetadataCatalog.get(drawn).get("thing_classes", [])) or model if drawn else model)


def class_names(args: argparse.Namespace, cfg: CfgNode) -> list[str]:
    """Gives the names of the model's classes, numbers where the data set does not tell them."""
    from detectron2.data import MetadataCatalog

    retina = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    number = cfg.MODEL.RETINANET.NUM_CLASSES if retina else cfg.MODEL.ROI_HEADS.NUM_CLASSES
    for data_set in (args.dataset, *cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        names = MetadataCatalog.get(data_set).get("thing_classes", []) if data_set else []
        if len(names) == number:
            return list(names)
    return [f"class {i}" for i in range(number)]


def display_image(image_bgr: np.ndarray, stretch_contrast: bool) -> np.ndarray:
    """Gives RGB, for the eye only; with a stretched contrast colours keep their tone."""
    import numpy as np
    from PIL import Image, ImageOps

    image = Image.fromarray(image_bgr[:, :, ::-1].copy())
    if stretch_contrast:
        image = ImageOps.autocontrast(image, cutoff=(1, 0.5), preserve_tone=True)
    return np.asarray(image)


def enlarge(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes an image so that its longer side has ``size`` pixels, and the other one at least one."""
    import cv2

    height, width = (max(1, round(side * size / max(image.shape[:2]))) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)


def draw_boxes(image: np.ndarray, boxes: Any, color: Any, labels: list[str] | None = None, masks: Any = None) -> Any:
    """Draws (x0, y0, x1, y1) boxes in pixels of `image` on a copy of it, all in one colour."""
    from detectron2.utils.visualizer import Visualizer

    colors = [color] * len(boxes)
    if labels is not None:
        labels = [label.replace("$", r"\$") for label in labels]  # it would begin a formula
    drawn = Visualizer(image).overlay_instances(boxes=boxes, masks=masks, labels=labels, assigned_colors=colors)
    return drawn.get_image()


def draw_truth(image: np.ndarray, sample: dict[str, Any], names: list[str]) -> np.ndarray:
    """Draws the annotations of ``sample``, with the names of their classes if there is more than one.

    Masks are drawn where there are any: an object without one, or with an empty one, has its box alone.
    """
    import numpy as np
    from detectron2.structures import BoxMode
    from detectron2.utils.visualizer import GenericMask

    size = sample["height"], sample["width"]
    scale = np.divide(image.shape[1::-1], size[::-1])  # (x, y)
    boxes, labels = [], []
    masks: list[Any] = []
    for number, annotation in enumerate(sample["annotations"]):
        try:
            box = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
            if not np.isfinite(box).all():
                raise ValueError(f"its 'bbox' is {annotation['bbox']}")
            boxes.append(np.clip(box, 0, [*size[::-1], *size[::-1]]))
            shape = annotation.get("segmentation") or []
            if isinstance(shape, list):
                masks.append([(np.reshape(part, (-1, 2)) * scale).reshape(-1) for part in shape])
            else:
                masks.append(resize_mask(GenericMask(shape, *size).mask, size, image.shape[:2]))
            labels.append(names[annotation["category_id"]])
        except (AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{sample['file_name']}: annotation {number} cannot be drawn: {reason}") from error
    scaled = np.array(boxes, dtype=float).reshape(-1, 4) * np.tile(scale, 2)
    return draw_boxes(image, scaled, TRUTH_COLOR, labels if len(names) > 1 else None, masks)


def resize_mask(mask: np.ndarray, expected: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Gives a mask, whose (height, width) must be ``expected``, another ``size``."""
    import cv2

    if mask.shape != expected:
        raise ValueError(f"the mask is {mask.shape} and not {expected}, (height, width)")
    return cv2.resize(mask.astype("uint8"), size[::-1], interpolation=cv2.INTER_NEAREST)


def draw_detections(image: np.ndarray, found: Instances, names: list[str]) -> np.ndarray:
    """Draws boxes with classes and scores, and masks where there are any; `found` may be of another resolution."""
    import numpy as np

    scale = np.divide(image.shape[1::-1], found.image_size[::-1])
    classes, scores = found.pred_classes.tolist(), found.scores.tolist()
    labels = [f"{names[index]} {score:.0%}" for index, score in zip(classes, scores)]
    masks = None
    if found.has("pred_masks"):
        masks = [resize_mask(mask, found.image_size, image.shape[:2]) for mask in found.pred_masks.numpy()]
    boxes = found.pred_boxes.tensor.numpy() * np.tile(scale, 2)
    return draw_boxes(image, boxes, DETECTION_COLOR, labels, masks)


def stages_of(predictor: DCNPredictor, record: SamplingRecord, box: Any) -> list[str]:
    """Gives the stages ("res3") with deformable layers that lead to the FPN level from which a box was pooled.

    That is the level's own stage and, because FPN adds coarser levels to finer ones, those above it.

    Args:
        predictor: its model has a ROI pooler that chooses a level by the box's size; without one all stages count.
        record: of the model's forward pass.
        box: (4,) tensor in pixels of the network's image.
    """
    from detectron2.structures import Boxes

    from dcn_d2.modeling import assign_levels

    pooler, level = getattr(getattr(predictor.model, "roi_heads", None), "box_pooler", None), 2
    if pooler is not None:
        level = pooler.min_level + int(assign_levels(pooler, [Boxes(box[None])]))
    names = [layer.name for layer in record.layers]
    return [f"res{stage}" for stage in range(level, 6) if any(f".res{stage}." in name for name in names)]


def draw_sampling(
    image: np.ndarray, predictor: DCNPredictor, record: SamplingRecord, found: Instances, points: int
) -> list[list[np.ndarray]]:
    """Gives one column of panels for each of the most confident detections, one panel for each stage.

    A panel shows what is around the detection's centre, 16 cells of the stage's input a side, or less in a small image.
    """
    from dcn_d2.visualizer import SamplingAnnotator

    draw = SamplingAnnotator()
    scale = record.image_size[0] / image.shape[0]
    columns = []
    for i in found.scores.argsort(descending=True)[:points].tolist():
        box = found.pred_boxes.tensor[i]
        center = found.pred_boxes.get_centers()[i].flip(0).numpy()
        column = []
        for stage in stages_of(predictor, record, box * scale):
            samples = record.layers[record.find(stage)]
            cells = 16 * record.padded_size[0] / samples.input_size[0] / scale
            side = max(1, int(min(cells, *image.shape[:2])))
            top, left = (center - side / 2).clip(0, [image.shape[0] - side, image.shape[1] - side]).astype(int)
            part = image[top : top + side, left : left + side]
            panel = enlarge(part, SMALL_PANEL)
            zoom = SMALL_PANEL / len(part)
            y, x = (center - (top, left)) * zoom - 0.5
            corner = box.new_tensor([left, top, left, top])
            panel = draw_boxes(panel, ((box - corner) * zoom).numpy()[None], DETECTION_COLOR)
            window = (top * scale, left * scale, (top + len(part)) * scale, (left + len(part)) * scale)
            column.append(draw(panel, record, (y, x), stage, window))
        columns.append(column)
    return columns


def compose(columns: list[list[np.ndarray]], titles: list[str]) -> Image.Image:
    """Makes one picture of titled columns of panels, all panels of one size."""
    from PIL import Image, ImageDraw, ImageFont

    gap, bar, font, (height, width) = 12, 34, ImageFont.load_default(18), columns[0][0].shape[:2]
    width = max(width, *(math.ceil(font.getlength(title)) for title in titles))
    rows = max(len(column) for column in columns)
    picture = Image.new("RGB", (len(columns) * (width + gap) + gap, bar + rows * (height + gap)), "white")
    for i, (column, title) in enumerate(zip(columns, titles, strict=True)):
        left = gap + i * (width + gap)
        ImageDraw.Draw(picture).text((left, bar / 2), title, "black", font, anchor="lm")
        for j, panel in enumerate(column):
            picture.paste(Image.fromarray(panel), (left, bar + j * (height + gap)))
    return picture


def draw_image(
    sample: dict[str, Any],
    stem: str,
    predictor: DCNPredictor,
    folder: PictureFolder,
    names: Names,
    args: argparse.Namespace,
) -> None:
    """Draws and writes the pictures of one image; raises OSError or ValueError with the file's name if it cannot."""
    from detectron2.data.detection_utils import check_image_size

    from dcn_d2.data.images import read_image
    from dcn_d2.visualizer import record_sampling

    for kind in ("detections", "sampling"):  # before the work is done
        folder.path_of(f"{stem}_{kind}.png")
    image_bgr = read_image(sample["file_name"])
    check_image_size(sample, image_bgr)
    with record_sampling(predictor.model) as record:
        found = predictor(sample["file_name"])["instances"].to("cpu")
    found = found[found.scores >= args.confidence]
    image = display_image(image_bgr, args.stretch_contrast)
    large = enlarge(image, PANEL)
    columns = [[draw_detections(large, found, names.model)]]
    titles = [f"detections: {len(found)} with a score of at least {args.confidence:.0%}"]
    if "annotations" in sample:
        columns.insert(0, [draw_truth(large, sample, names.truth)])
        titles.insert(0, f"ground truth: {len(sample['annotations'])}")
    print(f"wrote {folder.write(f'{stem}_detections.png', compose(columns, titles))}")
    columns = draw_sampling(image, predictor, record, found, args.points) if record.layers else []
    scores = sorted(found.scores.tolist(), reverse=True)
    titles = [f"sampling for the detection of {score:.1%}" for score, column in zip(scores, columns) if column]
    if columns := [column for column in columns if column]:
        print(f"wrote {folder.write(f'{stem}_sampling.png', compose(columns, titles))}")
    else:
        print(f"{stem}: no sampling to draw ({len(record.layers)} deformable layers, {len(found)} detections)")


def prepare(args: argparse.Namespace) -> tuple[list[dict[str, Any]], PictureFolder, DCNPredictor, Names]:
    """Gives the images, the folder for their pictures, the predictor, and the names of classes."""
    from dcn_d2.engine import DCNPredictor
    from dcn_d2.outputs import PictureFolder

    cfg = setup_config(args)
    samples = list_images(args, cfg)
    read = [*(sample["file_name"] for sample in samples), args.config_file, cfg.MODEL.WEIGHTS]
    folder = PictureFolder(args.output, read)
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("no weights are given: --weights FILE names those of a trained model")
    predictor = DCNPredictor(cfg)
    return samples, folder, predictor, find_names(args, predictor)


def main(arguments: list[str] | None = None) -> None:
    """Runs the script; exits with 1 and a message if something was not drawn."""
    args = parse_arguments(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    from dcn_d2.engine import MISTAKES, one_line
    from dcn_d2.outputs import unique_stems

    try:
        samples, folder, predictor, names = prepare(args)
    except (*MISTAKES, RuntimeError) as error:
        sys.exit(f"demo.py: {one_line(error)}")
    problems = []
    files = [sample["file_name"] for sample in samples]
    for sample, file, stem in zip(samples, files, unique_stems(files)):
        if stem != Path(file).stem:
            print(f"{file}: another image has the same name, the pictures of this one begin with {stem}")
        try:
            draw_image(sample, stem, predictor, folder, names, args)
        except (OSError, ValueError) as error:
            reason = one_line(error)
            problems.append(reason if file in reason else f"{file}: {reason}")
    if problems:
        sys.exit("\n".join([f"demo.py: {len(problems)} of {len(files)} image(s) not drawn:", *problems]))


if __name__ == "__main__":
    main()
