# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Reads all images of a data set, as a training reads them, in several threads or processes. Keeps no pixels."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from ..annotations import Record
from ..findings import Findings, repeated, show
from ..image_files import ImageFault, find_fault, is_remote, orientation_of
from ..images import convert_image, has_16_bits

_AHEAD = 64  # images that are asked for before the first one is there, for each worker
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_GREY = ("1", "L", "LA", "La")
FAULTS = {
    "image-missing": "images do not exist",
    "image-unreadable": "images cannot be read",
    "image-refused": "images are of a kind that is not read",
    "image-size": "images have another size than the annotations say",
    "image-size-before-rotation": "images have annotations with the width and height before the rotation of their EXIF "
    "data, but are read rotated",
}


class HowToRead(NamedTuple):
    """How images are read.

    Attributes:
        quick: only their headers.
        workers: how many are read at a time.
        processes: by processes, not by threads.
        progress: show how far it is.
    """

    quick: bool = False
    workers: int = 1
    processes: bool = False
    progress: bool = False

    @classmethod
    def of(cls, quick: bool, workers: int | None, processes: bool, progress: bool) -> HowToRead:
        """The same with as many workers as there are cores if `workers` is None."""
        return cls(quick, workers or os.cpu_count() or 1, processes, progress)


WHOLE = HowToRead()


class Look(NamedTuple):
    """What was seen of an image file."""

    fault: ImageFault | None = None
    mode: str = ""  # Pillow's
    size: tuple[int, int] = (0, 0)  # width and height as stored
    orientation: int = 1
    sixteen: bool = False  # bits a channel
    alpha: bool = False
    digest: bytes = b""  # of its pixels; empty if they were not read


def look_at(record: Record, quick: bool) -> Look:
    """Reads one image; of the record it takes file_name, width and height."""
    seen = Look()

    def look(image: Image.Image) -> None:
        nonlocal seen
        tiles = getattr(image, "tile", None)
        stored = str(tiles[0][-1]) if tiles else ""  # tells of 16 bits in colours, of which Pillow drops 8 itself
        seen = Look(
            mode=image.mode,
            size=image.size,
            orientation=orientation_of(image),
            sixteen=has_16_bits(image) or ";16" in stored,
            alpha=image.mode in _WITH_ALPHA or "transparency" in image.info,
        )
        if quick:
            return
        try:
            pixels = convert_image(image, "RGB")
        except MemoryError:
            raise
        except Exception as error:  # decoders raise errors of all kinds for damaged files
            raise ValueError(str(error)) from error
        digest = hashlib.blake2b(pixels.tobytes(), digest_size=16)
        digest.update(str(pixels.shape).encode())
        seen = seen._replace(digest=digest.digest())

    fault = find_fault(record, look)
    return seen._replace(fault=fault)


def look_at_all(records: Sequence[Record], how: HowToRead) -> list[Look | None]:
    """Reads the images of all records, in their order; None for those that are not on this machine."""
    jobs = (None if is_remote(r) else {k: r.get(k) for k in ("file_name", "width", "height")} for r in records)
    pool: Executor
    if how.processes:
        context = multiprocessing.get_context("forkserver")  # forking this process would copy its threads' locks
        context.set_forkserver_preload([__name__])  # one import of Detectron2 for all, which takes seconds
        pool = ProcessPoolExecutor(how.workers, mp_context=context)
    else:
        pool = ThreadPoolExecutor(how.workers)
    with pool:
        looks = _in_order(pool, jobs, how)
        return list(tqdm(looks, total=len(records), desc="images", unit="", disable=not how.progress, mininterval=1))


def _in_order(pool: Executor, jobs: Iterable[Record | None], how: HowToRead) -> Iterator[Look | None]:
    """Like `Executor.map`, but asks only for some images ahead."""
    jobs = iter(jobs)
    waiting: list[Future[Look] | None] = []
    while True:
        for job in itertools.islice(jobs, _AHEAD * how.workers):
            waiting.append(pool.submit(look_at, job, how.quick) if job else None)
        if not waiting:
            return
        for future in waiting:
            yield future.result() if future else None
        waiting.clear()


