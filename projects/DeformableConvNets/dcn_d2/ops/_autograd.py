# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Makes operators differentiable: gradients, gradients of gradients, forward mode, and `torch.vmap`.

`torch.library.register_autograd` is enough for gradients alone. An operator registered with it fails under
`torch.func.grad`, and silently gives zeros in forward mode and for gradients of gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, get_unwrapped, is_batchedtensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from ._library import LIBRARY
from .reference import pull_back

# While one of these is active, operands may be in forward mode without `forward_ad` knowing it. These are the
# transforms of torch.func, and modes such as that of a compiler that makes a graph.
transforms_active = torch._C._are_functorch_transforms_active
modes_active = torch._C._len_torch_dispatch_stack


def register_derivatives(
    name: str,
    backward: Callable[..., Sequence[Tensor | None]],
    reference: Callable[..., Any],
    forward_mode: Callable[..., Any] | None = None,
) -> None:
    """Makes an operator differentiable, also by `torch.func`, in forward mode, and under `torch.vmap`.

    An operator from `torch.library` has no derivatives of its own: without this, gradients would stop at it.

    Args:
        name: the operator's.
        backward: called as (arguments, needed, *grads), where `needed` says which of the operator's `arguments` want a
            gradient. Returns one for each argument, or None. It may call differentiable operators only, so that its
            result can be differentiated again.
        reference: the operator in plain differentiable torch. It computes whatever is differentiated in forward mode,
            and the gradients too while that mode is on. That is slow, but right for derivatives of every order.
        forward_mode: is called in place of `reference` for operands that have tangents.
    """
    operator = getattr(torch.ops.dcn_d2, name).default
    below_autograd = torch._C._after_autograd_keyset
    defaults = [argument.default_value for argument in operator._schema.arguments]

    # torch.func wraps the operands level by level before the dispatcher calls `autograd` below. So a function of a
    # single level is right here. `torch.autograd.Function` would wrap them once more.
    class Node(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            ctx.save_for_backward(*(argument if isinstance(argument, Tensor) else None for argument in arguments))
            ctx.others = [None if isinstance(argument, Tensor) else argument for argument in arguments]
            if not transforms_active():
                with torch._C._AutoDispatchBelowAutograd():
                    return operator.redispatch(keyset & below_autograd, *arguments)
            # torch turned gradients and forward mode off for this function, but the next transform may need them.
            with torch.enable_grad(), _set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keyset & below_autograd, *arguments)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            arguments = [other if saved is None else saved for saved, other in zip(ctx.saved_tensors, ctx.others)]
            needed = ctx.needs_input_grad[1:]
            if _in_forward_mode((*arguments, *grads)):
                # A kernel would lose the tangents. They may lie on a level that cannot be seen here.
                return None, *pull_back(reference, arguments, needed, grads)
            return None, *backward(arguments, needed, *grads)

        @staticmethod
        def _compiled_autograd_key(ctx: Any) -> tuple[int]:  # torch.autograd.Function has it, this base class has not
            return (ctx._autograd_function_id,)

    Node.__name__ = f"{name}_node"

    def autograd(keyset: Any, *args: Any) -> Any:
        if (forward_ad._current_level >= 0 or transforms_active() or modes_active()) and any(map(_has_tangent, args)):
            return (forward_mode or reference)(*args, *defaults[len(args) :])
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keyset & below_autograd, *args)
        arguments = (*args, *defaults[len(args) :])  # the dispatcher drops arguments that equal their defaults
        if not transforms_active():
            return Node.apply(keyset, *arguments)  # type: ignore[attr-defined]
        with enable_single_level_autograd_function():
            return Node.apply(keyset, *arguments)  # type: ignore[attr-defined]

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    torch.library.register_vmap(f"dcn_d2::{name}", _sample_by_sample(operator), lib=LIBRARY)


def register_second_derivatives(name: str, reference: Callable[..., tuple[Tensor, ...]]) -> None:
    """Makes a backward operator differentiable, any number of times, by the reference: slow, but right."""

    def backward(arguments: Sequence[Any], needed: Sequence[bool], *grads: Tensor) -> list[Tensor | None]:
        return pull_back(reference, arguments, needed, grads)

    def forward_mode(*_: Any) -> Any:
        raise RuntimeError(
            f"torch.ops.dcn_d2.{name} is not differentiable in forward mode (torch.func.jvp, jacfwd, dual numbers). "
            "Call the operator without _backward in its name, and differentiate that."
        )

    register_derivatives(name, backward, reference, forward_mode)


def _in_forward_mode(arguments: Sequence[Any]) -> bool:
    if forward_ad._current_level >= 0 or torch.compiler.is_dynamo_compiling():
        return forward_ad._current_level >= 0  # Dynamo reads this code too, and cannot read what follows
    # A graph that was made from torch.func.jvp enters a level that the one above does not count.
    if transforms_active() and any(each.key() == TransformType.Jvp for each in get_interpreter_stack() or ()):
        return True
    return bool(modes_active()) and any(map(_has_tangent, arguments))


def _has_tangent(argument: Any) -> bool:
    """Whether a tensor has a tangent. To find out takes as long as a small operator."""
    if not isinstance(argument, Tensor):
        return False
    while is_batchedtensor(argument):
        argument = get_unwrapped(argument)
    with torch._C._DisableTorchDispatch():  # else this would be recorded in traced graphs
        return torch._VF._unpack_dual(argument, level=0).tangent is not None


def _sample_by_sample(operator: Any) -> Callable[..., Any]:
    """The vmap rule: calls the operator for each sample, and stacks what it gives."""

    def rule(info: Any, in_dims: Sequence[Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        def sample(index: int) -> Any:
            chosen = (
                # A sum over no samples is zero.
                (arg.select(dim, index) if info.batch_size else arg.sum(dim))
                if isinstance(arg, Tensor) and dim is not None
                else arg
                for arg, dim in zip(args, in_dims)
            )
            return operator(*chosen, **kwargs)

        # Without samples, one call tells the shapes and dtypes. `stacked` then keeps nothing of it.
        results = [sample(index) for index in range(max(info.batch_size, 1))]

        def stacked(*tensors: Tensor) -> Tensor:
            return torch.stack(tensors)[: info.batch_size]

        if isinstance(results[0], Tensor):
            return stacked(*results), 0
        return tuple(map(stacked, *results)), (0,) * len(results[0])

    return rule
