# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Layers in TorchScript, scripted and traced: values of eager mode, also where only the compiled library is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcn_d2.layers import (
    DeformConv,
    DeformConvPack,
    DeformPSRoIPool,
    DeformRoIPool,
    ModulatedDeformConv,
    ModulatedDeformConvPack,
    ModulatedDeformPSRoIPool,
    ModulatedDeformRoIPool,
    split_offset_and_mask,
)

from ..torchscript import run_alone

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def layers() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Layers with random weights everywhere, and operands for each."""
    torch.manual_seed(0)
    x, offset, mask = torch.randn(2, 4, 9, 7), torch.randn(2, 36, 5, 7), torch.rand(2, 18, 5, 7)
    joint = torch.cat([offset, mask], dim=1)
    geometry: dict[str, Any] = dict(kernel_size=3, stride=(2, 1), padding=1, groups=2, deformable_groups=2)
    maps, rois = torch.randn(2, 5, 12, 9), torch.tensor([[0, 2.0, 3, 20, 30], [1, 5.5, 6, 19, 11], [1, 0, 0, 4, 40]])
    pool: dict[str, Any] = dict(output_size=(3, 2), spatial_scale=0.25, in_channels=5, deform_fc_channels=8)
    found = {
        "DeformConv": (DeformConv(4, 6, **geometry), (x, offset)),
        "norm": (DeformConv(4, 6, **geometry, norm=nn.BatchNorm2d(6)), (x, offset)),
        "norm and activation": (
            ModulatedDeformConv(4, 6, **geometry, norm=nn.GroupNorm(2, 6), activation=nn.ReLU()),
            (x, offset, mask),
        ),
        "ModulatedDeformConv": (ModulatedDeformConv(4, 6, **geometry), (x, offset, mask)),
        "ModulatedDeformConv of a branch": (ModulatedDeformConv(4, 6, **geometry, bias=False), (x, joint)),
        "DeformConvPack": (DeformConvPack(4, 6, **geometry), (x,)),
        "ModulatedDeformConvPack": (ModulatedDeformConvPack(4, 6, **geometry), (x,)),
        "DeformRoIPool": (DeformRoIPool(**pool), (maps, rois)),
        "ModulatedDeformRoIPool": (ModulatedDeformRoIPool(**pool, sampling_ratio=2), (maps, rois)),
        "DeformPSRoIPool": (DeformPSRoIPool(**pool), (maps, rois)),
        "ModulatedDeformPSRoIPool": (ModulatedDeformPSRoIPool(**pool, sampling_ratio=3), (maps, rois)),
    }
    for layer, _ in found.values():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
        layer.eval()
    return found


LAYERS = layers()
parametrize_layers = pytest.mark.parametrize("name", LAYERS)


@parametrize_layers
def test_scripted_layers_compute_what_eager_ones_do(name: str) -> None:
    layer, operands = LAYERS[name]
    scripted = torch.jit.script(layer)
    assert torch.equal(scripted(*operands), layer(*operands))
    assert isinstance(layer, nn.Module) and not isinstance(layer, torch.jit.ScriptModule)


def test_scripted_layers_are_trained_as_eager_ones() -> None:
    layer, operands = LAYERS["ModulatedDeformConvPack"]
    scripted = torch.jit.script(layer)
    found, expected = (
        torch.autograd.grad(model(*operands).square().sum(), list(model.parameters())) for model in (scripted, layer)
    )
    for actual, wanted in zip(found, expected):
        torch.testing.assert_close(actual, wanted)


def test_saved_layers_run_where_only_the_compiled_library_is_loaded(tmp_path: Path) -> None:
    models = [(torch.jit.script(layer), operands) for layer, operands in LAYERS.values()]
    models += [(torch.jit.trace(layer, operands), operands) for layer, operands in LAYERS.values()]
    with torch.no_grad():
        expected = [layer(*operands) for layer, operands in LAYERS.values()] * 2
    for found, wanted in zip(run_alone(models, tmp_path), expected):
        torch.testing.assert_close(found, wanted)


def test_a_part_of_a_model_can_be_scripted_and_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), DeformConvPack(4, 4, 3))
    x = torch.rand(1, 3, 6, 7)
    assert torch.equal(torch.jit.script(model)(x), model(x))
    assert type(model[1]) is DeformConvPack


@parametrize_layers
def test_scripted_layers_refuse_other_numbers_of_channels(name: str) -> None:
    layer, (x, *others) = LAYERS[name]
    with pytest.raises(torch.jit.Error, match=f"in_channels={x.shape[1]} channels, got {2 * x.shape[1]}"):
        torch.jit.script(layer)(torch.cat([x, x], dim=1), *others)


def test_scripted_layers_refuse_other_numbers_of_offsets() -> None:
    layer, (x, offset) = LAYERS["DeformConv"]
    with pytest.raises(torch.jit.Error, match="offset must have 36 channels for deformable_groups=2"):
        torch.jit.script(layer)(x, offset[:, :18])


def scripted_split(offset_and_mask: Tensor) -> tuple[Tensor, Tensor]:
    return split_offset_and_mask(offset_and_mask)


def test_scripted_functions_may_split_a_branchs_output() -> None:
    offset_and_mask = torch.randn(1, 27, 5, 6)
    for found, expected in zip(torch.jit.script(scripted_split)(offset_and_mask), scripted_split(offset_and_mask)):
        assert torch.equal(found, expected)
