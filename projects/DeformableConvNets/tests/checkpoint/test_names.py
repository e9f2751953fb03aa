# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import re

import numpy as np
import pytest

from dcn_d2.checkpoint import names
from dcn_d2.checkpoint.names import Rule, backwards, rename
from dcn_d2.checkpoint.provenance import convert_checkpoint

VALUE = np.zeros(1)


def one_name(pattern: str, head: str = "1.") -> str:
    """A name that a side of a rule matches: every number is 2, plus what the side adds to it."""
    pattern = re.sub(r"\{h\.\}", head, pattern.replace("*", "bias"))
    return re.sub(r"\{\w(?:\+(\d+))?\}", lambda field: str(2 + int(field[1] or 0)), pattern)


def renamed(name: str, rules: tuple[Rule, ...]) -> str:
    (new_name,) = rename({name: VALUE}, rules, "of a test", left_out="never")
    return new_name


@pytest.mark.parametrize("head", ["", "1."])
@pytest.mark.parametrize("rules", [names.RESNET, names.DETECTOR], ids=["RESNET", "DETECTOR"])
def test_every_rule_is_used_and_goes_back(rules: tuple[Rule, ...], head: str) -> None:
    for theirs, ours in rules:
        assert renamed(one_name(theirs, head), rules) == one_name(ours, head)
        back = renamed(one_name(ours, head), backwards(rules))
        # The offset branch had another name until early 2020, to which nothing goes back.
        assert back == one_name(theirs, head).replace(".conv2_offset.", ".conv2.conv_offset.")


@pytest.mark.parametrize(
    "name",
    [
        "layer0.0.conv1.weight",  # stages begin with 1, or with 2 in Detectron2,
        "layer5.0.conv1.weight",  # and there are four of them
        "layer1.0.conv4.weight",
        "layer1.0.conv1.bias",  # BatchNorm follows, so these convolutions have no bias
        "layer1.conv1.weight",
        "bn1.scale",
        "a.conv1.weight",
        "conv1.weight.a",
    ],
)
def test_a_name_that_no_rule_matches_is_unknown(name: str) -> None:
    with pytest.raises(ValueError, match=rf"of a test, .*:\n  {re.escape(name)} is unknown$"):
        rename({"conv1.weight": VALUE, name: VALUE}, names.RESNET, "of a test", left_out="never")


@pytest.mark.parametrize("name", ["res1.0.conv1.weight", "res6.0.conv1.weight"])
def test_numbers_are_checked_on_the_way_back_too(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is unknown"):
        rename({name: VALUE}, backwards(names.RESNET), "of a test", left_out="never")


def test_what_has_no_counterpart_is_left_out() -> None:
    weights = {"fc.bias": VALUE, "bn1.num_batches_tracked": VALUE, "conv1.weight": VALUE}
    left_out = f"{names.CLASSIFIER}|{names.COUNTERS}"
    assert rename(weights, names.RESNET, "of a test", left_out) == {"stem.conv1.weight": VALUE}
    kept = rename({"bn1.num_batches_tracked": VALUE}, names.RESNET, "of a test", names.CLASSIFIER)
    assert kept == {"stem.conv1.norm.num_batches_tracked": VALUE}


def test_further_problems_are_listed_once() -> None:
    with pytest.raises(ValueError) as error:
        rename({"a": VALUE}, names.RESNET, "of a test", "never", problems=["b is missing", "b is missing"])
    assert str(error.value).splitlines()[1:] == ["  a is unknown", "  b is missing"]


def test_messages_show_no_control_characters_of_names() -> None:
    evil = {"x\x1b[31m\ny": np.ones(1), "z" * 1000: np.ones(1)}
    with pytest.raises(ValueError, match="unknown") as unknown:
        names.rename(evil, names.DETECTOR, "of MMDetection", "(?!)")
    with pytest.raises(ValueError, match="neither") as foreign:
        convert_checkpoint(evil, "a file")
    for message in map(str, (unknown.value, foreign.value)):
        assert r"x\x1b[31m\ny" in message and "\x1b" not in message and len(message) < 500


def test_a_file_without_entries_is_said_to_have_none() -> None:
    with pytest.raises(ValueError, match="it has no entries"):
        convert_checkpoint({"state_dict": {}}, "a file")
