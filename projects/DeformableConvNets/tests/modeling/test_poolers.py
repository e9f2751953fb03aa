# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn

from dcn_d2 import layers
from dcn_d2.modeling import ROI_POOLER_REGISTRY, DCNROIPooler, assign_levels, build_roi_pooler

from ..slim import slim_config

NAMES = ["DeformRoIPool", "ModulatedDeformRoIPool", "DeformPSRoIPool", "ModulatedDeformPSRoIPool"]
SHAPES = {f"p{level}": ShapeSpec(channels=6, stride=2**level) for level in range(2, 6)}
# Two images; one box for each level, in mixed order.
BOXES = [[[10.0, 20.0, 310.0, 330.0], [5.0, 6.0, 55.0, 49.0]], [[0.0, 0.0, 511.0, 511.0], [40.0, 40.0, 190.0, 160.0]]]
BOX_LEVELS = [2, 0, 3, 1]


def make(pooler_type: str, mmdet_levels: bool = False, **head: object) -> ROIPooler:
    cfg = slim_config()
    cfg.MODEL.DCN.POOLER_FC_DIM = 8
    cfg.MODEL.DCN.POOLER_MMDET_LEVELS = mmdet_levels
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = pooler_type
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 3
    for key, value in head.items():
        cfg.MODEL.ROI_BOX_HEAD[key] = value
    torch.manual_seed(0)
    return build_roi_pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, SHAPES)


def features() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 6, 512 // s.stride, 512 // s.stride, requires_grad=True) for s in SHAPES.values()]


def boxes(coordinates: list = BOXES) -> list[Boxes]:
    return [Boxes(torch.tensor(one_image).view(-1, 4)) for one_image in coordinates]


