# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""A small run of each campaign of dev/campaign, and whether they would find what they look for."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dcn_d2.checkpoint import weights
from dev.campaign import checkpoints


def test_damaged_checkpoints_are_refused_or_load_as_they_were(tmp_path: Path, project: Path) -> None:
    command = [sys.executable, "dev/campaign/checkpoints.py", "--cases", "200", "--seed", "7"]
    done = subprocess.run(
        [*command, "--output", tmp_path / "out.json"], cwd=project, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out.json").read_text())
    assert summary["findings"] == [] and sum(summary["outcomes"].values()) == summary["cases"] == 200
    assert summary["outcomes"]["refused"] > 100 and len(summary["by_format"]) == len(checkpoints.make_seeds())


def test_a_case_is_the_same_each_time() -> None:
    seeds = {"zip": checkpoints.make_seeds()["zip"], "pickle 2": pickle.dumps({"a": 1}, 2)}
    for number in range(20):
        first, second = (checkpoints.Case(number, 3, seeds) for _ in range(2))
        assert first.content == second.content and first.name == second.name


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def judged(seeds: dict[str, bytes], scratch: Path, name: str, content: bytes, vouched: bool) -> tuple[str, str]:
    reader = checkpoints.Reader(scratch, seeds)
    case = checkpoints.Case(0, 0, {name: seeds[name]})
    case.by_address = case.in_cache = False
    case.name, case.content, case.vouched = "case.pkl", content, vouched
    return reader.judge(case)


def test_the_campaign_finds_other_values(scratch: Path) -> None:
    seeds = checkpoints.make_seeds()
    plain = seeds["pickle 2"]
    position = plain.find(b"n.num_batches_tracked")
    assert judged(seeds, scratch, "pickle 2", plain, vouched=True)[0] == "loaded as it was"
    other = plain.replace(b"a.bias", b"a.bios")
    assert position > 0 and judged(seeds, scratch, "pickle 2", other, vouched=False)[0].startswith("loaded with other")
    assert judged(seeds, scratch, "pickle 2", other, vouched=True)[0] == "finding"


@pytest.mark.parametrize(
    "fault, what",
    [
        (lambda path: pickle.loads(Path(path).read_bytes()), "UnpicklingError|EOFError"),
        (lambda path: (_ for _ in ()).throw(ValueError("something is wrong")), "does not name the file"),
        (lambda path: (_ for _ in ()).throw(MemoryError()), "MemoryError"),
    ],
)
def test_the_campaign_finds_errors_that_are_not_clean(fault: Any, what: str, scratch: Path) -> None:
    import re

    seeds = checkpoints.make_seeds()
    reader = checkpoints.Reader(scratch, seeds)
    case = checkpoints.Case(0, 0, {"pickle 2": seeds["pickle 2"]})
    case.by_address = case.in_cache = False
    case.name, case.content = "case.pkl", seeds["pickle 2"][:50]
    assert weights.read_weights is reader._read
    reader._read = fault
    outcome, sentence = reader.judge(case)
    assert outcome == "finding" and re.search(what, sentence)


def test_the_campaign_sees_what_code_would_do(tmp_path: Path) -> None:
    code = f"""
import os, sys, pickle
sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
from pathlib import Path
from dev.campaign.checkpoints import watch
seen = watch(Path({str(tmp_path / "scratch")!r}))
Path({str(tmp_path / "scratch")!r}, "a").write_text("")
assert not seen, seen
open({str(tmp_path / "thesis.txt")!r}, "w").close()
os.system("true")
pickle.loads(b"cposix\\ngetpid\\n)R.")
eval("1")
print(*(line.split()[0] for line in seen))
"""
    (tmp_path / "scratch").mkdir()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"open", "os.system", "pickle.find_class", "compile", "exec"} <= set(done.stdout.split())
