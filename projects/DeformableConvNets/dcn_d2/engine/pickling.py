# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""How a predictor is pickled without its weights: whether they can be read again, and whether the same were read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_RANDOM = {Tensor.uniform_, Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.trunc_normal_}
_RANDOM |= {nn.init.kaiming_uniform_, nn.init.kaiming_normal_, nn.init.xavier_uniform_, nn.init.xavier_normal_}


class WithoutRandomWeights(TorchFunctionMode):
    """Leaves parameters as they are where a model fills them with random numbers, which takes most of building it.

    Only for a model whose parameters are all loaded afterwards. Buffers get their values.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        if func in _RANDOM and isinstance(tensor, nn.Parameter):
            return tensor
        return func(*args, **kwargs)


def fingerprint(model: nn.Module) -> list[tuple[str, int, int, int]]:
    """Changes when weights are replaced or changed in place; takes less than a tenth of a second."""
    entries = model.state_dict(keep_vars=True).items()
    return [(name, t.data_ptr(), 0 if t.is_inference() else t._version, _sum_of_bits(t)) for name, t in entries]


def _sum_of_bits(tensor: Tensor) -> int:
    """The sum of a tensor's values, read as whole numbers: exact in any order. `.data` changes them unnoticed else."""
    values = tensor.detach().contiguous().reshape(-1)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(values.element_size(), torch.uint8)
    return int(values.view(whole).sum(dtype=torch.int64))


def digest(model: nn.Module) -> str:
    """The same for the same weights, on every machine and whatever file they were read from."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = tensor.detach().cpu().contiguous()
        found.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        found.update(values.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