def randomise(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_each_level_has_a_layer_of_its_own(name: str) -> None:
    pooler = make(name, POOLER_SAMPLING_RATIO=2)
    assert [type(level) for level in pooler.level_poolers] == 4 * [getattr(layers, name)]
    assert [level.spatial_scale for level in pooler.level_poolers] == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    assert {level.sampling_ratio for level in pooler.level_poolers} == {2}
    assert {level.offset_fc[2].weight.shape for level in pooler.level_poolers} == {(8, 8)}
    names = [key for key, _ in pooler.named_parameters()]
    assert len(names) == 4 * (10 if "Modulated" in name else 6)
    assert {"level_poolers.0.offset_fc.0.weight", "level_poolers.3.offset_fc.4.bias"} <= set(names)


@pytest.mark.parametrize("mmdet_levels", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_boxes_are_pooled_from_their_level_and_stay_in_order(name: str, mmdet_levels: bool) -> None:
    pooler = randomise(make(name, mmdet_levels))
    maps = features()
    pooled = pooler(maps, boxes())
    for row, (level, image, box) in enumerate(zip(BOX_LEVELS, [0, 0, 1, 1], sum(BOXES, []))):
        expected = pooler.level_poolers[level](maps[level], torch.tensor([[image, *box]]))
        torch.testing.assert_close(pooled[row], expected[0])


def test_new_deformable_pooler_is_detectron2s_aligned_pooling() -> None:
    expected = make("ROIAlignV2")(features(), boxes())
    torch.testing.assert_close(make("DeformRoIPool")(features(), boxes()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ROIAlign", "ROIAlignV2", "ROIPool"])
def test_other_types_are_left_to_detectron2(name: str) -> None:
    plain = make(name)
    assert type(plain) is ROIPooler
    # Away from the sizes at which they switch, both level assignments agree.
    assert torch.equal(make(name, mmdet_levels=True)(features(), boxes()), plain(features(), boxes()))


def test_unknown_types_are_detectron2s_error() -> None:
    with pytest.raises(ValueError, match="Unknown pooler type: DeformableRoIPool"):
        make("DeformableRoIPool")


def test_registry_says_what_it_takes() -> None:
    assert all(name in ROI_POOLER_REGISTRY for name in NAMES)
    for keyword in ("output_size", "spatial_scale", "in_channels", "deform_fc_channels", "sampling_ratio"):
        assert f"- {keyword}:" in ROI_POOLER_REGISTRY.__doc__


class TestLevels:
    """Feature maps whose values are the number of their level tell which level a box is pooled from."""

    def levels(self, mmdet_levels: bool, *sizes: tuple[float, float]) -> list[int]:
        sides = [1024 // shape.stride for shape in SHAPES.values()]
        numbered = [torch.full((1, 6, side, side), float(level)) for level, side in enumerate(sides)]
        coordinates = [[0.0, 0.0, width, height] for width, height in sizes]
        pooler = make("ROIAlignV2", mmdet_levels)
        pooled = pooler(numbered, boxes([coordinates]))[:, 0, 0, 0].int().tolist()
        assert assign_levels(pooler, boxes([coordinates])).tolist() == pooled
        return pooled

    @pytest.mark.parametrize("mmdet_levels", [False, True])
    def test_levels_switch_at_112_224_and_448(self, mmdet_levels: bool) -> None:
        sizes = [(1, 1), (111, 112), (112, 112), (56, 224), (223, 224), (224, 224), (447, 447), (448, 448), (510, 510)]
        assert self.levels(mmdet_levels, *sizes) == [0, 0, 1, 1, 1, 2, 2, 3, 3]

    def test_a_hair_smaller_is_another_level_than_detectron2s(self) -> None:
        # 4e-7 below, relatively. MMDetection adds 1e-6 to size / 56: to 2, which lifts it over the switch, and to 8.
        sizes = [float(np.float32(switch * (1 - 4e-7))) for switch in (112, 448)]
        assert sizes[0] < 112 and sizes[1] < 448
        assert self.levels(False, *zip(sizes, sizes)) == [0, 2]
        assert self.levels(True, *zip(sizes, sizes)) == [1, 2]

    def test_boxes_beyond_the_pyramid_take_its_ends(self) -> None:
        assert self.levels(True, (0, 0), (1000, 900)) == [0, 3]


@pytest.mark.parametrize("mmdet_levels", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_empty_levels_have_zero_gradients(name: str, mmdet_levels: bool) -> None:
    pooler = randomise(make(name, mmdet_levels))
    pooler(features(), boxes([[[5.0, 6, 55, 49]], []])).square().sum().backward()
    for level, layer in enumerate(pooler.level_poolers):
        assert all(parameter.grad is not None for parameter in layer.parameters())
        assert all(bool(parameter.grad.any()) == (level == 0) for parameter in layer.parameters())


@pytest.mark.parametrize("mmdet_levels", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_no_boxes_at_all_have_zero_gradients(name: str, mmdet_levels: bool) -> None:
    pooler = randomise(make(name, mmdet_levels))
    maps = features()
    pooled = pooler(maps, boxes([[], []]))
    assert pooled.shape == (0, 6, 3, 3)
    pooled.sum().backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in (*maps, *pooler.parameters()))


@pytest.mark.parametrize("name", ["ROIAlignV2", "ModulatedDeformPSRoIPool"])
def test_no_images_and_a_single_level(name: str) -> None:
    pooler = make(name, mmdet_levels=True)
    assert pooler([level[:0] for level in features()], []).shape == (0, 6, 3, 3)
    single = DCNROIPooler(3, [1 / 4], 0, "ROIAlignV2", mmdet_levels=True)
    assert single(features()[:1], boxes()).shape == (4, 6, 3, 3)


def test_half_precision_stays_half() -> None:
    pooler = randomise(make("ModulatedDeformPSRoIPool", mmdet_levels=True))
    with torch.autocast("cpu", torch.bfloat16):
        pooled = pooler([level.bfloat16() for level in features()], boxes())
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled.float(), pooler(features(), boxes()), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mmdet_levels", [False, True])
@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_maps_of_any_dtype_with_boxes_in_float32(
    name: str, mmdet_levels: bool, levels: int, autocast: torch.dtype | None, dtype: torch.dtype
) -> None:
    # float32 maps under autocast come from an FPN with LayerNorm or GroupNorm: autocast leaves theirs in float32.
    pooler = randomise(make(name, mmdet_levels))
    if levels == 1:
        finest = pooler.level_poolers[0]
        pooler = DCNROIPooler(3, [0.25], 0, "ROIAlignV2", lambda _: finest, mmdet_levels)
    expected = pooler(features()[:levels], boxes())
    if autocast is None or dtype == torch.float64:
        pooler = pooler.to(dtype)
    maps = [level.detach().to(dtype).requires_grad_() for level in features()[:levels]]
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        pooled = pooler(maps, boxes())
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled.float(), expected, rtol=0.1, atol=0.1)
    for gradient, level in zip(torch.autograd.grad(pooled.sum(), maps), maps):
        assert gradient.dtype == level.dtype and bool(gradient.isfinite().all())


# Each process has boxes on one level, and another one than the other process has; in the second step, none at all.
TRAIN = """
import os, sys, torch
from detectron2.structures import Boxes
from torch.nn.parallel import DistributedDataParallel
from tests.modeling.test_poolers import features, make, randomise

rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
pooler = randomise(make("ModulatedDeformPSRoIPool", mmdet_levels=True))
model = DistributedDataParallel(pooler)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
size = [50.0, 300.0][rank]
for step, boxes in enumerate([[[5, 5, size, size]], [], [[5, 5, size, size]]]):
    optimizer.zero_grad()
    both = [Boxes(torch.tensor(boxes).view(-1, 4))] * 2
    model(features(), both).square().sum().backward()
    learnt = [bool(level.offset_fc[0].weight.grad.any()) for level in pooler.level_poolers]
    assert learnt == ([True, False, True, False] if boxes else [False] * 4), (step, learnt)
    optimizer.step()
weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
both = [torch.empty_like(weights) for _ in range(2)]
torch.distributed.all_gather(both, weights)
assert torch.equal(*both)
torch.distributed.barrier()  # neither ends while the other still needs it
# This is how torch.multiprocessing ends its processes. In a program that ends by itself, threads of gloo that still run
# abort it now and then ("terminate called without an active exception").
os._exit(0)
"""


def test_two_processes_train_with_empty_levels(project: Path, tmp_path: Path) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", TRAIN]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            cwd=project,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        output = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(output)
