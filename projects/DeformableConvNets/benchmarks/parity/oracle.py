# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""MMDetection's side: builds its models, gives them weights that matter, saves them as it does, and runs them.

Needs mmdet 3.3 and mmcv 2.1 with its CPU operators. Nothing of dcn_d2 is used here.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import mmdet
import numpy as np
import torch
from mmcv.transforms import Compose
from mmdet.models.task_modules.samplers import RandomSampler
from mmdet.registry import MODELS, TRANSFORMS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.runner.checkpoint import get_state_dict, save_checkpoint, weights_to_cpu
from mmengine.structures import InstanceData
from torch import Tensor, nn

from . import pooling, weights
from .compare import Outputs
from .rows import ROWS
from .weights import evenly_spaced_indices, is_centred, seeded_tensor, spread

POOLINGS: dict[str, Callable[..., Tensor]] = {"original": pooling.original, "aligned": pooling.aligned}


def load_config(row: str) -> Config:
    """MMDetection's own config of a row, without the addresses of ImageNet weights."""
    register_all_modules()
    config = Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / f"{ROWS[row]}.py")
    config.model.backbone.pop("init_cfg", None)
    return config


def build(config: Config) -> nn.Module:
    """The detector of a config, on CPU and in evaluation mode."""
    return MODELS.build(config.model).eval()


@contextlib.contextmanager
def pooled_by(operator: str) -> Iterator[None]:
    """Makes mmcv's deformable RoI pooling layers compute on CPU: "original" as before mmdet 2.3, "aligned" as since."""

    def pool(
        feature: Tensor,
        rois: Tensor,
        offset: Tensor | None,
        size: tuple[int, int],
        scale: float,
        ratio: int,
        gamma: float,
    ) -> Tensor:
        assert size[0] == size[1] and ratio == 0
        return POOLINGS[operator](feature, rois, offset, size[0], scale, gamma).contiguous()

    import mmcv.ops  # noqa: F401  its attribute deform_roi_pool is the function and hides the module

    with mock.patch.object(sys.modules["mmcv.ops.deform_roi_pool"], "deform_roi_pool", pool):
        yield


def photograph(name: str) -> np.ndarray:
    """One of scikit-image's photographs, (H, W, 3) BGR as MMDetection reads it."""
    import cv2

    spec = find_spec("skimage")
    assert spec and spec.submodule_search_locations
    for path in Path(spec.submodule_search_locations[0], "data").glob(f"{name}.*"):
        pixels = cv2.imread(str(path))
        assert pixels is not None
        return pixels
    raise FileNotFoundError(f"scikit-image has no photograph {name!r}")


def prepare(image: np.ndarray, scale: tuple[int, int]) -> dict[str, Any]:
    """Runs MMDetection's test pipeline, all but the reading of the file, over a BGR image.

    Args:
        image: (H, W, 3) uint8.
        scale: shortest and longest side.
    """
    pipeline = Compose(
        [
            TRANSFORMS.build({"type": "Resize", "scale": scale[::-1], "keep_ratio": True}),
            TRANSFORMS.build({"type": "PackDetInputs", "meta_keys": ("ori_shape", "img_shape", "scale_factor")}),
        ]
    )
    height, width = image.shape[:2]
    data = pipeline({"img": image, "img_shape": (height, width), "ori_shape": (height, width)})
    return {"inputs": [data["inputs"]], "data_samples": [data["data_samples"]]}


