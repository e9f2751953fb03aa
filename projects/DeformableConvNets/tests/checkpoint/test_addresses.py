# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Addresses from strangers: what they may touch on this machine, and how long their servers may keep us waiting."""

import http.server
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from detectron2.utils.file_io import PathManager

from dcn_d2.checkpoint import CorruptCheckpointError, DCNCheckpointer, download, path_handlers, register_path_handlers
from dcn_d2.checkpoint.files import sha256_of
from dcn_d2.config import ConfigError, load_config

SMALL = {"rpn_head.rpn_cls.weight": torch.rand(3, 8, 1, 1), "rpn_head.rpn_cls.bias": torch.rand(3)}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers every request with `content`; what `mode` names goes wrong."""

    content, mode, requests = b"", "", 0

    def do_GET(self) -> None:  # noqa: N802
        cls = type(self)
        cls.requests += 1
        if cls.mode == "silent":
            time.sleep(2)
            return
        if self.path.startswith("/redirect"):
            self.send_response(302)
            self.send_header("Location", "/../../escaped.pth")
            self.end_headers()
            return
        self.send_response(503 if cls.mode == "busy" else 200)
        self.send_header("Content-Length", str(len(self.content)))
        self.send_header("Content-Disposition", "attachment; filename=../../../escaped.pth")
        self.end_headers()
        if cls.mode == "stalls" or cls.mode == "stalls once" and cls.requests == 1:
            self.wfile.write(self.content[:100])
            self.wfile.flush()
            time.sleep(1.5)
        elif cls.mode == "drips":
            for byte in self.content[:40]:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.05)
        else:
            self.wfile.write(self.content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def handler(tmp_path: Path) -> type[Handler]:
    torch.save({"state_dict": SMALL}, tmp_path / "served.pth")
    return type("Handler", (Handler,), {"content": (tmp_path / "served.pth").read_bytes()})


@pytest.fixture
def url(handler: type[Handler]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "a" / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    register_path_handlers()
    return tmp_path / "a" / "cache"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.mark.parametrize(
    "address",
    [
        "mmdet://http://nowhere.invalid/../victim/thesis.txt",
        "mmdet://http://nowhere.invalid/a/../../victim/thesis.txt",
        "mmdet://../../../victim/thesis.txt",
        "mmdet://http://nowhere.invalid/%2e%2e/victim/thesis.txt",
        "mmdet://http://nowhere.invalid/a%2f..%2fvictim/thesis.txt",
        "mmdet://http://nowhere.invalid/..\\victim\\thesis.txt",
        "mmdet://http://nowhere.invalid//victim/thesis.txt",
        "mmdet://http://nowhere.invalid/./thesis.txt",
        "mmdet://http://nowhere.invalid/a%00b.pth",
        "mmdet://http://nowhere.invalid/a\0b.pth",
        "mmdet://http://nowhere.invalid/a\nb.pth",
        "mmdet://http://nowhere.invalid/",
        "mmdet://http://nowhere.invalid",
        "mmdet://http:///a.pth",
        "mmdet://http://user:secret@nowhere.invalid/a.pth",
        "mmdet://http://nowhere.invalid:port/a.pth",
        "mmdet://http://[nowhere/a.pth",
        "mmdet://http://nowhere.invalid/a.pth#b",
        "mmdet://mmdet://a.pth",
        "mmdet://",
        "http://download.openmmlab.com/mmdetection/../../victim/thesis.txt",
    ],
)
def test_address_that_leads_out_of_the_cache_is_refused(address: str, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "a" / "victim").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "a"):
        (folder / "victim" / "thesis.txt").write_text("years of work")
    before = files(tmp_path)
    with pytest.raises(ValueError, match="refused") as error:
        PathManager.get_local_path(address)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
    assert files(tmp_path) == before


@pytest.mark.parametrize("path", ["/ok/../../escaped/N.pth", "/../../escaped/N.pth", "/%2e%2e/%2e%2e/escaped/N.pth"])
def test_server_cannot_write_outside_the_cache(path: str, url: str, handler: type[Handler], tmp_path: Path) -> None:
    before = files(tmp_path)
    with pytest.raises(ValueError, match="which names no folder or file"):
        PathManager.get_local_path(f"mmdet://{url}{path}")
    assert files(tmp_path) == before and handler.requests == 0


@pytest.mark.parametrize("path", ["/redirect.pth", "/model.pth", "/" + 300 * "long" + ".pth", "/a%20%7e$b.pth"])
def test_name_and_place_come_from_the_address_alone(path: str, url: str, tmp_path: Path, cache: Path) -> None:
    """Neither a redirection nor the header Content-Disposition chooses the name, and long names are cut."""
    before = files(tmp_path)
    local = PathManager.get_local_path(f"mmdet://{url}{path}")
    assert local.startswith(f"{cache}/dcn_d2/")
    assert all(name.startswith(f"{cache}/dcn_d2/") for name in files(tmp_path).keys() - before.keys())


def test_files_of_the_user_are_never_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    for address in ("mmdet://../thesis.txt", f"mmdet://{thesis}", f"mmdet:{thesis}"):
        with pytest.raises(CorruptCheckpointError, match="thesis.txt .* not a checkpoint"):
            PathManager.get_local_path(address)
    assert thesis.read_text() == "years of work"


def test_download_of_an_earlier_call_is_kept_when_it_cannot_be_converted(url: str, handler: type[Handler]) -> None:
    handler.content = b"<html>Please log in</html>"
    path, fresh = download.fetch(f"{url}/a.pth", path_handlers.get_cache())
    assert fresh
    with pytest.raises(CorruptCheckpointError, match="it is a web page") as error:
        PathManager.get_local_path(f"mmdet://{url}/a.pth")
    assert "deleted" not in str(error.value) and path.exists()


@pytest.mark.parametrize("linked", ["dcn_d2", "dcn_d2/downloads", "the file", "the lock"])
def test_link_out_of_the_cache_is_refused(linked: str, url: str, tmp_path: Path, cache: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    link = cache / linked
    if linked.startswith("the "):
        file, _ = download.fetch(f"{url}/a.pth", cache)
        link = file if linked == "the file" else Path(f"{file}.lock")
        link.unlink()
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside / "precious" if linked.startswith("the ") else outside)
    with pytest.raises(ValueError, match="a link leads from the cache folder .* FVCORE_CACHE"):
        PathManager.get_local_path(f"mmdet://{url}/a.pth")
    assert files(outside) == {str(outside / "precious"): b"mine"}


def test_same_name_below_two_hosts_or_queries_is_two_files(url: str, handler: type[Handler], tmp_path: Path) -> None:
    content = handler.content
    torch.save({"state_dict": {name: value + 1 for name, value in SMALL.items()}}, tmp_path / "other.pth")
    for n, address in enumerate(
        [
            f"{url}/m/a.pth?version=1",
            f"{url}/m/a.pth?version=2",
            f"{url.replace('127.0.0.1', 'localhost')}/m/a.pth",
            f"{url}/m/a.pth",
        ]
    ):
        handler.content = [content, (tmp_path / "other.pth").read_bytes()][n % 2]
        converted = torch.load(PathManager.get_local_path(f"mmdet://{address}"))["model"]
        bias = converted["proposal_generator.rpn_head.objectness_logits.bias"]
        torch.testing.assert_close(bias, SMALL["rpn_head.rpn_cls.bias"] + n % 2)
    assert handler.requests == 4


def test_address_with_a_query_reaches_the_checkpointer(url: str, handler: type[Handler]) -> None:
    """Detectron2's checkpointer takes queries off, which would make one file of two."""
    with pytest.raises(ValueError, match="does not fit the model"):
        DCNCheckpointer(torch.nn.Linear(1, 1)).load(f"mmdet://{url}/a.pth?token=1")
    with pytest.raises(ValueError, match="does not fit the model"):
        DCNCheckpointer(torch.nn.Linear(1, 1)).load(f"{url}/a.pth?token=2")
    assert handler.requests == 2


