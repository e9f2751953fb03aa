#!/usr/bin/env python
# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Draws what a trained detector finds, and where its deformable layers look to find it.

For every image two pictures are written: NAME_detections.png (beside the ground truth where the data set has one) and
NAME_sampling.png: for the centres of the most confident detections, the locations that the last three deformable layers
of each backbone stage sample, from the stage of the FPN level that the detection was pooled from upwards.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcn_d2.quiet import silence_detectron2_warnings

if TYPE_CHECKING:  # the imports that take seconds happen after the arguments are known to be right
    import numpy as np
    from detectron2.config import CfgNode
    from detectron2.engine import DefaultPredictor
    from detectron2.structures import Instances

    from dcn_d2.visualizer import SamplingRecord

silence_detectron2_warnings()

PANEL, SMALL_PANEL = 640, 420  # pixels of a panel's longer side
TRUTH_COLOR, DETECTION_COLOR = (0.55, 0.9, 0.45), (1.0, 0.75, 0.2)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ``--help`` needs neither torch nor Detectron2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="a YAML of configs/ or examples/")
    parser.add_argument("--weights", metavar="FILE", help="checkpoint; MODEL.WEIGHTS of the config by default")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--dataset", help="a registered data set; the first of DATASETS.TEST by default")
    source.add_argument("--input", nargs="+", metavar="IMAGE", help="image files (another option ends the list)")
    parser.add_argument("--output", default="output/pictures", metavar="FOLDER", help="where the pictures go")
    parser.add_argument("--max-images", type=int, default=8, metavar="N", help="of a data set, how many to draw")
    parser.add_argument("--points", type=int, default=3, metavar="N", help="detections whose sampling is drawn")
    parser.add_argument("--confidence", type=float, default=0.5, metavar="SCORE", help="lowest score that is drawn")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes to the config")
    return parser.parse_args(arguments)


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

    if args.input:
        return [{"file_name": name} for name in args.input]
    return DatasetCatalog.get(args.dataset or cfg.DATASETS.TEST[0])[: args.max_images]


def read_bgr(file_name: str) -> np.ndarray:
    import cv2

    image = cv2.imread(file_name, cv2.IMREAD_COLOR)
    if image is None:
        raise FileNotFoundError(f"{file_name} is missing or no image that OpenCV can read")
    return image


def display_image(image_bgr: np.ndarray) -> np.ndarray:
    """Gives RGB with its contrast stretched, for the eye only."""
    import numpy as np
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.autocontrast(Image.fromarray(image_bgr[:, :, ::-1].copy()), cutoff=(1, 0.5)))


