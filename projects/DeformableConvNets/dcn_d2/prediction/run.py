# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""predict.py: from the command line to the results."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..checkpoint.files import sha256_of
from ..data.findings import show
from ..engine.stopping import SignalCounter
from ..export.formats import files_of
from ..outputs import PictureFolder
from .loop import Painter, predict_all
from .merge import describe_error, merge
from .model import build_predictor, read_config
from .parquet import require_pyarrow
from .progress import Progress
from .reading import Feed
from .records import Categories, check_gives_instances, find_categories
from .render import render_videos
from .run_folder import PICTURES, Done, RunFolder, count_missing, read_done, read_line, read_settings
from .shards import Shard
from .sources import Source, Sources, find_sources, stems_of
from .videos import estimate_frames

if TYPE_CHECKING:
    from detectron2.config import CfgNode

    from ..engine import DCNPredictor

# Keys that do not change what a model finds.
_NO_MATTER = ("SOLVER.", "DATALOADER.", "OUTPUT_DIR", "MODEL.DEVICE", "MODEL.WEIGHTS", "VIS_PERIOD", "SEED")


def predict(args: argparse.Namespace) -> int:
    """Runs the command line, and gives the exit code."""
    if args.format != "json":
        require_pyarrow()
    if args.merge:
        return _finish(args, read_settings(Path(args.output)))
    shard = Shard(*args.shard)
    sources = find_sources(args.input, args.images, args.output)
    cfg = read_config(args)
    check_gives_instances(cfg)
    predictor = build_predictor(args, cfg, "predict.py", batch_size=args.batch_size)
    categories = find_categories(cfg, sources.categories, getattr(predictor, "class_names", ()))
    settings = make_settings(args, cfg, sources, categories)
    with RunFolder(args.output, shard, settings, args.overwrite) as run:
        stopped = _predict_shard(args, predictor, categories, sources, run, shard)
    if stopped:
        command = "the same command without --overwrite" if args.overwrite else "the same command"
        print(f"predict.py: interrupted; {command} goes on in {args.output}", file=sys.stderr)
        return 128 + stopped
    return _finish(args, settings, shard, sources)


def make_settings(args: argparse.Namespace, cfg: CfgNode, sources: Sources, categories: Categories) -> dict[str, Any]:
    """Gives what makes a command: two runs with the same settings find the same."""
    listing = hashlib.sha256()
    for item in sources.items:
        listing.update(os.fsencode(f"{item.path}\0{item.image_id!r}\n"))
    weights = cfg.MODEL.WEIGHTS
    files = [path for path in (files_of(args.model) if args.model else [weights]) if os.path.isfile(path)]
    return {
        "dcn_d2": __version__,
        "inputs": len(sources.items),
        "inputs_sha256": listing.hexdigest(),
        "videos": [item.number for item in sources.items if item.video],
        "frames": args.frames,
        "score_threshold": args.score_threshold,
        "pictures": args.confidence if args.pictures else False,
        "weights": "" if files else weights,
        "weights_sha256": " ".join(map(sha256_of, files)),
        "categories": [{"id": key, "name": name} for key, name in zip(*categories)],
        "config": {key: str(value) for key, value in _flatten(cfg) if not key.startswith(_NO_MATTER)},
    }


def _flatten(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if hasattr(value, "items"):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _predict_shard(
    args: argparse.Namespace,
    predictor: DCNPredictor,
    categories: Categories,
    sources: Sources,
    run: RunFolder,
    shard: Shard,
) -> int:
    """Predicts what is left to do, and gives the signal that has stopped it; 0 if none has."""
    done = read_done(run.folder)

    def wanted(source: Source, frame: int) -> bool:
        return shard.has_frame(frame, args.frames) and (source.number, frame) not in done.images

    todo = [item for item in sources.items if _has_work(item, shard, done, args.frames)]
    mine = [item for item in sources.items if item.video or shard.has_image(item)]
    if not todo:
        return 0
    if len(todo) < len(mine):
        print(f"goes on: {len(done.images)} image(s) are done", file=sys.stderr)
    painter = None
    if args.pictures:
        folder = PictureFolder(run.folder / PICTURES, [item.path for item in sources.items])
        painter = Painter(folder, stems_of(sources.items), args.confidence, categories.names)
    films = [estimate_frames(item.path) // args.frames // shard.total for item in mine if item.video]
    progress = Progress(sum(not item.video for item in mine) + sum(films), _count_mine(done, shard, args.frames))
    lines = predict_all(Feed(todo, wanted), predictor, categories, args.score_threshold or 0.0, painter)
    with SignalCounter(_say_stopping, _stop_at_once) as signals, contextlib.closing(lines):
        for line in lines:
            run.write(line)
            progress.add(line["kind"] == "image")
            if line["kind"] == "error":
                print(f"skipped {show(describe_error(line))}", file=sys.stderr)
            if signals.signal:
                break
    progress.end()
    return signals.signal


def _has_work(item: Source, shard: Shard, done: Done, every: int) -> bool:
    """Whether something of an image or video is left to do for this shard; what failed before is tried again."""
    if not item.video:
        return shard.has_image(item) and (item.number, None) not in done.images
    if item.number not in done.lengths:
        return True
    frames = range(0, done.lengths[item.number], every)
    return any(shard.has_frame(frame, every) and (item.number, frame) not in done.images for frame in frames)


def _count_mine(done: Done, shard: Shard, every: int) -> int:
    return sum(
        (number - 1) % shard.total == shard.number - 1 if frame is None else shard.has_frame(frame, every)
        for number, frame in done.images
    )


def _finish(
    args: argparse.Namespace, settings: dict[str, Any], shard: Shard | None = None, sources: Sources | None = None
) -> int:
    """Writes the results if all shards are done, and gives the exit code."""
    folder = Path(args.output)
    done = read_done(folder)
    if missing := count_missing(settings, done):
        text = f"{missing} image(s) are not done yet"
        if shard is None or shard.total == 1:
            raise ValueError(f"--output {folder}: {text}; the command that began goes on when it is started again")
        print(f"shard {shard} is done; {text}: the last shard writes the results")
        return 0
    if not done.images:
        raise ValueError(f"none of the {len(done.errors)} image(s) could be read; the first: {_first_error(done)}")
    merge(folder, settings, done, args.format)
    if args.video and sources is not None:
        categories = Categories(*map(list, zip(*((c["id"], c["name"]) for c in settings["categories"]))))
        render_videos(folder / PICTURES, sources.items, done, categories, args.confidence, args.frames)
    text = f"{len(done.images)} image(s) in {folder}"
    if done.errors:
        text += f"; {len(done.errors)} could not be read, see {folder / 'unreadable.txt'}"
    print(text)
    return 1 if args.strict and done.errors else 0


def _first_error(done: Done) -> str:
    return show(describe_error(read_line(next(iter(done.errors.values())))))


def _say_stopping(number: int) -> None:
    print(
        f"\npredict.py: {signal.Signals(number).name}: stops now, with what is done (a second signal stops at once)",
        file=sys.stderr,
    )


def _stop_at_once(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
