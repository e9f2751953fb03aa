# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The output folder: what it holds after kills, what is missing, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dcn_d2.prediction.merge import records_of
from dcn_d2.prediction.run_folder import RunFolder, count_missing, read_done
from dcn_d2.prediction.shards import Shard

SETTINGS: dict[str, Any] = {"inputs": 3, "videos": [2], "frames": 2, "categories": [], "config": {"A.B": "1"}}


def line(number: int, frame: int | None = None, kind: str = "image", **others: Any) -> dict[str, Any]:
    return {"number": number, "frame": frame, "kind": kind, "file_name": f"{number}"} | others


def write(folder: Path, *lines: dict[str, Any], shard: Shard | None = None) -> Path:
    with RunFolder(str(folder), shard or Shard(), SETTINGS) as run:
        for each in lines:
            run.write(each)
    return folder


def missing(folder: Path) -> int:
    return count_missing(SETTINGS, read_done(folder))


def test_what_is_missing(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", line(1))
    assert missing(folder) == 2, "image 3, and the video, whose length is not known"
    write(folder, line(3, kind="error"), line(2, 0), line(2, 5, "end", length=5))
    assert missing(folder) == 2, "frames 2 and 4"
    write(folder, line(2, 2), line(2, 4, "error"), shard=Shard(1, 2))
    assert missing(folder) == 0
    assert [(record["number"], record["frame"]) for record in records_of(read_done(folder))] == [
        (1, None),
        (2, 0),
        (2, 2),
    ]


def test_a_success_counts_more_than_an_error(tmp_path: Path) -> None:
    write(tmp_path, line(1, kind="error"))
    write(tmp_path, line(1), shard=Shard(1, 3))
    write(tmp_path, line(1, kind="error"), shard=Shard(2, 3))
    done = read_done(tmp_path)
    assert list(done.images) == [(1, None)] and not done.errors


@pytest.mark.parametrize("end", [b'{"number": 3, "frame": null, "kind": "image", "fi', b"\0\0\0\0", b"no json\n", b"{"])
def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path, end: bytes) -> None:
    write(tmp_path, line(1), line(2, 0))
    part = tmp_path / "parts" / "1-of-1" / "images.jsonl"
    part.write_bytes(part.read_bytes() + end)
    assert list(read_done(tmp_path).images) == [(1, None), (2, 0)]
    write(tmp_path, line(3))
    assert list(read_done(tmp_path).images) == [(1, None), (2, 0), (3, None)]
    assert [json.loads(text)["number"] for text in part.read_text().splitlines()] == [1, 2, 3]


def test_shards_that_start_together_agree_on_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def late(source: Any, target: Any) -> None:
        """Another shard with another command was faster."""
        monkeypatch.setattr(os, "link", link)
        RunFolder(str(tmp_path), Shard(2, 2), SETTINGS | {"config": {"A.B": "2"}})
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(FileExistsError, match=r"another command \(A.B was 2, is 1\)"):
        RunFolder(str(tmp_path), Shard(1, 2), SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    RunFolder(str(tmp_path), Shard(), SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_run_json_of_others_is_refused(tmp_path: Path) -> None:
    for text in ("[]", "{}", "x"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match="run.json was not written by predict.py"):
            RunFolder(str(tmp_path), Shard(), SETTINGS)