def enlarge(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes an image so that its longer side has ``size`` pixels."""
    import cv2

    scale = size / max(image.shape[:2])
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)


def draw_boxes(image: np.ndarray, boxes: Any, color: Any, labels: list[str] | None = None, masks: Any = None) -> Any:
    from detectron2.utils.visualizer import Visualizer

    colors = [color] * len(boxes)
    return (
        Visualizer(image).overlay_instances(boxes=boxes, masks=masks, labels=labels, assigned_colors=colors).get_image()
    )


def draw_truth(image: np.ndarray, sample: dict[str, Any], scale: float) -> np.ndarray:
    import numpy as np
    from detectron2.structures import BoxMode

    annotations = sample["annotations"]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    polygons = [a.get("segmentation") for a in annotations]
    masks = None
    if polygons and all(isinstance(polygon, list) for polygon in polygons):
        masks = [[np.array(part) * scale for part in polygon] for polygon in polygons]
    return draw_boxes(image, np.array(boxes).reshape(-1, 4) * scale, TRUTH_COLOR, masks=masks)


def draw_detections(image: np.ndarray, found: Instances, scale: float) -> np.ndarray:
    labels = [f"{score:.0%}" for score in found.scores.tolist()]
    return draw_boxes(image, found.pred_boxes.tensor.numpy() * scale, DETECTION_COLOR, labels)


def stages_of(predictor: DefaultPredictor, record: SamplingRecord, box: Any) -> list[str]:
    """Gives the stages ("res3") with deformable layers that lead to the FPN level from which a box was pooled.

    That is the level's own stage and, because FPN adds coarser levels to finer ones, those above it.

    Args:
        predictor: its model has a ROI pooler that chooses a level by the box's size; without one all stages count.
        record: of the model's forward pass.
        box: (4,) tensor in pixels of the network's image.
    """
    from detectron2.modeling.poolers import assign_boxes_to_levels
    from detectron2.structures import Boxes

    pooler, level = getattr(getattr(predictor.model, "roi_heads", None), "box_pooler", None), 2
    if pooler is not None:
        assigned = assign_boxes_to_levels(
            [Boxes(box[None])], pooler.min_level, pooler.max_level, pooler.canonical_box_size, pooler.canonical_level
        )
        level = pooler.min_level + int(assigned)
    names = [layer.name for layer in record.layers]
    return [f"res{stage}" for stage in range(level, 6) if any(f".res{stage}." in name for name in names)]


def draw_sampling(
    image: np.ndarray, predictor: DefaultPredictor, record: SamplingRecord, found: Instances, points: int
) -> list[list[np.ndarray]]:
    """Gives one column of panels for each of the most confident detections, one panel for each stage.

    A panel shows the surroundings of the detection's centre: 16 cells of the stage's input a side, where they fit.
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
            side = min(16 * record.padded_size[0] / samples.input_size[0] / scale, *image.shape[:2])
            top, left = (center - side / 2).clip(0, [image.shape[0] - side, image.shape[1] - side]).astype(int)
            part = image[top : top + int(side), left : left + int(side)]
            panel = enlarge(part, SMALL_PANEL)
            zoom = SMALL_PANEL / len(part)
            y, x = (center - (top, left)) * zoom - 0.5
            corner = box.new_tensor([left, top, left, top])
            panel = draw_boxes(panel, ((box - corner) * zoom).numpy()[None], DETECTION_COLOR)
            window = (top * scale, left * scale, (top + len(part)) * scale, (left + len(part)) * scale)
            column.append(draw(panel, record, (y, x), stage, window))
        columns.append(column)
    return columns


def write_columns(path: Path, columns: list[list[np.ndarray]], titles: list[str]) -> None:
    """Writes titled columns of panels, all panels of one size, as one picture."""
    from PIL import Image, ImageDraw, ImageFont

    gap, bar, (height, width) = 12, 34, columns[0][0].shape[:2]
    rows = max(len(column) for column in columns)
    picture = Image.new("RGB", (len(columns) * (width + gap) + gap, bar + rows * (height + gap)), "white")
    for i, (column, title) in enumerate(zip(columns, titles, strict=True)):
        left = gap + i * (width + gap)
        ImageDraw.Draw(picture).text((left, bar / 2), title, "black", ImageFont.load_default(18), anchor="lm")
        for j, panel in enumerate(column):
            picture.paste(Image.fromarray(panel), (left, bar + j * (height + gap)))
    picture.save(path)
    print(f"wrote {path}")


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    from dcn_d2.engine import DCNPredictor
    from dcn_d2.visualizer import record_sampling

    cfg = setup_config(args)
    if not cfg.MODEL.WEIGHTS:
        print("no weights given (--weights FILE): the model is untrained and finds nothing useful", file=sys.stderr)
    predictor = DCNPredictor(cfg, untrained=not cfg.MODEL.WEIGHTS)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    for sample in list_images(args, cfg):
        image_bgr = read_bgr(sample["file_name"])
        with record_sampling(predictor.model) as record:
            found = predictor(image_bgr)["instances"].to("cpu")
        found = found[found.scores >= args.confidence]
        image = display_image(image_bgr)
        large = enlarge(image, PANEL)
        scale = large.shape[0] / image.shape[0]
        stem = Path(sample["file_name"]).stem
        columns = [[draw_detections(large, found, scale)]]
        titles = [f"detections: {len(found)} with a score of at least {args.confidence:.0%}"]
        if "annotations" in sample:
            columns.insert(0, [draw_truth(large, sample, scale)])
            titles.insert(0, f"ground truth: {len(sample['annotations'])}")
        write_columns(output / f"{stem}_detections.png", columns, titles)
        columns = draw_sampling(image, predictor, record, found, args.points) if record.layers else []
        if any(columns):
            scores = sorted(found.scores.tolist(), reverse=True)
            titles = [f"sampling for the detection of {score:.1%}" for score in scores[: len(columns)]]
            write_columns(output / f"{stem}_sampling.png", columns, titles)
        else:
            print(f"{stem}: no sampling to draw ({len(record.layers)} deformable layers, {len(found)} detections)")


if __name__ == "__main__":
    main()
