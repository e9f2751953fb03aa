# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The kinds of rules that say what a value of a config may be; `dcn_d2.config.table` gives one to each key.

A rule is a function of a value. It gives None if the value is right. Otherwise it gives what the value must be, as the
end of a sentence that begins with the key: "must be a whole number from 1 to 65536".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .messages import listed, nearest

Rule = Callable[[Any], "str | None"]

LARGEST_WHOLE = 2**53  # a float holds whole numbers up to this exactly; torch refuses larger ones where it wants floats
HUGE = 2**31 - 1  # more iterations, images or boxes than this are a mistake
WIDEST = 65536  # channels of a layer; more are a mistake, which would end as an error of the memory allocator

DETECTRON2_POOLERS = ("ROIAlign", "ROIAlignV2", "ROIAlignRotated", "ROIPool")


def flag(value: Any) -> str | None:
    """True or False; 1 and 0 mean the same."""
    return None if type(value) in (bool, int) and value in (0, 1) else "must be True or False"


def text(value: Any) -> str | None:
    """Any string."""
    return None if isinstance(value, str) else "must be a string"


def metric(value: Any) -> str | None:
    """The name of a number of an evaluation, in parts, or "" for none."""
    if value == "" or isinstance(value, str) and value.isprintable() and all(map(str.strip, value.split("/"))):
        return None
    return 'must be "" or the name of a metric, for example "bbox/AP" or "validation_loss"'


def name(value: Any) -> str | None:
    """A string that is not empty."""
    return None if isinstance(value, str) and value.strip() else "must be a name"


def line(least: int = 0) -> Rule:
    """One line of text, without control characters, of at least so many characters."""

    def check(value: Any) -> str | None:
        fits = isinstance(value, str) and value.isprintable() and len(value.strip()) >= least
        return None if fits else f"must be one line of text{' that is not empty' if least else ''}"

    return check


def folder_name(value: Any) -> str | None:
    """A folder without ~ in front: nothing replaces it here, and a folder with the name ~ is dangerous to remove."""
    if isinstance(value, str) and value.startswith("~"):
        return "must be a folder without ~, which is not replaced in configs; write the path of the home folder out"
    return name(value)


def whole(low: int, high: int = HUGE, besides: int | None = None, meaning: str = "") -> Rule:
    """A whole number from `low` to `high`.

    Args:
        low: the smallest number.
        high: the largest number.
        besides: one further number that is allowed.
        meaning: of the special number, for the message.
    """
    allowed = f"must be a whole number from {low} to {high}"
    if high == HUGE:
        allowed = f"must be a whole number of at least {low}"
    if besides is not None:
        allowed += f", or {besides}"
    if meaning:
        allowed += f" ({meaning})"

    def rule(value: Any) -> str | None:
        if type(value) is int and (low <= value <= high or value == besides):
            return None
        return f"{allowed}, not more than {high}" if type(value) is int and value > HUGE else allowed

    return rule


def number(
    low: float,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    besides: float | None = None,
    infinite: bool = False,
) -> Rule:
    """A number from `low` to `high`, never NaN.

    Args:
        low: the smallest number.
        high: the largest number.
        above: `low` itself is not allowed.
        below: `high` itself is not allowed.
        besides: one further number that is allowed.
        infinite: infinity is allowed.
    """
    start = f"above {low:g}" if above else f"from {low:g}"
    if high < math.inf:
        allowed = (
            f"must be a number {start} {'and below' if above and below else 'to below' if below else 'to'} {high:g}"
        )
    else:
        allowed = f"must be a finite number {'above' if above else 'of at least'} {low:g}"
    if besides is not None:
        allowed += f", or {besides:g}"

    def rule(value: Any) -> str | None:
        if type(value) is int and abs(value) > LARGEST_WHOLE:
            return f"{allowed}, and a whole number must not be above {LARGEST_WHOLE}"
        right = type(value) in (int, float) and (infinite or math.isfinite(value))
        right = right and (low < value if above else low <= value) and (value < high if below else value <= high)
        return None if right or (type(value) in (int, float) and value == besides) else allowed

    return rule


