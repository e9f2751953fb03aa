# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Files that are damaged, or made to do harm: one clear line, in little time and memory."""

import io
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcn_d2.checkpoint import CorruptCheckpointError, read_checkpoint
from dcn_d2.checkpoint.reader import peek
from dcn_d2.checkpoint.unpickler import MAX_OPERATIONS
from dcn_d2.checkpoint.weights import as_data, check_weights, read_weights

LEGACY = {"_use_new_zipfile_serialization": False}


def refused(path: Path, match: str) -> None:
    """Reading is refused in one line, within 10 seconds of the processor and 500 MB."""
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(ValueError, match=match) as error:
            read_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 500 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 10
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def with_pickle(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", content)
        for name, data in members.items():
            archive.writestr(f"a/{name}", data)
    return path


def test_list_nested_twice_in_itself_does_not_hang(tmp_path: Path) -> None:
    nested: list = []
    for _ in range(28):
        nested = [nested, nested]
    torch.save({"model": {"a": torch.zeros(1)}, "nested": nested}, tmp_path / "a.pth")
    start = time.process_time()
    assert read_checkpoint(tmp_path / "a.pth")["model"].keys() == {"a"}
    assert time.process_time() - start < 5


@pytest.mark.parametrize("options", [{}, LEGACY, None], ids=["zip", "legacy", "pickle"])
def test_dictionary_that_contains_itself_is_refused(tmp_path: Path, options: dict | None) -> None:
    endless: dict = {"a": np.zeros(1) if options is None else torch.zeros(1)}
    endless["model"] = endless
    if options is None:
        (tmp_path / "a.pth").write_bytes(pickle.dumps(endless))
    else:
        torch.save(endless, tmp_path / "a.pth", **options)
    refused(tmp_path / "a.pth", "contains itself")


@pytest.mark.parametrize("depth, match", [(65, "nested more than 64 deep"), (300_000, "nested|operations")])
def test_deep_containers_are_refused(tmp_path: Path, depth: int, match: str) -> None:
    content = b"\x80\x02}X\x01\x00\x00\x00a" + depth * b"]" + (depth - 1) * b"a" + b"s."
    (tmp_path / "a.pth").write_bytes(content)
    refused(tmp_path / "a.pth", match)


def test_deep_tuple_as_a_key_does_not_crash(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"\x80\x02})" + 300_000 * b"\x85" + b"Ns.")
    refused(tmp_path / "a.pth", "neither text nor a number")


@pytest.mark.parametrize("filler", [b"]", b"}", b"\x8f", b"K\x01", b"N0"])
def test_endless_operations_are_refused(tmp_path: Path, filler: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(b"\x80\x04}" + (MAX_OPERATIONS + 10) * filler + b".")
    refused(tmp_path / "a.pth", "more than 400,000 operations")


def test_zip_bomb_is_refused(tmp_path: Path) -> None:
    with_pickle(tmp_path / "a.pth", b"\x80\x02}.", zipfile.ZIP_DEFLATED, **{"data/0": bytes(200 << 20)})
    assert (tmp_path / "a.pth").stat().st_size < 1 << 20
    refused(tmp_path / "a.pth", "is compressed, which PyTorch never does")


def test_members_that_overlap_are_refused(tmp_path: Path) -> None:
    """A thousand names for the same bytes."""
    path = with_pickle(tmp_path / "a.pth", b"\x80\x02}.", **{f"data/{i}": bytes(1000) for i in range(9)})
    content = bytearray(path.read_bytes())
    position = 0
    while (position := content.find(b"PK\x01\x02", position)) >= 0:
        if b"data/" in content[position + 46 : position + 60]:  # each claims the space of all
            content[position + 20 : position + 28] = struct.pack("<LL", 9000, 9000)
        position += 4
    path.write_bytes(content)
    refused(path, "larger than the file")


def tensor(count: int, size: tuple, stride: tuple, offset: int = 0) -> bytes:
    """A pickle of one tensor with claims of its own."""

    class Claim:
        def __reduce__(self) -> tuple:
            storage = torch.zeros(4).untyped_storage()
            return torch._utils._rebuild_tensor_v2, (
                torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True),
                offset,
                size,
                stride,
                False,
                OrderedDict(),
            )

    buffer = io.BytesIO()
    torch.save({"a": Claim()}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return archive.read(name).replace(b"K\x04tq", b"K" + bytes([count]) + b"tq", 1)


@pytest.mark.parametrize(
    "claim, match",
    [
        (dict(count=200, size=(4,), stride=(1,)), "has 16 bytes instead of 800"),
        (dict(count=4, size=(5,), stride=(1,)), r"shape \[5\] reaches beyond its 4 stored"),
        (dict(count=4, size=(2,), stride=(4,)), "reaches beyond"),
        (dict(count=4, size=(1,), stride=(1,), offset=4), "reaches beyond"),
        (dict(count=4, size=(1,), stride=(1,), offset=-1), "not a whole number from 0"),
        (dict(count=4, size=(2,), stride=(-1,), offset=3), "not a whole number from 0"),
        (dict(count=4, size=(1 << 30, 1 << 30), stride=(0, 0)), "many times more values than the file"),
        (dict(count=4, size=(1 << 61, 1 << 61, 0), stride=(1, 1, 1)), "checkpoint"),
        (dict(count=4, size=(1,), stride=(1, 1)), "1 sizes and 2 strides"),
        (dict(count=4, size=tuple(40 * [1]), stride=tuple(40 * [1])), "40 dimensions"),
    ],
)
def test_tensor_that_claims_too_much_is_refused(tmp_path: Path, claim: dict, match: str) -> None:
    refused(with_pickle(tmp_path / "a.pth", tensor(**claim), **{"data/0": bytes(16)}), match)


def test_tensor_as_written_is_read(tmp_path: Path) -> None:
    """So that the test above fails for the reason it names."""
    content = np.arange(4, dtype=np.float32).tobytes()
    claim = tensor(count=4, size=(2, 2), stride=(1, 2))
    found = read_checkpoint(with_pickle(tmp_path / "a.pth", claim, **{"data/0": content}))
    assert found["a"].tolist() == [[0, 2], [1, 3]]


def test_old_format_that_claims_too_much_takes_no_memory(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(77777)}, tmp_path / "a.pth", **LEGACY)
    content = (tmp_path / "a.pth").read_bytes()
    assert content.count(struct.pack("<L", 77777)) >= 2
    (tmp_path / "a.pth").write_bytes(content.replace(struct.pack("<L", 77777), struct.pack("<L", 2_000_000_000)))
    refused(tmp_path / "a.pth", "claim to be larger than the file")


@pytest.mark.parametrize("part", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_changed_bytes_in_the_middle_are_found(tmp_path: Path, part: float) -> None:
    """torch.load does not compare the checksums of the zip archive."""
    torch.save({"model": {name: torch.rand(50, 50) for name in "abc"}}, tmp_path / "a.pth")
    content = bytearray((tmp_path / "a.pth").read_bytes())
    content[int(part * len(content))] ^= 0x40
    (tmp_path / "a.pth").write_bytes(content)
    refused(tmp_path / "a.pth", "Bad CRC-32")


@pytest.mark.parametrize(
    "value, match",
    [
        (torch.tensor([1.0, float("nan")]), r"b.weight holds NaN or infinite values \(1 of 2\)"),
        (torch.tensor(float("-inf")), r"b.weight holds NaN or infinite values \(1 of 1\)"),
        (torch.tensor([float("nan")]).to(torch.float8_e5m2), "b.weight holds NaN"),
        (torch.zeros(1, dtype=torch.complex64), "b.weight is of type complex64; weights are real"),
        (torch.zeros(1, dtype=torch.int32), "b.weight is of type int32; weights are floating-point"),
        (torch.zeros(1, dtype=torch.bool), "b.weight is of type bool"),
        (np.zeros(1, np.int64), "b.weight is of type int64"),
        (3.0, "b.weight is of type float, not a tensor"),
    ],
)
def test_what_is_no_weight_is_refused_by_name(value: Any, match: str) -> None:
    weights = {"a.weight": torch.zeros(3), "n.num_batches_tracked": torch.tensor(3), "b.weight": value}
    with pytest.raises(ValueError, match=f"f.pth is refused, 1 of its 3 entries are not weights:\n  {match}"):
        check_weights(weights, "f.pth")
    del weights["b.weight"]
    check_weights(weights, "f.pth")


@pytest.mark.filterwarnings("ignore:.*[qQ]uant")
@pytest.mark.parametrize(
    "make, kind",
    [
        (lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8), "a quantised tensor"),
        (lambda: torch.eye(3).to_sparse(), "a sparse tensor"),
        (lambda: torch.zeros(3, device="meta"), "a tensor of device meta"),
        (lambda: np.array(["a"]), "an array of U1"),
    ],
)
def test_tensor_of_another_kind_is_refused_by_name(tmp_path: Path, make: Any, kind: str) -> None:
    torch.save({"model": {"b.weight": make()}}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", f"a.pth is refused: model.b.weight is {kind}")


@pytest.mark.parametrize(
    "content, match",
    [
        (b"<!DOCTYPE html><html>Please log in</html>", "it is a web page"),
        (b"\n <html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"", "it is empty"),
        (b"hello", "not a checkpoint"),
    ],
)
def test_what_people_take_for_a_checkpoint_is_named(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    refused(tmp_path / "a.pth", match)


def test_entry_with_a_number_as_its_name_is_told(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1), 101: torch.zeros(1)}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth: an entry is called '101', which is of type int, not text"):
        read_weights(str(tmp_path / "a.pth"))


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: {"blobs": data, "cfg": "a: 1"}])
def test_arrays_of_caffe2_come_from_our_own_reader(tmp_path: Path, wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is checked first and then read again with `pickle.load`."""
    blobs = {"conv1_w": np.arange(6, dtype=">f4").reshape(2, 3), "conv1_w_momentum": np.zeros(1)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(wrap(blobs), protocol=2))

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle was executed")

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, never)
    found = read_weights(str(tmp_path / "a.pkl"))
    assert found["matching_heuristics"] and found["__author__"] == "Caffe2" and found["model"].keys() == {"conv1_w"}
    np.testing.assert_array_equal(found["model"]["conv1_w"], blobs["conv1_w"])
    torch.from_numpy(found["model"]["conv1_w"])  # which takes the machine's byte order only


def test_peeking_reads_no_values(tmp_path: Path) -> None:
    for options in ({}, LEGACY):
        torch.save({"model": {"a": torch.rand(3, 4)}, "iteration": 7}, tmp_path / "a.pth", **options)
        found = peek(tmp_path / "a.pth")
        assert found["iteration"] == 7 and found["model"]["a"].is_meta and found["model"]["a"].shape == (3, 4)


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.uint16, torch.float8_e4m3fn])
def test_views_and_types_are_read_as_torch_reads_them(tmp_path: Path, options: dict, dtype: torch.dtype) -> None:
    if options and dtype in (torch.uint16, torch.float8_e4m3fn):
        pytest.skip("newer than the format")
    base = torch.arange(24).to(dtype)
    data = {
        "model": OrderedDict(a=base[3:15].view(3, 4).t(), b=base, c=torch.nn.Parameter(torch.rand(2)), d=base[:0]),
        "rest": [torch.Size([1, 2]), torch.float16, {1: (2.5, None, True)}, torch.tensor(3 + 4j), b"bytes"],
    }
    torch.save(data, tmp_path / "a.pth", **options)
    mine, theirs = read_checkpoint(tmp_path / "a.pth"), torch.load(tmp_path / "a.pth", weights_only=True)
    for name, value in theirs["model"].items():
        found = mine["model"][name]
        assert found.dtype == value.dtype and found.shape == value.shape and found.stride() == value.stride()
        assert torch.equal(found.float(), value.float())
    assert mine["model"]["a"].untyped_storage().data_ptr() == mine["model"]["b"].untyped_storage().data_ptr()
    assert list(mine["rest"][:3]) == theirs["rest"][:3] and torch.equal(mine["rest"][3], theirs["rest"][3])


@pytest.mark.parametrize("value", [{1, 2}, Path("a"), print, object(), np.array(["a"])])
def test_saving_refuses_what_loading_refuses(value: object, tmp_path: Path) -> None:
    if isinstance(value, set):
        assert as_data(value, "x") == value
        return
    with pytest.raises(ValueError, match=r"x\['y'\]\[1\] cannot be saved: .*[Ss]ave its"):
        as_data({"y": [1, value]}, "x")


def test_truncated_numbers_in_the_old_format_are_found(tmp_path: Path) -> None:
    torch.save({"a": torch.rand(100)}, tmp_path / "a.pth", **LEGACY)
    content = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(content[:-1])
    with pytest.raises(CorruptCheckpointError, match="ends before the 400 bytes"):
        read_checkpoint(tmp_path / "a.pth")


def test_endless_names_make_no_endless_messages(tmp_path: Path) -> None:
    name = 3000 * "long\n"
    torch.save({name: torch.eye(3).to_sparse()}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", r"a.pth is refused: long\\nlong.{90,120}… is a sparse tensor")
    (tmp_path / "a.pth").write_bytes(b"\x80\x02cposix\n" + 3000 * b"system" + b"\n.")
    with pytest.raises(ValueError, match="posix.systemsystem") as error:
        read_checkpoint(tmp_path / "a.pth")
    assert len(str(error.value)) < 600
