# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from dcn_d2.layers import (
    DeformConv,
    DeformConvPack,
    ModulatedDeformConv,
    ModulatedDeformConvPack,
    split_offset_and_mask,
)

# Constructor arguments and (height, width) of the input: unequal everywhere they can be.
GEOMETRIES = [
    (dict(in_channels=4, out_channels=6, kernel_size=3, padding=1), (7, 9)),
    (dict(in_channels=4, out_channels=6, kernel_size=3, stride=2, padding=2, dilation=2, groups=2), (9, 6)),
    (dict(in_channels=6, out_channels=2, kernel_size=1, deformable_groups=3), (5, 4)),
    (dict(in_channels=4, out_channels=4, kernel_size=3, padding=1, groups=4, deformable_groups=2), (6, 5)),
    (dict(in_channels=2, out_channels=3, kernel_size=5, padding=2), (3, 4)),  # smaller than the kernel
    (
        dict(in_channels=4, out_channels=4, kernel_size=(3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
        (8, 7),
    ),
]


def operands(layer: nn.Module, size: tuple[int, int], batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Input, offsets of some pixels, and modulation for a layer."""
    x = torch.randn(batch, layer.in_channels, *size)
    plain = F.conv2d(x, torch.zeros_like(layer.weight), None, layer.stride, layer.padding, layer.dilation, layer.groups)
    taps = layer.deformable_groups * layer.kernel_size[0] * layer.kernel_size[1]
    offset = 2 * torch.randn(batch, 2 * taps, *plain.shape[2:])
    return x, offset, torch.rand(batch, taps, *plain.shape[2:])


def plain_conv(layer: nn.Module, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("geometry, size", GEOMETRIES)
class TestGeometries:
    def test_equals_torchvision_in_value_and_gradients(self, geometry: dict, size: tuple[int, int]) -> None:
        for layer_class in (DeformConv, ModulatedDeformConv):
            layer = layer_class(**geometry)
            x, offset, mask = operands(layer, size)
            inputs = [x, offset] + ([mask] if layer_class is ModulatedDeformConv else [])
            for tensor in inputs:
                tensor.requires_grad_()
            out = layer(*inputs)
            expected = deform_conv2d(
                x, offset, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, *inputs[2:]
            )
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
            leaves = [*inputs, *layer.parameters()]
            gradients = torch.autograd.grad(out.square().sum(), leaves)
            for mine, theirs in zip(gradients, torch.autograd.grad(expected.square().sum(), leaves)):
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)

    def test_zero_offsets_give_a_plain_convolution(self, geometry: dict, size: tuple[int, int]) -> None:
        for layer in (DeformConv(**geometry), ModulatedDeformConv(**geometry)):
            x, offset, mask = operands(layer, size)
            given = (offset.zero_(),) if isinstance(layer, DeformConv) else (offset.zero_(), mask.fill_(1))
            torch.testing.assert_close(layer(x, *given), plain_conv(layer, x), rtol=1e-4, atol=1e-5)

    def test_packs_start_as_plain_convolutions(self, geometry: dict, size: tuple[int, int]) -> None:
        pack = DeformConvPack(**geometry)
        x = torch.randn(2, pack.in_channels, *size)
        torch.testing.assert_close(pack(x), plain_conv(pack, x), rtol=1e-4, atol=1e-5)
        modulated = ModulatedDeformConvPack(**geometry, bias=False)
        torch.testing.assert_close(modulated(x), 0.5 * plain_conv(modulated, x), rtol=1e-4, atol=1e-5)


def test_offsets_are_y_before_x_and_in_pixels() -> None:
    # On the ramp 10 * y + x, a shift by (0.5, 0.25) adds 5.25 to each of the 9 samples; the zeros outside the
    # map change that in the outermost rows and columns only.
    ramp = 10 * torch.arange(6.0)[:, None] + torch.arange(7.0)
    layer = DeformConv(1, 1, kernel_size=3, padding=1)
    nn.init.ones_(layer.weight)
    offset = torch.tensor([0.5, 0.25]).repeat(9)[None, :, None, None].expand(1, 18, 6, 7)
    moved = layer(ramp[None, None], offset) - plain_conv(layer, ramp[None, None])
    torch.testing.assert_close(moved[..., 1:-2, 1:-2], torch.full((1, 1, 3, 4), 9 * 5.25))


def test_known_numbers_for_half_a_pixel() -> None:
    # A sample is the mean of its four neighbours, zeros outside included. Those at y, x of -0.5, 0.5 and 1.5 are
    #   0.25  0.75  0.5
    #   1.00  2.50  1.5
    #   0.75  1.75  1.0
    # and those at 2.5 are zero. The first output sums all nine, its neighbours the last two rows or columns.
    layer = DeformConv(1, 1, kernel_size=3, padding=1)
    nn.init.ones_(layer.weight)
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    out = layer(image, torch.full((1, 18, 2, 2), 0.5))
    torch.testing.assert_close(out, torch.tensor([[[[10.0, 8.0], [8.5, 6.75]]]]))
    modulated = ModulatedDeformConv(1, 1, kernel_size=3, padding=1)
    nn.init.ones_(modulated.weight)
    nn.init.constant_(modulated.bias, 7)
    half = modulated(image, torch.full((1, 18, 2, 2), 0.5), torch.full((1, 9, 2, 2), 0.5))
    torch.testing.assert_close(half, out / 2 + 7)


def test_split_gives_two_thirds_as_a_view_and_the_sigmoid_of_the_rest() -> None:
    branch = torch.randn(2, 3 * 9 * 4, 2, 3)
    offset, mask = split_offset_and_mask(branch)
    assert offset.data_ptr() == branch.data_ptr()
    torch.testing.assert_close(offset, branch[:, :72])
    torch.testing.assert_close(mask, branch[:, 72:].sigmoid())


def test_packs_have_mmcv_names_and_their_branches_learn() -> None:
    for pack_class, channels in ((DeformConvPack, 36), (ModulatedDeformConvPack, 54)):
        pack = pack_class(4, 4, kernel_size=3, padding=1, groups=2, deformable_groups=2)
        shapes = {name: tuple(parameter.shape) for name, parameter in pack.named_parameters()}
        assert shapes.pop("bias", (4,)) == (4,)
        assert shapes == {
            "weight": (4, 2, 3, 3),
            "conv_offset.weight": (channels, 4, 3, 3),
            "conv_offset.bias": (channels,),
        }
        pack(torch.randn(1, 4, 6, 5)).square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in pack.parameters())


@pytest.mark.parametrize("layer_class", [DeformConv, ModulatedDeformConv])
def test_norm_then_activation(layer_class: type[nn.Module]) -> None:
    norm = nn.BatchNorm2d(4).eval()
    nn.init.constant_(norm.bias, 1)
    layer = layer_class(4, 4, kernel_size=3, padding=1, bias=False, norm=norm, activation=F.relu)
    x, offset, mask = operands(layer, (5, 6))
    inputs = (x, offset) if layer_class is DeformConv else (x, offset, mask)
    bare = deform_conv2d(x, offset, layer.weight, None, 1, 1, 1, *inputs[2:])
    torch.testing.assert_close(layer(*inputs), F.relu(norm(bare)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer_class", [DeformConv, ModulatedDeformConv])
def test_empty_batch_gives_an_empty_output_and_leaves_the_norm_alone(layer_class: type[nn.Module]) -> None:
    norm = nn.BatchNorm2d(6)
    layer = layer_class(4, 6, kernel_size=3, stride=2, padding=1, bias=False, norm=norm)
    x, offset, mask = operands(layer, (7, 9), batch=0)
    x.requires_grad_()
    out = layer(x, offset) if layer_class is DeformConv else layer(x, offset, mask)
    assert out.shape == (0, 6, 4, 5)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.weight.grad.abs().sum() == 0
    assert norm.running_mean.isfinite().all() and norm.num_batches_tracked == 0


def test_offsets_for_another_number_of_groups_are_refused() -> None:
    # The operator alone would take them: it infers the groups from the channels.
    v1 = DeformConv(4, 4, kernel_size=3, padding=1)
    x, offset, mask = operands(v1, (5, 5))
    with pytest.raises(RuntimeError, match=r"offset must have 18 channels .* got 36"):
        v1(x, offset.repeat(1, 2, 1, 1))
    v2 = ModulatedDeformConv(4, 4, kernel_size=3, padding=1, deformable_groups=2)
    with pytest.raises(RuntimeError, match=r"offset must have 36 channels .* got 18"):
        v2(x, offset, mask)
    with pytest.raises(RuntimeError, match=r"mask must have 18 channels .* got 9"):
        v2(x, offset.repeat(1, 2, 1, 1), mask)


@pytest.mark.parametrize("layer_class", [DeformConv, DeformConvPack, ModulatedDeformConv, ModulatedDeformConvPack])
def test_twice_the_channels_are_not_two_conv_groups(layer_class: type[nn.Module]) -> None:
    layer = layer_class(4, 4, 3, padding=1)
    x, offset, mask = operands(layer, (5, 6))
    arguments = [offset, mask] if layer_class is ModulatedDeformConv else [offset] if layer_class is DeformConv else []
    layer(x, *arguments)
    message = rf"^{layer_class.__name__}: the input must have in_channels=4 channels, got 8 \(shape \[2, 8, 5, 6\]\)"
    with pytest.raises(RuntimeError, match=message):
        layer(torch.cat([x, x], dim=1), *arguments)
    if layer_class is ModulatedDeformConv:
        with pytest.raises(RuntimeError, match=message):
            layer(torch.cat([x, x], dim=1), torch.cat([offset, mask], dim=1))


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="out_channels must be a multiple of groups, got 4 and 3"):
        DeformConv(6, 4, kernel_size=3, groups=3)
    with pytest.raises(ValueError, match="in_channels must be a multiple of groups, got 5 and 2"):
        ModulatedDeformConv(5, 4, kernel_size=3, groups=2)
    with pytest.raises(ValueError, match="DeformConv has no bias"):
        DeformConv(4, 4, kernel_size=3, bias=True)


def test_repr_is_that_of_detectron2() -> None:
    # Detectron2's tests expect these texts, in_channels that the deformable groups do not divide included.
    assert repr(DeformConv(3, 10, kernel_size=3, padding=1, deformable_groups=2)) == (
        "DeformConv(in_channels=3, out_channels=10, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), "
        "dilation=(1, 1), groups=1, deformable_groups=2, bias=False)"
    )
    assert repr(ModulatedDeformConv(3, 10, kernel_size=3, padding=1, deformable_groups=2)) == (
        "ModulatedDeformConv(in_channels=3, out_channels=10, kernel_size=(3, 3), stride=1, padding=1, "
        "dilation=1, groups=1, deformable_groups=2, bias=True)"
    )
