# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Which files an input means, and how they are dealt out to shards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dcn_d2.prediction.manifests import read_coco, read_manifest
from dcn_d2.prediction.shards import Shard
from dcn_d2.prediction.sources import Source, find_sources, image_id_of, stems_of


def touch(folder: Path, *names: str) -> list[str]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [str(folder / name) for name in names]


def paths(*inputs: Path | str, images: str | None = None, output: str = "") -> list[str]:
    return [item.path for item in find_sources([str(name) for name in inputs], images, output).items]


def test_a_folder_is_read_in_a_fixed_order_without_hidden_files_and_the_output(tmp_path: Path) -> None:
    expected = touch(tmp_path, "b.JPG", "c.png", "a/z.tiff", "a/b/film.mp4", "d/x.webp")
    touch(tmp_path, ".a.png", ".cache/a.png", "notes.txt", "out/pictures/c.png", "a/archive.zip")
    os.symlink(tmp_path, tmp_path / "a" / "loop")
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "dead.png")
    found = paths(tmp_path, output=str(tmp_path / "out"))
    assert found == [*expected[:2], str(tmp_path / "dead.png"), expected[3 - 1], *expected[3:]]
    assert [item.video for item in find_sources(expected).items] == [False, False, False, True, False]


def test_a_folder_that_does_not_exist_was_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"there is no file or folder {tmp_path}/photo"):
        paths(tmp_path / "photo")
    assert paths(tmp_path / "gone.png", tmp_path / "gone.MP4")  # listed as unreadable: the others are predicted


def test_a_folder_that_is_linked_twice_counts_once(tmp_path: Path) -> None:
    touch(tmp_path, "in/a/x.png")
    os.symlink(tmp_path / "in" / "a", tmp_path / "in" / "b")
    assert len(paths(tmp_path / "in")) == 1
    assert len(paths(tmp_path / "in", tmp_path / "in" / "a" / "x.png", tmp_path / "in" / "a")) == 1


def test_a_link_to_itself_is_one_unreadable_image_and_does_not_end_the_command(tmp_path: Path) -> None:
    (good,) = touch(tmp_path, "good.png")
    for name in ("loop", "loop.png"):
        os.symlink(name, tmp_path / name)
    assert paths(tmp_path) == [good, str(tmp_path / "loop.png")]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"latin \xe4.png")
    touch(tmp_path, name)
    assert paths(tmp_path) == [str(tmp_path / name)]
    (tmp_path / "list.txt").write_bytes(b"latin \xe4.png\n")
    assert paths(tmp_path / "list.txt") == [str(tmp_path / name)]


def test_where_relative_paths_of_lists_start(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.png\n/data/b.png\nhttps://host/c.png\n")
    rest = ["/data/b.png", "https://host/c.png"]
    assert paths(tmp_path / "list.txt") == [str(tmp_path / "a.png"), *rest]
    assert paths(tmp_path / "list.txt", images="photos") == ["photos/a.png", *rest]


def test_images_of_coco_files_keep_their_ids_although_a_file_occurs_twice(tmp_path: Path) -> None:
    text = '{"images": [{"id": "x", "file_name": "a.png"}, {"id": 0, "file_name": "a.png"}], "categories": []}'
    (tmp_path / "c.json").write_text(text)
    items = find_sources([str(tmp_path / "c.json")], "photos").items
    assert [(item.number, item.path, item.image_id) for item in items] == [
        (1, "photos/a.png", "x"),
        (2, "photos/a.png", 0),
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"images": [{"id": 1}]}', "entry 0 of 'images' needs a 'file_name' and an 'id'"),
        ('{"images": [{"id": true, "file_name": "a"}]}', "needs a 'file_name' and an 'id'"),
        ('{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}', "two images have the id 1"),
        ('{"images": [], "categories": [{"id": "a"}]}', "a category needs an 'id'"),
        ('{"images": {}}', "it has no list 'images'"),
        ('{"images": [', "is not JSON"),
    ],
)
def test_coco_files_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_coco(str(tmp_path / "c.json"), None)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "", "there are none"),
        ("a.csv", "path,x\n,1\n", "line 2: the path is empty"),
        ("a.jsonl", '"a.png"\n[1]\n', r"line 2: a path was expected, got \[1\]"),
        ("a.jsonl", '{"name": "a"}\n', "line 1: no column is called file_name"),
        ("a.jsonl", "a.png\n", "line 1 is not JSON"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_manifest(str(tmp_path / name), None))


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_a_list_in_utf_16_is_named_as_such(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("path\na.png\n", encoding="utf-16")
    with pytest.raises(ValueError, match=f"{name} is text in UTF-16.*save it as UTF-8"):
        paths(tmp_path / name)


def test_names_with_a_null_byte_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\0.png\n")
    with pytest.raises(ValueError, match=r"'.*a\\x00.png' cannot be the name of a file"):
        paths(tmp_path / "a.txt")


@pytest.mark.parametrize("total", [1, 2, 3, 8])
@pytest.mark.parametrize("every", [1, 3])
def test_shards_have_each_image_and_frame_once_and_are_balanced(total: int, every: int) -> None:
    shards = [Shard(number, total) for number in range(1, total + 1)]
    sources = [Source(number, "", number) for number in range(1, 18)]
    parts = [[item.number for item in sources if shard.has_image(item)] for shard in shards]
    assert sorted(sum(parts, [])) == list(range(1, 18))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    parts = [[frame for frame in range(50) if shard.has_frame(frame, every)] for shard in shards]
    assert sorted(sum(parts, [])) == list(range(0, 50, every))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_ids_of_frames_meet_no_others() -> None:
    film, next_film = Source(1, "a.mp4", 1, True), Source(2, "b.mp4", 2, True)
    ids = [image_id_of(film, 0), image_id_of(film, 10**9 - 1), image_id_of(next_film, 0)]
    assert ids == sorted(set(ids)) and isinstance(ids[0], int) and ids[0] > 10**8


def test_thousands_of_files_of_one_name_get_stems_quickly() -> None:
    items = [Source(number, f"{number}/image.jpg", number) for number in range(1, 30001)]
    stems = stems_of(items)
    assert len(set(stems)) == 30000 and stems[:3] == ["image", "image_2", "image_3"]
