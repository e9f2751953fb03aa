# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Reads thousands of damaged and hostile checkpoints, and counts the results.

    python dev/campaign/checkpoints.py --cases 20000 --seed 1 --output results.json
    python dev/campaign/checkpoints.py --seed 1 --replay 4711      one case again, with its traceback

Each case is a small checkpoint of one of the formats, changed: bytes flipped, cut off, moved and repeated, numbers made
huge, operations of pickles put in and taken out, with checksums that are made right again or left wrong. It must be
refused in words that name the file, or load: with the values of the original where a checksum or digest vouches for
them, else with finite ones. All within 10 seconds and 1 GB, without a write outside the scratch folder, a process, a
connection, an import, or anything executed. Whatever else happens is a finding, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import os
import pickle
import pickletools
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS, MEMORY = 10, 1 << 30
BLOCK = 500  # cases of one worker process

HARM = "harm"  # the file that the hostile operations would make
SNIPPETS = [
    b"cposix\nsystem\n(S'touch harm'\ntR",
    b"(S'touch harm'\niposix\nsystem\n",
    b"(cposix\nsystem\nS'touch harm'\no",
    b'c__builtin__\neval\n(S\'open("harm", "w")\'\ntR',
    b"\x8c\x05posix\x8c\x06system\x93\x8c\x0atouch harm\x85R",
    b"cbuiltins\ngetattr\n(cposix\nsystem\nS'__call__'\ntR",
    b"ctorch.storage\n_load_from_bytes\n(C\x04abcdtR",
    b"cnumpy\nload\n(S'harm'\ntR",
    b"ccollections\nOrderedDict\n)\x81",
    b"cnumpy\nndarray\n)\x81}b",
    b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR",
    b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I9\ntN\x89S''\ntb",
    b"ctorch._utils\n_rebuild_tensor_v2\n(N(K\x00(K\x01t(K\x01t\x89NtR",
    b"ccopy_reg\n_reconstructor\n(cposix\nsystem\nNNtR",
    *(bytes([code, *b"\x01\x00\x00\x00"]) for code in b"\x82\x83\x84"),  # extensions
    *(b"0", b"1", b"2", b"(", b")", b"]", b"}", b"a", b"e", b"s", b"u", b"b", b"t", b"d", b"l", b"R", b"Q", b"o"),
    *(b"\x81", b"\x92", b"\x85", b"\x86", b"\x87", b"\x8f", b"\x90", b"\x91", b"\x93", b"\x94", b"\x97", b"\x98", b"."),
    b"r\xff\xff\xff\x7f",  # a number of the memo
    b"j\xff\xff\xff\x7f",
    b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",  # text of 2 ** 63 bytes
    b"\x8e\xff\xff\xff\xff\x00\x00\x00\x00",
    b"\x96\xff\xff\xff\xff\x00\x00\x00\x00",
    b"\x95\xff\xff\xff\xff\x00\x00\x00\x00",
    b"X\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\x7f",
    b"I" + 6000 * b"9" + b"\n",
    b"Pharm\n",
    b"K\xff",
    b"J\xff\xff\xff\xff",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"G\x7f\xf8\x00\x00\x00\x00\x00\x00",
]
HUGE = [0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 1 << 40, 1 << 31]