def inspect_images(records: Sequence[Record], looks: Sequence[Look | None], quick: bool, findings: Findings) -> None:
    """Notes what was seen of the images of a data set."""
    names = [show(os.fspath(record["file_name"])) for record in records]
    for kind, what in FAULTS.items():
        faults = {i: look.fault.text for i, look in enumerate(looks) if look and look.fault and look.fault.kind == kind}
        findings.count(faults, records, what, lambda index: f"{names[index]}: {faults[index]}", kind=kind)
    remote = [index for index, look in enumerate(looks) if look is None]
    what = "images are not on this machine and were not looked at"
    findings.count(remote, records, what, lambda index: names[index], kind="image-address", inform=True)
    _inspect_kinds(records, looks, names, findings)
    often = Counter(names)
    again = repeated(names)
    what = "images have the file name of another"
    findings.count(
        again, records, what, lambda i: f"{names[i]} ({often[names[i]]} times)", kind="image-duplicate-file", warn=True
    )
    if not quick:
        digests = [look.digest if look else b"" for look in looks]
        first = {digest: names[i] for i, digest in reversed(list(enumerate(digests)))}
        same = [index for index in repeated(digests) if digests[index] and names[index] != first[digests[index]]]
        what = "images have the same pixels as another"
        findings.count(
            same, records, what, lambda i: f"{names[i]} and {first[digests[i]]}", kind="image-identical", warn=True
        )


def _inspect_kinds(
    records: Sequence[Record], looks: Sequence[Look | None], names: Sequence[str], findings: Findings
) -> None:
    """Notes images that are not plain colour images of 8 bits."""
    seen = [look or Look() for look in looks]
    grey = [index for index, look in enumerate(seen) if look.mode in _GREY or look.mode.startswith("I")]
    read = sum(bool(look.mode) for look in seen)
    for kind, where, what, then in (
        (
            "image-16-bit",
            [index for index, look in enumerate(seen) if look.sixteen],
            "images have 16 bits a channel",
            "The upper 8 are taken (value // 256): images of 10 to 14 bits come out dark, scale them first",
        ),
        (
            "image-rotated",
            [i for i, look in enumerate(seen) if look.orientation != 1 and not look.fault],
            "images have EXIF data that turn them; their width and height in the annotations are right",
            "They are read turned, so their boxes must be those of the turned image",
        ),
        ("image-cmyk", [i for i, look in enumerate(seen) if look.mode == "CMYK"], "images are CMYK", "Read as RGB"),
        (
            "image-palette",
            [i for i, look in enumerate(seen) if look.mode in ("P", "PA")],
            "images have a palette",
            "Read as its colours",
        ),
        (
            "image-alpha",
            [i for i, look in enumerate(seen) if look.alpha],
            "images have transparent pixels or an alpha channel",
            "It is left out: transparent pixels are read in the colour that they have in the file",
        ),
        (
            "image-grey",
            grey if len(grey) < read else [],
            "images are grey, among others in colour",
            "They are read as three equal channels",
        ),
    ):
        findings.count(
            where,
            records,
            what,
            lambda index: names[index],
            kind=kind,
            then=then,
            warn=kind == "image-16-bit",
            inform=kind != "image-16-bit",
        )


def compare_images(
    train: dict[bytes, str], records: Sequence[Record], looks: Sequence[Look | None], findings: Findings
) -> None:
    """Notes images of a test set whose pixels are those of an image for training.

    Args:
        train: digests of the images for training, and their names.
        records: the test set.
        looks: what was seen of it.
        findings: what is found.
    """
    findings.count(
        [index for index, look in enumerate(looks) if look and look.digest in train],
        records,
        "images of this test set are also in the data for training: their pixels are the same",
        lambda index: f"{show(records[index]['file_name'])} is {train[looks[index].digest]}",  # type: ignore[union-attr]
        kind="image-in-train-and-test",
        then="AP will be higher than it is for new images",
        warn=True,
    )
