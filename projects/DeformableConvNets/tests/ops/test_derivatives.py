# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Derivatives beyond one backward pass: second ones, forward mode, `torch.func`, gradients by sample."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.autograd.functional import hessian
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from dcn_d2.ops import deform_conv2d, deform_psroi_pool, deform_roi_pool, modulated_deform_conv2d, reference

from .samples import ConvSample
from .test_library import HIDE_KERNELS, run_python

Function = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """An operator and its reference as functions of the operands that have gradients."""

    name: str
    operator: Function
    oracle: Function
    operands: dict[str, Tensor]

    def both(self) -> tuple[Function, Function]:
        return self.operator, self.oracle


SMALL = ConvSample("small", channels=4, out_channels=2, size=(3, 4), kernel=(2, 2), padding=(1, 0), deform_groups=2)
ROIS = torch.tensor([[0, 1.0, 0.5, 6.3, 5.2], [1, 0.2, 1.1, 4.4, 6.6]], dtype=torch.float64)


def convolution(name: str, sample: ConvSample) -> Case:
    def oracle(input: Tensor, offset: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        found = dict(zip(list(operands)[3:], rest))
        bias, mask = found.get("bias"), found.get("mask")
        return reference.deform_conv2d(input, offset, weight, bias, mask=mask, **sample.geometry)

    def operator(*tensors: Tensor) -> Tensor:
        return deform_conv2d(**dict(zip(operands, tensors)), **sample.geometry)

    operands = sample.tensors()
    return Case(name, operator, oracle, operands)


def modulated() -> Case:
    operands = SMALL.tensors()
    joined = torch.cat([operands.pop("offset"), operands.pop("mask").logit()], dim=1)
    operands = {"input": operands["input"], "offset_and_mask": joined} | operands

    def oracle(input: Tensor, offset_and_mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        offset, logits = offset_and_mask.split([16, 8], dim=1)
        return reference.deform_conv2d(input, offset, weight, bias, mask=logits.sigmoid(), **SMALL.geometry)

    return Case(
        "modulated_deform_conv2d",
        lambda *tensors: modulated_deform_conv2d(**dict(zip(operands, tensors)), **SMALL.geometry),
        oracle,
        operands,
    )


def pooling(name: str, operator: Function, oracle: Function, **geometry: Any) -> Case:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    operands = {"input": normal(2, 2, 7, 8), "offset": normal(2, 2, 2, 2), "mask": normal(2, 1, 2, 2).sigmoid()}
    arguments: dict[str, Any] = {"output_size": [2, 2]} | geometry
    return Case(
        name,
        lambda input, offset, mask: operator(input, ROIS, offset, mask=mask, **arguments),
        lambda input, offset, mask: oracle(input, ROIS, offset, mask=mask, **arguments),
        operands,
    )


CASES = [
    convolution("deform_conv2d", dataclasses.replace(SMALL, mask=False, bias=False)),
    convolution("deform_conv2d_grouped_with_mask", dataclasses.replace(SMALL, groups=2)),
    modulated(),
    pooling("deform_roi_pool", deform_roi_pool, reference.deform_roi_pool, sampling_ratio=2),
    pooling("deform_psroi_pool", deform_psroi_pool, reference.deform_psroi_pool, sample_per_part=2),
]
parametrize_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def leaves_of(case: Case) -> tuple[Tensor, ...]:
    return tuple(t.clone().requires_grad_() for t in case.operands.values())


def tangents_of(case: Case) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in case.operands.values())


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.unsanitized
@parametrize_cases
def test_gradgradcheck(case: Case) -> None:
    # Nothing here lies on a kink: the operands are random.
    assert torch.autograd.gradgradcheck(case.operator, leaves_of(case), fast_mode=True, atol=1e-4)


def penalty(function: Function, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradient of a function's value and its gradients' squares, as WGAN-GP trains with."""
    output = function(*leaves)
    first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(output.sum() + sum(g.square().sum() for g in first), leaves)


@parametrize_cases
def test_gradient_penalty_is_not_the_first_order_value(case: Case) -> None:
    actual, expected = (penalty(function, leaves_of(case)) for function in case.both())
    assert_equal(actual, expected)


@parametrize_cases
def test_hessian_is_not_zero(case: Case) -> None:
    for index, operand in enumerate(case.operands.values()):
        rest = list(case.operands.values())

        def loss(function: Function, tensor: Tensor) -> Tensor:
            return function(*rest[:index], tensor, *rest[index + 1 :]).square().mean()

        # A few rows are enough, and much faster.
        direction = torch.randn(operand.shape, generator=torch.Generator().manual_seed(4), dtype=operand.dtype)
        actual, expected = (
            torch.autograd.functional.hvp(lambda t: loss(f, t), operand, direction)[1] for f in case.both()
        )
        assert expected.abs().max() > 0
        assert_equal(actual, expected)


def test_hessian_of_the_weight_in_every_way() -> None:
    x, o, w = (t.double() for t in (torch.randn(2, 2, 4, 5), torch.randn(2, 18, 4, 5), torch.randn(1, 2, 3, 3)))

    def loss(weight: Tensor) -> Tensor:
        return (deform_conv2d(x, o, weight, padding=1) ** 2).mean()

    columns = torch.func.jacrev(
        lambda weight: reference.deform_conv2d(x, o, weight, None, [1] * 2, [1] * 2, [1] * 2, None)
    )(w)
    flat = columns.reshape(-1, w.numel())
    expected = (2 / len(flat) * flat.T @ flat).reshape(*w.shape, *w.shape)  # the output is linear in the weight
    for found in (
        hessian(loss, w),
        hessian(loss, w, vectorize=True),
        hessian(loss, w, vectorize=True, outer_jacobian_strategy="forward-mode"),
        torch.func.hessian(loss)(w),
        jacrev(jacrev(loss))(w),
        jacfwd(jacfwd(loss))(w),
        jacrev(jacfwd(loss))(w),
    ):
        assert_equal(found, expected)


@parametrize_cases
def test_third_derivative(case: Case) -> None:
    def third(function: Function) -> Tensor:
        leaves = leaves_of(case)
        found = function(*leaves).pow(3).sum()
        for _ in range(3):
            found = torch.autograd.grad(found, leaves[1], create_graph=True)[0].square().sum()
        return found

    actual, expected = map(third, case.both())
    assert actual.item() == pytest.approx(expected.item(), rel=1e-9) and expected.item() != 0


def test_steps_through_gradients_as_in_meta_learning() -> None:
    case = CASES[1]

    def learn(function: Function) -> Tensor:
        input, offset, weight, bias, mask = leaves_of(case)
        step = torch.autograd.grad(
            function(input, offset, weight, bias, mask).square().sum(), weight, create_graph=True
        )
        adapted = function(input, offset, weight - 0.1 * step[0], bias, mask)
        return torch.autograd.grad(adapted.square().sum(), weight)[0]

    actual, expected = map(learn, case.both())
    assert_equal(actual, expected)


@parametrize_cases
def test_forward_mode_is_not_zero(case: Case) -> None:
    operands, tangents = tuple(case.operands.values()), tangents_of(case)
    expected = jvp(case.oracle, operands, tangents)
    assert expected[1].abs().max() > 0
    assert_equal(jvp(case.operator, operands, tangents), expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, v) for t, v in zip(leaves_of(case), tangents)]
        assert_equal(forward_ad.unpack_dual(case.operator(*duals)).tangent, expected[1])
    for index in range(len(operands)):  # one at a time

        def alone(function: Function, tensor: Tensor) -> Tensor:
            return function(*operands[:index], tensor, *operands[index + 1 :])

        actual, wanted = (
            jvp(lambda t: alone(f, t), operands[index : index + 1], tangents[index : index + 1])[1] for f in case.both()
        )
        assert_equal(actual, wanted)


def test_forward_mode_of_what_is_linear_in_the_weight() -> None:
    x, o, w = torch.randn(1, 2, 5, 6), torch.randn(1, 18, 5, 6), torch.randn(3, 2, 3, 3)
    output, tangent = jvp(lambda w: deform_conv2d(x, o, w, padding=1), (w,), (w,))
    assert output.abs().max() > 1
    torch.testing.assert_close(tangent, output)


@parametrize_cases
def test_gradients_in_forward_mode(case: Case) -> None:
    operands, tangents = tuple(case.operands.values()), tangents_of(case)

    def gradient(function: Function) -> Callable[..., tuple[Tensor, ...]]:
        return grad(lambda *tensors: function(*tensors).square().sum(), argnums=tuple(range(len(operands))))

    assert_equal(*(jvp(gradient(function), operands, tangents)[1] for function in case.both()))

    def by_duals(function: Function) -> list[Tensor]:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, v) for t, v in zip(leaves_of(case), tangents)]
            found = torch.autograd.grad(function(*duals).square().sum(), duals)
            return [forward_ad.unpack_dual(t).tangent for t in found]

    assert_equal(*map(by_duals, case.both()))


@parametrize_cases
def test_torch_func_gives_what_backward_gives(case: Case) -> None:
    leaves = leaves_of(case)
    output = case.operator(*leaves)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=output.dtype)
    expected = torch.autograd.grad(output, leaves, cotangent)
    operands = tuple(case.operands.values())
    value, pull = vjp(case.operator, *operands)
    assert_equal(value, output.detach())
    assert_equal(pull(cotangent), expected)
    argnums = tuple(range(len(operands)))
    assert_equal(grad(lambda *tensors: (case.operator(*tensors) * cotangent).sum(), argnums)(*operands), expected)
    for reverse, forward in zip(jacrev(case.operator, argnums)(*operands), jacfwd(case.operator, argnums)(*operands)):
        assert reverse.abs().max() > 0
        assert_equal(forward, reverse)


@pytest.mark.parametrize("modulated", [False, True])
def test_gradients_by_sample(modulated: bool) -> None:
    case = CASES[2 if modulated else 1]
    parameters = {name: t for name, t in case.operands.items() if name in ("weight", "bias")}
    by_sample = {name: t for name, t in case.operands.items() if name not in parameters}

    def loss(parameters: dict[str, Tensor], sample: dict[str, Tensor]) -> Tensor:
        operands = parameters | {name: t[None] for name, t in sample.items()}
        return case.operator(*(operands[name] for name in case.operands)).square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = vmap(grad(loss), in_dims=(None, 0))(parameters, by_sample)
    for index in range(SMALL.batch):
        one = grad(loss)(parameters, {name: t[index] for name, t in by_sample.items()})
        assert_equal({name: t[index] for name, t in actual.items()}, one)


def test_gradients_by_sample_of_pooling() -> None:
    case = CASES[3]

    def loss(input: Tensor, rois: Tensor, offset: Tensor) -> Tensor:
        return deform_roi_pool(input[None], rois[None], offset[None], 2, sampling_ratio=2).square().sum()

    rois = torch.cat([torch.zeros(2, 1), ROIS[:, 1:]], dim=1)
    arguments = (case.operands["input"], rois, case.operands["offset"])
    actual = vmap(grad(loss, argnums=(0, 2)))(*arguments)
    for index in range(2):
        assert_equal(tuple(t[index] for t in actual), grad(loss, argnums=(0, 2))(*(t[index] for t in arguments)))


def test_vmap_over_any_dimension() -> None:
    image, offset, weights = torch.randn(2, 4, 5), torch.randn(1, 18, 4, 5), torch.randn(3, 2, 3, 3, 7)
    many = vmap(lambda w: deform_conv2d(image[None], offset, w, padding=1), in_dims=-1, out_dims=1)(weights)
    assert many.shape == (1, 7, 3, 4, 5)
    torch.testing.assert_close(many[:, 4], deform_conv2d(image[None], offset, weights[..., 4], padding=1))


def test_backward_operators_refuse_forward_mode_in_words() -> None:
    x, o, w = torch.randn(1, 1, 3, 3), torch.zeros(1, 2, 3, 3), torch.randn(1, 1, 1, 1)

    def first(weight: Tensor) -> Tensor:
        arguments = (x, x, o, weight, None, [1, 1], [0, 0], [1, 1], True, True, True)
        return torch.ops.dcn_d2.deform_conv2d_backward(*arguments)[0]

    with pytest.raises(RuntimeError, match=r"deform_conv2d_backward is not differentiable in forward mode.*Call"):
        jvp(first, (w,), (w,))


def test_bad_operands_are_named_in_forward_mode_too() -> None:
    x, o, w = torch.randn(1, 1, 3, 3), torch.zeros(1, 4, 3, 3), torch.randn(1, 1, 2, 1)
    with pytest.raises(RuntimeError, match=r"offset must have shape \[1, 4, 2, 3\], got \[1, 4, 3, 3\]"):
        jvp(lambda w: deform_conv2d(x, o, w), (w,), (w,))


def test_half_precision_has_second_derivatives() -> None:
    case = CASES[1]
    exact = penalty(case.oracle, leaves_of(case))
    half = tuple(t.to(torch.bfloat16).requires_grad_() for t in case.operands.values())
    for found, expected in zip(penalty(case.operator, half), exact):
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() < 0.2 * expected.norm()


def test_second_derivatives_without_kernels() -> None:
    output = run_python(
        HIDE_KERNELS
        + """
import torch
from dcn_d2.ops import deform_conv2d
torch.manual_seed(0)
x, o, w = torch.randn(1, 1, 3, 3), torch.randn(1, 2, 3, 3), torch.randn(1, 1, 1, 1)
h = torch.autograd.functional.hessian(lambda w: (deform_conv2d(x, o, w) ** 2).sum(), w)
torch.testing.assert_close(h.flatten(), 2 * (deform_conv2d(x, o, torch.ones_like(w)) ** 2).sum()[None])
print("equal")
""",
        DCN_LIBRARY="",
    )
    assert "equal" in output


SMALL_OPERANDS = SMALL.tensors()


def linear_in_weight(weight: Tensor) -> Tensor:
    return deform_conv2d(**(SMALL_OPERANDS | {"weight": weight}), **SMALL.geometry).sum() + weight.sum()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "transformed",
    [
        lambda w: jvp(linear_in_weight, (w,), (w,))[1],
        jacfwd(linear_in_weight),
        lambda w: jvp(grad(lambda w: linear_in_weight(w) ** 2), (w,), (w,))[1],
        torch.func.hessian(lambda w: linear_in_weight(w) ** 2),
        jacrev(jacrev(lambda w: linear_in_weight(w) ** 2)),
    ],
    ids=["jvp", "jacfwd", "jvp of grad", "hessian", "jacrev of jacrev"],
)
def test_compiled_forward_mode_keeps_the_operators_tangents(transformed: Function) -> None:
    """Graphs enter forward mode past Python's count of levels; the operator's share of the result was zero."""
    torch._dynamo.reset()
    weight = SMALL_OPERANDS["weight"]
    compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(weight), transformed(weight))


@pytest.mark.filterwarnings("ignore")
@parametrize_cases
def test_compiled_autograd_takes_the_operators(case: Case) -> None:
    torch._dynamo.reset()
    operands = [tensor.clone().requires_grad_() for tensor in case.operands.values()]
    expected = torch.autograd.grad(case.operator(*operands).pow(2).sum(), operands)
    loss = case.operator(*operands).pow(2).sum()
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss.backward()
    torch.testing.assert_close([operand.grad for operand in operands], list(expected))


@pytest.mark.filterwarnings("ignore")
def test_compiled_autograd_does_not_mix_up_geometries() -> None:
    torch._dynamo.reset()
    operands = [t.detach().requires_grad_() for t in (torch.rand(1, 2, 4, 4), torch.rand(1, 18, 4, 4))]
    weight = torch.rand(2, 2, 3, 3, requires_grad=True)
    for dilation, padding in ((1, 1), (2, 2), (1, 1), (3, 3)):  # of one and the same output size
        inputs = [*operands, weight]
        loss = deform_conv2d(*inputs, padding=padding, dilation=dilation).pow(2).sum()
        expected = torch.autograd.grad(loss, inputs, retain_graph=True)
        for tensor in inputs:
            tensor.grad = None
        with compiled_autograd._enable(torch.compile(backend="aot_eager")):
            loss.backward()
        torch.testing.assert_close([tensor.grad for tensor in inputs], list(expected))


@parametrize_cases
def test_vmap_over_no_samples_gives_none(case: Case) -> None:
    operands = {name: tensor.clone().requires_grad_() for name, tensor in case.operands.items()}
    shape = case.operator(*operands.values()).shape
    name, *others = operands
    empty = torch.empty(0, *operands[name].shape, dtype=torch.float64)
    found = vmap(case.operator, in_dims=(0, *(None for _ in others)))(empty, *(operands[other] for other in others))
    assert found.shape == (0, *shape)
    found.sum().backward()
    assert not operands[others[0]].grad.any()


def test_a_traced_graph_holds_the_operators_and_nothing_else() -> None:
    """Looking for tangents leaves no views behind."""

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(deform_conv2d(*inputs).sum(), inputs)

    operands = (torch.rand(1, 2, 4, 4), torch.rand(1, 18, 2, 2), torch.rand(2, 2, 3, 3))
    nodes = [str(node.target) for node in make_fx(gradients, pre_dispatch=True)(*operands).graph.nodes]
    assert nodes.count("dcn_d2.deform_conv2d.default") == nodes.count("dcn_d2.deform_conv2d_backward.default") == 1
    assert nodes.count("aten.alias.default") <= len(operands)  # made by torch for detach()


@pytest.mark.parametrize("operator", [deform_roi_pool, deform_psroi_pool])
def test_no_derivative_of_any_order_is_by_the_rois(operator: Function) -> None:
    """Backward gave none, forward mode and second derivatives gave some."""
    input = torch.rand(2, 2, 7, 8, dtype=torch.float64)

    def pooled(rois: Tensor) -> Tensor:
        return operator(input, rois, None, 2).pow(2).sum()

    def penalty(rois: Tensor) -> Tensor:
        return grad(lambda input: operator(input, rois, None, 2).pow(2).sum())(input).pow(2).sum()

    direction = torch.ones_like(ROIS) / 8
    direction[:, 0] = 0
    assert not grad(pooled)(ROIS).any()
    assert not jvp(pooled, (ROIS,), (direction,))[1].any()
    assert not jvp(grad(pooled), (ROIS,), (direction,))[1].any()
    assert not grad(penalty)(ROIS).any()