def choice(*choices: Any) -> Rule:
    """One of `choices`."""

    def rule(value: Any) -> str | None:
        if any(type(value) is type(other) and value == other for other in choices):
            return None
        hint = nearest(value, (other for other in choices if isinstance(other, str))) if isinstance(value, str) else ""
        return f"must be {listed(choices)}{hint}"

    return rule


def several(rule_of_one: Rule, *, length: int | None = None, least: int = 0) -> Rule:
    """A list or tuple whose values all follow one rule.

    Args:
        rule_of_one: for each value.
        length: how many values there must be.
        least: how many values there must be at least.
    """

    def rule(value: Any) -> str | None:
        count = f"{length} " if length is not None else f"at least {least} " if least > 1 else ""
        if not isinstance(value, (list, tuple)):
            return f"must be a list of {count}values, as [...] or (...,)"
        if length is not None and len(value) != length or len(value) < least:
            return f"must have {count}values" if count else "must not be empty"
        for position, one in enumerate(value):
            problem = rule_of_one(one)
            if problem is not None:
                return f"{problem} in all its values (number {position + 1} is {one!r})"
        return None

    return rule


def canvas(value: Any) -> str | None:
    """The size of a canvas, (height, width), or () for none."""
    sides = value if isinstance(value, (list, tuple)) else [value]
    if len(sides) in (0, 2) and all(type(side) is int and 1 <= side <= WIDEST for side in sides):
        return None
    return f"must be (height, width), whole numbers from 1 to {WIDEST}, or () for no limit"


def either(rule_of_one: Rule, value_of_none: str) -> Rule:
    """What `rule_of_one` allows, or None; `value_of_none` says in the message what None means."""

    def rule(value: Any) -> str | None:
        problem = None if value is None else rule_of_one(value)
        return problem and f"{problem}, or None ({value_of_none})"

    return rule


def increasing(rule_of_one: Rule, least: int = 1, strictly: bool = False) -> Rule:
    """A list in increasing order, of at least `least` values; with `strictly`, all are different."""
    values_rule = several(rule_of_one, least=least)

    def rule(value: Any) -> str | None:
        problem = values_rule(value)
        if problem is None and list(value) != sorted(value):
            return "must be in increasing order"
        if problem is None and strictly and len(set(value)) < len(value):
            return "must not have a value twice"
        return problem

    return rule


def device(value: Any) -> str | None:
    """A device of torch."""
    import torch

    problem = 'must name a device of torch, for example "cpu", "cuda" or "cuda:0"'
    if not isinstance(value, str):
        return problem
    try:
        torch.device(value)
    except RuntimeError:
        return problem + nearest(value.partition(":")[0], ("cpu", "cuda"))
    return None


def image_format(value: Any) -> str | None:
    """A format that Detectron2 converts images to: a mode of PIL, BGR or YUV-BT.601."""
    if isinstance(value, str) and channels_of(value) is not None:
        return None
    hint = nearest(value, ("BGR", "RGB", "L")) if isinstance(value, str) else ""
    return f"must be BGR, YUV-BT.601, or a mode of PIL, for example RGB or L (grey){hint}"


def channels_of(image_format: str) -> int | None:
    """Gives the number of channels of images in a format, or None if PIL does not know the format."""
    from PIL import ImageMode

    if image_format in ("BGR", "YUV-BT.601"):
        return 3
    try:
        return len(ImageMode.getmode(image_format).bands)
    except KeyError:
        return None


def box_pooler(value: Any) -> str | None:
    """A pooler of Detectron2 or of dcn_d2."""
    from ..modeling.poolers import ROI_POOLER_REGISTRY

    return choice(*DETECTRON2_POOLERS, *(name for name, _ in ROI_POOLER_REGISTRY))(value)


def pooler_or_none(value: Any) -> str | None:
    """What `box_pooler` allows, or "" for a head without a pooler."""
    return None if value == "" else box_pooler(value)


def deform_stages(value: Any) -> str | None:
    """Four flags, for the stages res2 to res5."""
    if isinstance(value, (list, tuple)) and len(value) != 4:
        return "needs 4 values, for res2 to res5"
    return several(flag, length=4)(value)
