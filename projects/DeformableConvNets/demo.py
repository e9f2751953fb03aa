#!/usr/bin/env python
# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Draws what a trained detector finds, and where its deformable layers look to find it.

For every image two pictures are written: NAME_detections.png, with classes, scores and masks, beside the ground truth
where the data set has one, and NAME_sampling.png: for the centres of the most confident detections, the locations that
the last three deformable layers of each backbone stage sample, from the stage of the FPN level that the detection was
pooled from upwards. Of an exported model (--model) there are only the first: it does not show its layers.

Of images with the same name in different folders the later ones get a number, NAME_2. Only pictures that an earlier run
wrote are replaced. An image that cannot be read is left out and named at the end; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dcn_d2.command_line.demo import parse_arguments
from dcn_d2.prediction.draw import (
    DETECTION_COLOR,
    compose,
    display_image,
    draw_boxes,
    draw_detections,
    enlarge,
    resize_mask,
)
from dcn_d2.quiet import silence_detectron2_warnings

if TYPE_CHECKING:  # the imports that take seconds happen after the arguments are known to be right
    import numpy as np
    from detectron2.config import CfgNode
    from detectron2.structures import Instances

    from dcn_d2.engine import DCNPredictor
    from dcn_d2.outputs import PictureFolder
    from dcn_d2.visualizer import SamplingRecord

silence_detectron2_warnings()

PANEL, SMALL_PANEL = 640, 420  # pixels of a panel's longer side
TRUTH_COLOR = (0.55, 0.9, 0.45)


def list_images(args: argparse.Namespace, cfg: CfgNode) -> list[dict[str, Any]]:
    """Gives data set dictionaries; for images and videos of --input they hold the file name only."""
    from detectron2.data import DatasetCatalog

    from dcn_d2.engine import check_data_sets
    from dcn_d2.prediction.sources import find_sources

    if args.input:
        sources = find_sources(args.input, args.images, args.output).items
        return [{"file_name": source.path, "is_video": source.video} for source in sources]
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
    from dcn_d2.prediction import records

    return records.class_names(cfg, args.dataset)


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
    image_bgr = sample["pixels"] if "pixels" in sample else read_image(sample["file_name"])
    check_image_size(sample, image_bgr)
    with record_sampling(predictor.model) as record:  # of an exported model there is nothing to record
        found = predictor(sample.get("pixels", sample["file_name"]))["instances"].to("cpu")
    found = found[found.scores >= args.confidence]
    image = display_image(image_bgr, args.stretch_contrast)
    large = enlarge(image, PANEL)
    columns = [[draw_detections(large, found, names.model)]]
    titles = [f"detections: {len(found)} with a score of at least {args.confidence:.0%}"]
    if "annotations" in sample:
        columns.insert(0, [draw_truth(large, sample, names.truth)])
        titles.insert(0, f"ground truth: {len(sample['annotations'])}")
    print(f"wrote {folder.write(f'{stem}_detections.png', compose(columns, titles))}")
    if args.model:
        return
    columns = draw_sampling(image, predictor, record, found, args.points) if record.layers else []
    scores = sorted(found.scores.tolist(), reverse=True)
    titles = [f"sampling for the detection of {score:.1%}" for score, column in zip(scores, columns) if column]
    if columns := [column for column in columns if column]:
        print(f"wrote {folder.write(f'{stem}_sampling.png', compose(columns, titles))}")
    else:
        print(f"{stem}: no sampling to draw ({len(record.layers)} deformable layers, {len(found)} detections)")


def frames_of(sample: dict[str, Any], stem: str, every: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Gives an image, or every `every`-th frame of a video, each with the name for its pictures."""
    from dcn_d2.outputs import frame_name
    from dcn_d2.prediction.videos import read_frames

    if not sample.get("is_video"):
        yield sample, stem
        return
    for number, pixels in read_frames(sample["file_name"], lambda number: number % every == 0):
        if pixels is not None:
            yield sample | {"pixels": pixels}, frame_name(stem, number)


def prepare(args: argparse.Namespace) -> tuple[list[dict[str, Any]], PictureFolder, DCNPredictor, Names]:
    """Gives the images, the folder for their pictures, the predictor, and the names of classes."""
    from dcn_d2.outputs import PictureFolder
    from dcn_d2.prediction.model import build_predictor, read_config

    cfg = read_config(args)
    samples = list_images(args, cfg)
    read = [*(sample["file_name"] for sample in samples), args.config_file or "", cfg.MODEL.WEIGHTS]
    folder = PictureFolder(args.output, read)
    predictor = build_predictor(args, cfg, "demo.py")
    if args.model:
        print("no sampling to draw: an exported model does not show its layers; --config-file and --weights do")
    return samples, folder, predictor, find_names(args, predictor)


def main(arguments: list[str] | None = None) -> None:
    """Runs the script; exits with 1 and a message if something was not drawn."""
    args = parse_arguments(__doc__, arguments)
    try:
        draw_all(args)
    except KeyboardInterrupt:
        print("demo.py: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def draw_all(args: argparse.Namespace) -> None:
    """Draws all images; ends the script with a message if something was not drawn."""
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
            for image, name in frames_of(sample, stem, args.frames):
                draw_image(image, name, predictor, folder, names, args)
        except (OSError, ValueError) as error:
            reason = one_line(error)
            problems.append(reason if file in reason else f"{file}: {reason}")
    if problems:
        sys.exit("\n".join([f"demo.py: {len(problems)} of {len(files)} image(s) not drawn:", *problems]))


if __name__ == "__main__":
    main()
