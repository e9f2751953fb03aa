# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Output files: names of their own, and nothing is overwritten but our own pictures of an earlier run."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from PIL import Image

from dcn_d2.outputs import PictureFolder, unique_stems


def picture(color: str) -> Image.Image:
    return Image.new("RGB", (4, 3), color)


def color(path: Path) -> tuple[int, ...]:
    return Image.open(path).getpixel((0, 0))


@pytest.mark.parametrize(
    "files, stems",
    [
        (["x1/a.png", "x2/a.png", "x2/b.png"], ["a", "a_2", "b"]),
        (["b.png", "b.jpg", "B.tif"], ["b", "b_2", "B_3"]),
        (["a.png", "x/a.png", "a_2.png"], ["a", "a_3", "a_2"]),
        (["a_2.png", "a.png", "x/a.png"], ["a_2", "a", "a_3"]),
        (["ü ß.png", "x y/ü ß.png"], ["ü ß", "ü ß_2"]),
        ([], []),
    ],
)
def test_files_of_one_name_get_stems_of_their_own(files: list[str], stems: list[str]) -> None:
    assert unique_stems(files) == stems


def test_a_second_run_replaces_the_pictures_of_the_first(tmp_path: Path) -> None:
    for value in ("red", "blue"):
        folder = PictureFolder(tmp_path / "new" / "folder")
        path = folder.write("a.png", picture(value))
    assert color(path) == (0, 0, 255)
    assert [file.name for file in path.parent.iterdir()] == ["a.png"], "no temporary file is left"
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600


def test_one_run_does_not_write_a_name_twice(tmp_path: Path) -> None:
    folder = PictureFolder(tmp_path)
    path = folder.write("a.png", picture("red"))
    with pytest.raises(FileExistsError, match=r"a\.png is an input or output of this run"):
        folder.write("a.png", picture("blue"))
    assert color(path) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["another picture", "no picture", "link", "broken link", "folder"])
def test_files_that_are_not_ours_stay(tmp_path: Path, kind: str) -> None:
    folder, path, other = PictureFolder(tmp_path), tmp_path / "a.png", tmp_path / "other.png"
    picture("red").save(other)
    if kind == "another picture":
        picture("red").save(path)
    elif kind == "no picture":
        path.write_bytes(b"weights")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(other if kind == "link" else tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match=r"a\.png exists, and dcn_d2 has not written it"):
        folder.write("a.png", picture("blue"))
    assert color(other) == (255, 0, 0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "other.png"]


def test_inputs_stay_even_if_they_are_our_pictures(tmp_path: Path) -> None:
    path = PictureFolder(tmp_path).write("a.png", picture("red"))
    (tmp_path / "sub").mkdir()
    folder = PictureFolder(tmp_path, [tmp_path / "sub" / ".." / "a.png"])
    with pytest.raises(FileExistsError, match="is an input or output of this run"):
        folder.write("a.png", picture("blue"))
    assert color(path) == (255, 0, 0)


def test_a_failed_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = PictureFolder(tmp_path).write("a.png", picture("red"))
    new = picture("blue")

    def fail(file: object, *_: object, **__: object) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(new, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        PictureFolder(tmp_path).write("a.png", new)
    assert color(path) == (255, 0, 0)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            PictureFolder(path)
    monkeypatch.setattr("os.access", lambda *_: False)  # whoever runs the tests as root may write everywhere
    with pytest.raises(PermissionError, match="may not be written to"):
        PictureFolder(tmp_path)