def make_seeds() -> dict[str, bytes]:
    """Small checkpoints of all formats."""
    import numpy as np
    import torch

    values = np.random.default_rng(0)

    def rand(*shape: int) -> Any:
        return torch.from_numpy(values.random(shape, np.float32))

    theirs = OrderedDict(
        {
            "rpn_head.rpn_cls.weight": rand(3, 8, 1, 1),
            "rpn_head.rpn_cls.bias": rand(3),
            "rpn_head.rpn_reg.bias": rand(12),
        }
    )
    base = rand(40)
    mine = OrderedDict(
        {
            "a.weight": base[:24].view(4, 6),
            "a.bias": base[24:],
            "b.half": rand(5).half(),
            "n.num_batches_tracked": base.new_tensor(3).long(),
        }
    )
    state = {
        "state": {0: {"momentum_buffer": rand(4)}},
        "param_groups": [{"lr": 0.1, "params": [0, 1], "foreach": None}],
    }
    training = {"model": mine, "optimizer": state, "iteration": 9, "best": (0.5, "AP")}
    arrays = {"model": {name: v.numpy() for name, v in mine.items()}, "__author__": "Detectron2 Model Zoo"}
    blobs = {"blobs": {"conv1_w": rand(3, 4).numpy(), "res_conv1_bn_s": rand(3).numpy()}, "cfg": "MODEL: {}"}

    def saved(data: object, zipped: bool = True) -> bytes:
        buffer = io.BytesIO()
        torch.save(data, buffer, _use_new_zipfile_serialization=zipped)
        return buffer.getvalue()

    return {
        "zip": saved(training),
        "legacy": saved(training, zipped=False),
        "mmdet zip": saved({"meta": {"epoch": 12}, "state_dict": theirs}),
        "mmdet legacy": saved({"meta": {"epoch": 12}, "state_dict": theirs}, zipped=False),
        **{f"pickle {protocol}": pickle.dumps(arrays, protocol) for protocol in (0, 2, 4, 5)},
        "blobs": pickle.dumps(blobs, 2),
    }