@pytest.mark.parametrize("which", ["download", "converted"])
def test_damaged_file_of_the_cache_is_made_again(
    which: str, url: str, handler: type[Handler], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    converted = Path(PathManager.get_local_path(f"mmdet://{url}/a.pth"))
    (downloaded,) = (cache / "dcn_d2" / "downloads").rglob("a.pth")
    damaged = downloaded if which == "download" else converted
    whole = damaged.read_bytes()
    middle = len(whole) // 2
    damaged.write_bytes(whole[:middle] + bytes([whole[middle] ^ 64]) + whole[middle + 1 :])
    assert PathManager.get_local_path(f"mmdet://{url}/a.pth") == str(converted)
    assert damaged.read_bytes() == whole
    assert handler.requests == (2 if which == "download" else 1)
    assert ("has changed since it was downloaded" in caplog.text) == (which == "download")


@pytest.mark.parametrize(
    "mode, reason",
    [
        ("silent", "timed out|sent nothing|without response"),
        ("stalls", "sent nothing for 0.3 seconds"),
        ("drips", "sent only .* bytes in 0.4 seconds"),
        ("busy", "HTTP Error 503"),
    ],
)
def test_server_that_stops_is_given_up_with_the_reason(
    mode: str, reason: str, url: str, handler: type[Handler], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    monkeypatch.setattr(download, "WINDOW", 0.4)
    handler.mode = mode
    start = time.monotonic()
    with pytest.raises(OSError, match=rf"a.pth could not be fetched: .*({reason}).* \(attempt 2 of 2\)"):
        PathManager.get_local_path(f"mmdet://{url}/a.pth")
    assert time.monotonic() - start < 5 and handler.requests == 2
    assert not files(cache)


def test_server_that_stops_once_is_asked_again(
    url: str, handler: type[Handler], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    handler.mode = "stalls once"
    PathManager.get_local_path(f"mmdet://{url}/a.pth")
    assert handler.requests == 2 and "trying once more" in caplog.text


def test_cache_that_cannot_be_written_is_told_in_a_line(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(path_handlers, "get_cache", lambda: tmp_path / "file" / "cache")
    with pytest.raises(OSError, match="the cache folder .*file/cache cannot be written to: Not a directory; .*FVCORE"):
        PathManager.get_local_path(f"mmdet://{url}/a.pth")


def test_advice_without_a_network_holds_for_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_handlers, "ROOT", "http://127.0.0.1:9/")  # the discard port: nobody listens
    with pytest.raises(OSError, match="with --published PUBLISHED.WEIGHTS /path/to/a.pth"):
        PathManager.get_local_path("mmdet://dcn/a.pth")


def test_digest_in_the_name_counts_on_every_way(url: str, handler: type[Handler], tmp_path: Path) -> None:
    path = tmp_path / "model-ad97591f.pth"
    path.write_bytes(handler.content)
    good = path.with_name(f"model-{sha256_of(path)[:8]}.pth")
    os.link(path, good)
    for address in (str(path), f"mmdet://{path}", f"mmdet://{url}/{path.name}", f"{url}/{path.name}"):
        with pytest.raises(CorruptCheckpointError, match="but with ad97591f according to its name"):
            DCNCheckpointer(torch.nn.Linear(1, 1)).load(address)
        with pytest.raises(ValueError, match="does not fit the model"):
            DCNCheckpointer(torch.nn.Linear(1, 1)).load(address.replace(path.name, good.name))


def test_files_of_the_zoo_of_detectron2_stay_in_the_cache(
    url: str, handler: type[Handler], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path_handlers.Detectron2Handler, "S3_DETECTRON2_PREFIX", f"{url}/detectron2/")
    with pytest.raises(ValueError, match="names no folder or file"):
        DCNCheckpointer(torch.nn.Linear(1, 1)).load("detectron2://../../escaped/N.pth")
    assert handler.requests == 0
    kept = cache / "detectron2" / "a" / "kept.pth"  # by Detectron2's own download
    kept.parent.mkdir(parents=True)
    kept.write_bytes(handler.content)
    for name, requests in (("kept", 0), ("new", 1), ("new", 1)):
        with pytest.raises(ValueError, match="does not fit the model"):
            DCNCheckpointer(torch.nn.Linear(1, 1)).load(f"detectron2://a/{name}.pth")
        assert handler.requests == requests


def test_base_of_a_config_cannot_write_outside_the_cache(
    url: str, handler: type[Handler], tmp_path: Path, cache: Path
) -> None:
    handler.content = b"SEED: 5\n"
    child = tmp_path / "child.yaml"
    child.write_text(f"_BASE_: {url}/ok/../../../escaped/N.yaml\n")
    before = set(tmp_path.parent.rglob("N.yaml*"))
    with pytest.raises(ConfigError, match="could not be fetched: .*a part of its path is '..'"):
        load_config(str(child))
    assert set(tmp_path.parent.rglob("N.yaml*")) == before


def test_base_of_a_config_may_be_an_address(url: str, handler: type[Handler], tmp_path: Path, cache: Path) -> None:
    handler.content = b"SEED: 5\n"
    (tmp_path / "child.yaml").write_text(f"_BASE_: {url}/configs/N.yaml\n")
    assert load_config(str(tmp_path / "child.yaml")).SEED == 5
    handler.content = b"_BASE_: ../configs/N.yaml\nVERSION: 2\n"
    (tmp_path / "child.yaml").write_text(f"_BASE_: {url}/more/M.yaml\n")
    assert load_config(str(tmp_path / "child.yaml")).SEED == 5
    (tmp_path / "child.yaml").write_text(f"_BASE_: {url}/configs/itself.yaml\n")
    handler.content = b"_BASE_: itself.yaml\n"
    with pytest.raises(ConfigError, match="leads back to itself"):
        load_config(str(tmp_path / "child.yaml"))


def test_server_of_a_base_that_says_nothing_is_given_up(
    url: str, handler: type[Handler], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler.mode = "silent"
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    (tmp_path / "child.yaml").write_text(f"_BASE_: {url}/N.yaml\n")
    with pytest.raises(ConfigError, match="sent nothing for 0.2 seconds"):
        load_config(str(tmp_path / "child.yaml"))
