# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""dev/campaign/configs.py: it finds nothing now, and it would find what it looks for."""

import json
from pathlib import Path

import pytest

from dcn_d2.config import checks
from dcn_d2.config.table import RULES
from dev.campaign import configs
from dev.campaign.configs import Case


def test_no_odd_value_ends_otherwise_than_refused_or_working() -> None:
    summary = configs.run(seed=0, count=120, try_out=False)
    assert summary["faults"] == [] and summary["cases"] == 120
    assert summary["outcomes"]["refused"] > 60


@pytest.mark.slow
def test_accepted_values_work() -> None:
    assert configs.run(seed=1, count=1000, try_out=True)["faults"] == []


def test_a_run_is_repeated_by_its_seed() -> None:
    first, again, other = (configs.all_cases(seed) for seed in (3, 3, 4))
    assert list(map(repr, first)) == list(map(repr, again)) != list(map(repr, other))
    assert {case.key for case in first} == set(RULES) and {case.door for case in first} == set(configs.DOORS)


@pytest.mark.parametrize("door", configs.DOORS)
def test_a_value_that_is_taken_and_fails_later_is_a_fault(
    door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(door, "MODEL.RESNETS.NORM", "BNN")
    assert configs.run_case(case, tmp_path, {}).outcome == "refused"
    monkeypatch.setitem(RULES, case.key, lambda value: None)
    result = configs.run_case(case, tmp_path, {})
    assert result.outcome == "FAULT" and result.message.startswith("accepted, then KeyError")


@pytest.mark.parametrize(
    "problems, message",
    [
        ([("SEED", "something is wrong")], "the message does not name the key"),
        ([("SEED", "SEED is wrong")], "the message does not give the value"),
        ([("SEED", "SEED is wrong, got -7" + " " * 3000)], "a message of 30"),
    ],
)
def test_a_poor_message_is_a_fault(
    problems: list, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "find_problems", lambda *arguments: problems)
    result = configs.run_case(Case("code", "SEED", -7), tmp_path, None)
    assert result.outcome == "FAULT" and result.message.startswith(message)


def test_another_exception_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "SEED", lambda value: 1 / 0)
    result = configs.run_case(Case("code", "SEED", -7), tmp_path, None)
    assert result.outcome == "FAULT" and result.message.startswith("ZeroDivisionError instead of ConfigError")


def test_command_line_writes_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert configs.main(["--cases", "5", "--seed", "3", "--check-only", "--output", str(tmp_path / "a.json")]) == 0
    summary = json.loads((tmp_path / "a.json").read_text())
    assert summary["seed"] == 3 and summary["cases"] == 5 and summary["faults"] == []
    assert "5 cases with seed 3" in capsys.readouterr().out