def members_of(content: bytes) -> dict[str, bytes]:
    """Gives name and content of the members of a zip archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def zipped(members: dict[str, bytes], rng: random.Random) -> bytes:
    """Gives a zip archive with correct checksums."""
    buffer = io.BytesIO()
    compression = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def change_bytes(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Makes one change without regard to the format."""
    data = bytearray(content)
    at = rng.randrange(len(data) + 1)
    kind = rng.choice("flip flip set cut splice repeat insert drop huge zeros swap".split())
    if kind == "flip" and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "set":
        for _ in range(rng.randint(1, 8)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == "cut":
        del data[at:]
    elif kind == "splice":
        other = rng.choice(others)
        start = rng.randrange(len(other))
        data[at : at + rng.choice([0, 8, 64, len(data)])] = other[start : start + rng.choice([8, 64, 512, len(other)])]
    elif kind == "repeat":
        data[at:at] = data[at : at + rng.randint(1, 64)] * rng.choice([1, 2, 100])
    elif kind == "insert":
        data[at:at] = rng.randbytes(rng.randint(1, 16))
    elif kind == "drop":
        del data[at : at + rng.randint(1, 32)]
    elif kind == "huge":
        size = rng.choice([1, 2, 4, 8])
        data[at : at + size] = (rng.choice(HUGE) & ((1 << 8 * size) - 1)).to_bytes(size, rng.choice(["little", "big"]))
    elif kind == "zeros":
        size = rng.randint(1, 64)
        data[at : at + size] = bytes(len(data[at : at + size]))
    elif kind == "swap" and len(data) > 64:
        a, b = sorted(rng.sample(range(len(data) - 16), 2))
        data[a : a + 16], data[b : b + 16] = data[b : b + 16], data[a : a + 16]
    return bytes(data)


def change_pickle(content: bytes, rng: random.Random) -> bytes:
    """Puts operations into a pickle, or takes some out; what follows the pickle stays."""
    try:
        starts = [position or 0 for _, _, position in pickletools.genops(content)]
    except Exception:  # changed before: any place is as good
        starts = list(range(0, len(content), 7)) or [0]
    at = rng.choice(starts)
    kind = rng.choice("insert insert insert drop repeat move claim claim bomb".split())
    if kind == "insert":
        snippet = rng.choice(SNIPPETS) * rng.choice([1, 1, 1, 2, 50])
        return content[:at] + snippet + content[at:]
    end = min([start for start in starts if start > at], default=len(content))
    if kind == "drop":
        return content[:at] + content[end:]
    if kind == "repeat":
        return content[:at] + content[at:end] * rng.choice([2, 3, 1000]) + content[end:]
    if kind == "move":
        other = rng.choice(starts)
        return content[:other] + content[at:end] + content[other:]
    if kind == "claim":  # sizes, strides, offsets, counts
        numbers = [start for start in starts if content[start : start + 1] in (b"K", b"M", b"J", b"\x8a")]
        if numbers:
            at = rng.choice(numbers)
            end = min([start for start in starts if start > at], default=len(content))
            number = rng.choice([-1, 0, 1, 2, 3, 255, rng.choice(HUGE), -rng.choice(HUGE), rng.randrange(1 << 20)])
            encoded = number.to_bytes(10, "little", signed=True)
            return content[:at] + b"\x8a\x0a" + encoded + content[end:]
    if rng.random() < 0.1:
        return (
            content[:at] + rng.choice([b"]", b")", b"}", b"(", b"2", b"\x85", b"\x8f", b"N"]) * 500_000 + content[at:]
        )
    return content[:at] + rng.choice([b"]", b"(", b"\x85", b"]2aa", b"2\x86"]) * rng.choice([70, 1000]) + content[at:]


class Case:
    """One changed file.

    Args:
        number: of the case.
        seed: of the campaign.
        seeds: what `make_seeds` gives.
    """

    def __init__(self, number: int, seed: int, seeds: dict[str, bytes]) -> None:
        rng = random.Random(f"{seed}:{number}")
        self.format = rng.choice(list(seeds))
        self.original = seeds[self.format]
        self.by_address = "mmdet" in self.format and rng.random() < 0.5
        # The converted file in the cache is changed, not the original.
        self.in_cache = self.by_address and rng.random() < 0.5
        self.with_digest = rng.random() < 0.15
        self.rng = rng
        archive = self.format.endswith("zip")
        content = self.original
        self.vouched = self.with_digest or self.in_cache or archive
        others = list(seeds.values())
        if not self.in_cache:
            for _ in range(rng.choice([1, 1, 2, 3])):
                if archive and rng.random() < 0.5:
                    content = self._change_member(content, others)
                elif not archive and rng.random() < 0.6:
                    content = change_pickle(content, rng)
                else:
                    content = change_bytes(content, rng, others)
        self.content, self.others = content, others
        suffix = ".pkl" if self.format.startswith(("pickle", "blobs")) else ".pth"
        # The name has the digest of the original, as for a file that was damaged during the download.
        digest = hashlib.sha256(self.original).hexdigest()[:8]
        self.name = f"case-{digest}.pth" if self.with_digest else f"case{number}{suffix}"

    def _change_member(self, content: bytes, others: list[bytes]) -> bytes:
        """Changes a member of the archive and corrects its checksum, so that nothing shows that it was changed."""
        try:
            members = members_of(content)
        except Exception:  # changed before
            members = {}
        if not members:
            return change_bytes(content, self.rng, others)
        name = self.rng.choice([*members, *(name for name in members if name.endswith("data.pkl"))])
        if self.rng.random() < 0.1:
            del members[name]
        elif self.rng.random() < 0.1:
            members[self.rng.choice(list(members)) + "x"] = members.pop(name)
        elif name.endswith("data.pkl") and self.rng.random() < 0.8:
            members[name] = change_pickle(members[name], self.rng)
        else:
            members[name] = change_bytes(members[name], self.rng, others)
        self.vouched = self.with_digest
        return zipped(members, self.rng)


def fingerprint(weights: dict[str, Any]) -> str:
    """Digest of names, types, shapes and values."""
    import numpy as np

    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        array = np.asarray(value)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class Reader:
    """Reads cases in a scratch folder."""

    def __init__(self, folder: Path, seeds: dict[str, bytes]) -> None:
        from detectron2.utils.file_io import PathManager

        from dcn_d2.checkpoint import register_path_handlers
        from dcn_d2.checkpoint.weights import check_weights, read_weights

        register_path_handlers()
        self.folder, self.seeds = folder, seeds
        self._read, self._check, self._local_path = read_weights, check_weights, PathManager.get_local_path
        self.known = set()
        for name, content in seeds.items():
            path = folder / f"seed{'.pkl' if name.startswith(('pickle', 'blobs')) else '.pth'}"
            path.write_bytes(content)
            self.known.add(fingerprint(read_weights(str(path))["model"]))
            if "mmdet" in name:
                self._local_path(f"mmdet://{path}")

    def load(self, case: Case) -> dict[str, Any]:
        """Gives the weights of a case, read as the checkpointer reads them."""
        path = self.folder / case.name
        path.write_bytes(case.original if case.in_cache else case.content)
        try:
            address = str(path)
            if case.by_address:
                address = self._local_path(f"mmdet://{path}")
                if case.in_cache:
                    converted = Path(address)
                    converted.write_bytes(change_bytes(converted.read_bytes(), case.rng, case.others))
                    address = self._local_path(f"mmdet://{path}")
            loaded = self._read(address)
            self._check(loaded["model"], address)
            return loaded["model"]
        finally:
            path.unlink()
            if case.by_address:
                for made in (self.folder / "cache" / "dcn_d2").glob(f"{path.stem}-*"):
                    made.unlink()

    def judge(self, case: Case) -> tuple[str, str]:
        """Reads a case; gives its outcome and, if it is a finding, a sentence about what is wrong."""
        try:
            weights = self.load(case)
        except (ValueError, OSError) as error:
            lines = str(error).splitlines() or [""]
            if case.name not in lines[0] and Path(case.name).stem not in lines[0]:
                return "finding", f"the message does not name the file: {lines[0]}"
            if "allocate" in lines[0]:
                return "finding", f"it took more than {MEMORY} bytes: {lines[0]}"
            if len(lines) > 25 or max(map(len, lines)) > 2000:
                return "finding", f"the message has {len(lines)} lines of up to {max(map(len, lines))} characters"
            return "refused", ""
        except (Exception, Timeout) as error:
            return "finding", f"{type(error).__name__}: {error}"[:300]
        if fingerprint(weights) in self.known:
            return "loaded as it was", ""
        if case.vouched:
            return "finding", "other values were loaded in spite of a checksum"
        return "loaded with other values, for which the format has no checksum", ""


class Timeout(BaseException):
    """A case took too long."""


def watch(folder: Path) -> list[str]:
    """Notes from now on what Python does although reading a file must not do it."""
    seen: list[str] = []
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    forbidden = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.connect")
    changing = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")

    def inside(path: object) -> bool:
        return isinstance(path, int) or os.path.realpath(os.fsdecode(path)).startswith(f"{folder}/")  # type: ignore

    def hook(event: str, args: tuple) -> None:
        if event in forbidden or event in ("pickle.find_class", "exec", "compile", "code.__new__", "function.__new__"):
            seen.append(f"{event} {str(args)[:100]}")
        elif event == "import":
            seen.append(f"import {args[0]}")
        elif event == "open" and args[0] is not None:
            path, mode, flags = args
            if (mode and set(mode) & set("wax+") or (flags or 0) & writing) and not inside(path):
                seen.append(f"open {path!r} for writing")
        elif event in changing and not all(
            inside(path) for path in args[: 2 if "name" in event or "link" in event else 1]
        ):
            seen.append(f"{event} {args!r}")

    sys.addaudithook(hook)
    return seen


def work(folder: Path, seed: int, first: int, last: int) -> None:
    """The worker process: reads cases, and prints the outcome of each."""
    logging.disable(logging.CRITICAL)
    seeds = make_seeds()
    reader = Reader(folder, seeds)
    for number in range(-30, 0):  # so that everything that is imported or made once is there
        reader.judge(Case(number, 0, seeds))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def late(*args: object) -> None:
        raise Timeout(f"more than {SECONDS} seconds")

    # Processor time: other processes must not cause findings. A file that makes this process wait is a finding, too.
    signal.signal(signal.SIGPROF, late)
    signal.signal(signal.SIGALRM, late)
    seen = watch(folder)
    for number in range(first, last):
        case = Case(number, seed, seeds)
        print(json.dumps({"begins": number, "format": case.format}), flush=True)
        seen.clear()
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(30 * SECONDS)
        outcome, what = reader.judge(case)
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        seconds = time.process_time() - start
        if seen:
            outcome, what = "finding", f"reading it did: {seen[0]}"
        if (folder / HARM).exists():
            outcome, what = "finding", "its code ran"
        print(json.dumps({"case": number, "outcome": outcome, "what": what, "seconds": round(seconds, 3)}), flush=True)
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}), flush=True)


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Gives the paths of everything in a folder."""
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def run(cases: int, seed: int, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs a campaign.

    Args:
        cases: how many.
        seed: the same seed gives the same cases.
        tell: takes a line of progress now and then.

    Returns:
        What came of the cases, as it is written to --output.
    """
    root = Path(tempfile.mkdtemp(prefix="campaign-")).resolve()
    folder, canary = root / "scratch", root / "canary"
    for place in (folder, canary):
        place.mkdir()
    (canary / "thesis.txt").write_text("years of work")
    before = state_of(canary)
    project = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {
        **{"FVCORE_CACHE": str(folder / "cache"), "HOME": str(canary), "OMP_NUM_THREADS": "1"},
        **{"PYTHONPATH": os.pathsep.join([project, os.environ.get("PYTHONPATH", "")]), "PYTHONDONTWRITEBYTECODE": "1"},
    }
    counts: Counter[str] = Counter()
    by_format: dict[str, Counter[str]] = {}
    findings: list[dict[str, Any]] = []
    slowest, peak, start, number = {"seconds": -1.0}, 0, time.monotonic(), 0
    while number < cases:
        last = min(number + BLOCK, cases)
        command = [sys.executable, __file__, "--seed", str(seed), "--work", str(folder), str(number), str(last)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        begun = None
        for line in done.stdout.splitlines():
            record = json.loads(line)
            if "begins" in record:
                begun = record
            elif "peak" in record:
                peak = max(peak, record["peak"])
            else:
                assert begun is not None
                record["format"] = begun["format"]
                begun = None
                number = record["case"] + 1
                counts[record["outcome"]] += 1
                by_format.setdefault(record["format"], Counter())[record["outcome"]] += 1
                slowest = max(slowest, record, key=lambda each: each["seconds"])
                if record["outcome"] == "finding":
                    findings.append(record)
        if begun is not None:  # the process died
            counts["finding"] += 1
            reason = (done.stderr.strip().splitlines() or [""])[-1]
            what = f"the process ended with {done.returncode}: {reason}"
            findings.append({"case": begun["begins"], "format": begun["format"], "outcome": "finding", "what": what})
            number = begun["begins"] + 1
        elif done.returncode:
            raise RuntimeError(f"the worker failed: {done.stderr}")
        tell(f"{number} of {cases} cases, {len(findings)} findings, {time.monotonic() - start:.0f} s")
    if state_of(canary) != before:
        findings.append({"case": -1, "outcome": "finding", "what": "files outside the scratch folder have changed"})
    shutil.rmtree(root)
    return {
        "cases": cases,
        "seed": seed,
        "seconds": round(time.monotonic() - start, 1),
        "peak_kib": peak,
        "outcomes": dict(counts),
        "by_format": {name: dict(by_format[name]) for name in sorted(by_format)},
        "slowest": slowest,
        "findings": findings,
    }


def replay(seed: int, number: int) -> None:
    """Reads one case in this process, and keeps its file."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FVCORE_CACHE"] = f"{scratch}/cache"
        seeds = make_seeds()
        reader, case = Reader(Path(scratch), seeds), Case(number, seed, seeds)
        kept = Path(f"case-{seed}-{number}.bin")
        kept.write_bytes(case.content)
        print(f"case {number} of seed {seed}: {case.format}, {len(case.content)} bytes, kept in {kept.resolve()}")
        print(f"by mmdet://: {case.by_address}, in the cache: {case.in_cache}, named with a digest: {case.with_digest}")
        try:
            for name, value in reader.load(case).items():
                print(name, list(value.shape), value.dtype)
        except Exception:
            traceback.print_exc()
        print(*reader.judge(Case(number, seed, seeds)))


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20000, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed gives the same cases")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the summary goes, as JSON")
    parser.add_argument("--replay", type=int, metavar="N", help="reads only this case, and shows its traceback")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.work:
        work(Path(args.work[0]), args.seed, int(args.work[1]), int(args.work[2]))
        return
    if args.replay is not None:
        replay(args.seed, args.replay)
        return
    summary = run(args.cases, args.seed)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary["outcomes"], indent=1))
    if summary["findings"]:
        for finding in summary["findings"][:20]:
            print(f"case {finding['case']}: {finding['what']}", file=sys.stderr)
        sys.exit(f"checkpoints.py: {len(summary['findings'])} findings")


if __name__ == "__main__":
    main()
