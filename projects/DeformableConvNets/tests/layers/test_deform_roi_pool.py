# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from torchvision.ops import roi_align

from dcn_d2.layers import DeformPSRoIPool, DeformRoIPool, ModulatedDeformPSRoIPool, ModulatedDeformRoIPool
from dcn_d2.ops import deform_psroi_pool

LAYERS = [DeformRoIPool, ModulatedDeformRoIPool, DeformPSRoIPool, ModulatedDeformPSRoIPool]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def rois() -> torch.Tensor:
    """RoIs of unequal sides in both images; a shift by a tenth of their size keeps them inside the map."""
    return torch.tensor([[0, 20, 28, 61, 90], [1, 16.5, 24, 120, 50], [1, 40, 40, 44, 45]])


def make(layer_class: type[nn.Module], **kwargs: object) -> nn.Module:
    arguments = dict(output_size=(3, 4), spatial_scale=0.25, in_channels=5, deform_fc_channels=8) | kwargs
    return layer_class(**arguments)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("layer_class, factor", [(DeformRoIPool, 1.0), (ModulatedDeformRoIPool, 0.5)])
def test_starts_as_aligned_pooling(layer_class: type[nn.Module], factor: float, sampling_ratio: int) -> None:
    features = torch.randn(2, 5, 28, 36)
    pooled = make(layer_class, sampling_ratio=sampling_ratio)(features, rois())
    expected = roi_align(features, rois(), (3, 4), 0.25, sampling_ratio or -1, aligned=True)
    torch.testing.assert_close(pooled, factor * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampling_ratio, samples", [(0, 4), (3, 3)])
@pytest.mark.parametrize("layer_class, factor", [(DeformPSRoIPool, 1.0), (ModulatedDeformPSRoIPool, 0.5)])
def test_psroi_layer_starts_as_its_plain_pooling(
    layer_class: type[nn.Module], factor: float, sampling_ratio: int, samples: int
) -> None:
    features = torch.randn(2, 5, 28, 36)
    pooled = make(layer_class, sampling_ratio=sampling_ratio)(features, rois())
    expected = deform_psroi_pool(features, rois(), None, (3, 4), 0.25, sample_per_part=samples)
    torch.testing.assert_close(pooled, factor * expected)
    aligned = roi_align(features, rois(), (3, 4), 0.25, sampling_ratio or -1, aligned=True)
    assert (pooled - factor * aligned).abs().max() > 0.1, "the two operators do not compute the same"


def test_psroi_branches_read_the_plain_pooling_of_their_own_operator() -> None:
    layer = make(ModulatedDeformPSRoIPool, gamma=0.2)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    features = torch.randn(2, 5, 28, 36)
    plain = deform_psroi_pool(features, rois(), None, (3, 4), 0.25).flatten(1)
    offset, mask = layer.offset_fc(plain).view(3, 2, 3, 4), layer.mask_fc(plain).view(3, 1, 3, 4)
    expected = deform_psroi_pool(features, rois(), offset, (3, 4), 0.25, trans_std=0.2) * mask
    torch.testing.assert_close(layer(features, rois()), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_offsets_are_x_before_y_and_shares_of_the_roi(axis: int) -> None:
    # An offset of 1 in all bins is a RoI moved by gamma times its own width (axis 0) or height (axis 1).
    layer = make(DeformRoIPool, gamma=0.1)
    with torch.no_grad():
        layer.offset_fc[4].bias.view(2, 12)[axis] = 1
    features, boxes = torch.randn(2, 5, 28, 36), rois()
    moved = boxes.clone()
    size = boxes[:, 3 + axis] - boxes[:, 1 + axis]
    moved[:, [1 + axis, 3 + axis]] += 0.1 * size[:, None]
    expected = roi_align(features, moved, (3, 4), 0.25, -1, aligned=True)
    torch.testing.assert_close(layer(features, boxes), expected, rtol=1e-3, atol=1e-4)


def test_mask_scales_each_bin() -> None:
    layer = make(ModulatedDeformRoIPool)
    logits = torch.linspace(-3, 3, 12)
    with torch.no_grad():
        layer.mask_fc[2].bias.copy_(logits)
    features = torch.randn(2, 5, 28, 36)
    expected = roi_align(features, rois(), (3, 4), 0.25, -1, aligned=True) * logits.sigmoid().view(1, 1, 3, 4)
    torch.testing.assert_close(layer(features, rois()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer_class", [ModulatedDeformRoIPool, ModulatedDeformPSRoIPool])
def test_parameters_fit_the_published_models(layer_class: type[nn.Module]) -> None:
    # Names below roi_layers.<level>. and shapes of MMDetection's dpool and mdpool rows (256 channels, 7 x 7 bins).
    with torch.device("meta"):
        layer = layer_class(7, 1 / 4, 256)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "offset_fc.0.weight": (1024, 12544),
        "offset_fc.0.bias": (1024,),
        "offset_fc.2.weight": (1024, 1024),
        "offset_fc.2.bias": (1024,),
        "offset_fc.4.weight": (98, 1024),
        "offset_fc.4.bias": (98,),
        "mask_fc.0.weight": (1024, 12544),
        "mask_fc.0.bias": (1024,),
        "mask_fc.2.weight": (49, 1024),
        "mask_fc.2.bias": (49,),
    }


@pytest.mark.parametrize("layer_class", LAYERS)
def test_all_parameters_learn(layer_class: type[nn.Module]) -> None:
    layer = make(layer_class)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    features = torch.randn(2, 5, 28, 36, requires_grad=True)
    layer(features, rois()).square().sum().backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in (features, *layer.parameters()))


@pytest.mark.parametrize("layer_class", LAYERS)
def test_no_rois_give_an_empty_output_and_zero_gradients(layer_class: type[nn.Module]) -> None:
    # Distributed training needs a gradient for every parameter, also where no RoI falls on a level.
    layer = make(layer_class)
    features = torch.randn(2, 5, 28, 36, requires_grad=True)
    pooled = layer(features, torch.zeros(0, 5))
    assert pooled.shape == (0, 5, 3, 4)
    pooled.sum().backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in (features, *layer.parameters()))


@pytest.mark.parametrize("layer_class", LAYERS)
def test_maps_of_other_channels_are_refused(layer_class: type[nn.Module]) -> None:
    with pytest.raises(RuntimeError, match=r"the input must have in_channels=5 channels, got 6"):
        make(layer_class)(torch.zeros(2, 6, 28, 36), rois())


def test_repr_shows_the_arguments() -> None:
    shown = "output_size=(3, 4), spatial_scale=0.25, in_channels=5, deform_fc_channels=8, sampling_ratio=0, gamma=0.1"
    assert shown in repr(make(DeformRoIPool))