def calibrate(model: nn.Module, data: dict[str, Any], seed: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Fills a model with seeded weights; measures gains and centres in one pass over an image.

    Each layer is measured and scaled when data first reach it, so that those behind it see what they will see.

    Returns:
        What `weights.seeded_state_dict` needs to make the same state dict again.
    """
    gains: dict[str, float] = {}
    centres: dict[str, np.ndarray] = {}
    state = model.state_dict()
    for name, value in state.items():
        value.copy_(torch.from_numpy(seeded_tensor(name, value.shape, seed)).view(value.shape))

    def measure(layer: str, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        weight, bias = f"{layer}.weight", f"{layer}.bias"
        if weight in gains or not output.numel():
            return None
        bias_value = state.get(bias)
        shape = [1, -1] + [1] * (output.dim() - 2)
        plain = output if bias_value is None else output - bias_value.view(shape)
        other = [0, *range(2, output.dim())]
        centred = is_centred(layer)
        mean = plain.mean(other, keepdim=True)
        deviation = (plain - mean if centred else plain).square().mean().sqrt()
        gains[weight] = float(np.float32(spread(layer) / max(float(deviation), 1e-6)))
        state[weight].copy_(torch.from_numpy(seeded_tensor(weight, state[weight].shape, seed, gains[weight])))
        plain = plain * gains[weight]
        if centred:
            centres[bias] = weights.mean(layer) - (mean * gains[weight]).flatten().numpy()
        if bias_value is None:
            return plain
        bias_value.copy_(torch.from_numpy(seeded_tensor(bias, bias_value.shape, seed, 1.0, centres.get(bias))))
        return plain + bias_value.view(shape)

    hooks = [
        module.register_forward_hook(functools.partial(measure, name))
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.dim() > 1
    ]
    with torch.no_grad():
        predict(model, data)
    for hook in hooks:
        hook.remove()
    return gains, centres


def predict(model: Any, data: dict[str, Any]) -> Outputs:
    """Runs a model over one prepared image, as in its test loop.

    Returns:
        Arrays named as `compare.compare` wants them. Boxes and masks are at the size of the original image, proposals
        at that of the network's input.
    """
    found: Outputs = {}

    def keep_features(module: nn.Module, inputs: Any, output: Any) -> None:
        found.update({f"p{level}": value[0].detach().numpy() for level, value in enumerate(output, 2)})

    predict_proposals = model.rpn_head.predict

    def keep_proposals(*arguments: Any, **keywords: Any) -> Any:
        results = predict_proposals(*arguments, **keywords)
        found["proposals"] = results[0].bboxes.detach().numpy()
        return results

    hook = model.neck.register_forward_hook(keep_features)
    samples = [sample.clone() for sample in data["data_samples"]]
    prepared = model.data_preprocessor({"inputs": list(data["inputs"]), "data_samples": samples}, False)
    found["input"] = prepared["inputs"][0].numpy()
    with mock.patch.object(model.rpn_head, "predict", keep_proposals), torch.no_grad():
        (result,) = model(**prepared, mode="predict")
    hook.remove()
    instances = result.pred_instances
    found.update(boxes=instances.bboxes.numpy(), scores=instances.scores.numpy(), labels=instances.labels.numpy())
    if "masks" in instances:
        found["masks"] = instances.masks.numpy().astype(bool)
    return found


def save(model: nn.Module, path: Path, *, old_offset_names: bool = False) -> None:
    """Saves a model as MMDetection's runner does.

    Args:
        model: the detector.
        path: where to; the folder exists.
        old_offset_names: calls offset branches `conv2_offset` as the files of January 2020 may do.
    """
    state = weights_to_cpu(get_state_dict(model))
    if old_offset_names:
        state = type(state)((name.replace("conv2.conv_offset", "conv2_offset"), value) for name, value in state.items())
    meta = {"mmdet_version": "2.0.0", "epoch": 12, "iter": 87960, "CLASSES": tuple(map(str, range(80)))}
    save_checkpoint({"meta": meta, "state_dict": state}, str(path))


def losses(
    model: Any,
    images: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    classes: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Training losses and gradients for images (BGR, not resized) and their objects, with deterministic sampling.

    Anchors are sampled evenly from the candidates; of the RoIs all are taken, which needs a sampler with a large `num`
    (`sample_all_rois`), because their order differs between implementations.
    """
    samples = []
    for image, box, label, mask in zip(images, boxes, classes, masks):
        height, width = image.shape[:2]
        size = {"img_shape": (height, width), "ori_shape": (height, width), "scale_factor": (1.0, 1.0)}
        sample = DetDataSample(metainfo=size)
        truth = {"bboxes": torch.from_numpy(box), "labels": torch.from_numpy(label)}
        sample.gt_instances = InstanceData(**truth, masks=BitmapMasks(mask.astype(np.uint8), height, width))
        samples.append(sample)
    tensors = [torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))) for image in images]
    model.train()

    def choose(self: Any, gallery: Tensor, num: int) -> Tensor:
        return gallery[evenly_spaced_indices(len(gallery), num)]

    with mock.patch.object(RandomSampler, "random_choice", choose):
        prepared = model.data_preprocessor({"inputs": tensors, "data_samples": samples}, True)
        terms = model(**prepared, mode="loss")
    summed: dict[str, Any] = {
        name: sum(value) if isinstance(value, list) else value for name, value in terms.items() if "loss" in name
    }
    model.zero_grad()
    sum(summed.values()).backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.eval()
    return {name: float(value.detach()) for name, value in summed.items()}, gradients


def sample_all_rois(config: Config) -> None:
    """Makes the RoI sampler of a config take all RoIs."""
    rcnn = config.model.train_cfg.rcnn
    for stage in rcnn if isinstance(rcnn, list) else [rcnn]:
        stage.sampler.update(num=10**6, pos_fraction=1.0)


def seed_of(row: str) -> int:
    """A seed for a row's weights."""
    return zlib.crc32(row.encode()) % 10**6
