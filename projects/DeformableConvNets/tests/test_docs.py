# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What the documents say is true: their links, commands, flags, config keys, names and Python code."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
import torchvision

import train_net
from dcn_d2 import layers
from dcn_d2.config import load_config

PROJECT = Path(__file__).resolve().parent.parent
ROOT = PROJECT.parent.parent
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Programs of ours whose --help lists their options; setup.py's is that of setuptools.
OURS = re.compile(r"(dcn_d2|benchmarks|tests|dev)[./]\w|(train_net|predict|demo|export)\.py$")


@pytest.fixture(scope="module")
def documents(files: list[Path]) -> dict[Path, str]:
    """All tracked Markdown files and their texts."""
    found = {path: path.read_text() for path in files if path.suffix == ".md"}
    assert len(found) > 10
    return found


def manuals() -> list[Path]:
    """The documents whose examples readers try; none where the project was copied out of its repository."""
    found = [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        PROJECT / "README.md",
        PROJECT / "CONTRIBUTING.md",
    ]
    return found if (ROOT / "docs").is_dir() else []


def prose(text: str) -> str:
    """A document without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a document."""
    seen: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#{1,6} (.+)$", FENCE.sub("", text), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        names.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def links(text: str) -> list[str]:
    """Targets of all links and pictures of a document."""
    text = prose(text)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)
    return found + re.findall(r'<img src="([^"]+)"', text)


def local_links(text: str) -> Iterator[tuple[str, str]]:
    """Path and anchor of the links that need no network."""
    for link in links(text):
        if not re.match(r"https?:|mailto:", link):
            path, _, anchor = unquote(link).partition("#")
            yield path, anchor


def broken_links(documents: dict[Path, str]) -> list[str]:
    """Links to files or headings that are not there, and references that are not defined."""
    known = {path.resolve(): text for path, text in documents.items()}
    broken = []
    for document, text in documents.items():
        for path, anchor in local_links(text):
            target = (document.parent / path).resolve() if path else document.resolve()
            if not target.exists() or (anchor and anchor not in anchors(known.get(target, ""))):
                broken.append(f"{document}: {path}#{anchor}")
        defined = {name.lower() for name in re.findall(r"^\[([^\]]+)\]: ", text, re.MULTILINE)}
        used = {name.lower() for name in re.findall(r"\]\[([^\]]+)\]", prose(text))}
        broken += [f"{document}: [{name}] is not defined" for name in used - defined]
    return broken


def test_links_work_offline(documents: dict[Path, str]) -> None:
    assert not broken_links(documents)
    assert sum(len(list(local_links(text))) for text in documents.values()) > 50


@pytest.mark.parametrize(
    "text", ["[a](missing.md)", "[a](#missing)", "[a](other.md#missing)", "![a](missing.jpg)", "[a][missing]"]
)
def test_a_broken_link_is_noticed(tmp_path: Path, text: str) -> None:
    for name in ("page.md", "other.md"):
        (tmp_path / name).write_text("# One heading\n")
    good = "[a](other.md), [b](#one-heading), [c](other.md#one-heading), [d][e], `[f](code)`\n\n[e]: other.md\n"
    assert not broken_links({tmp_path / "page.md": "# One heading\n" + good, tmp_path / "other.md": "# One heading\n"})
    found = broken_links({tmp_path / "page.md": text, tmp_path / "other.md": "# One heading\n"})
    assert len(found) == 1 and "missing" in found[0]


def test_every_document_is_reached_from_the_readme(documents: dict[Path, str], repository: Path) -> None:
    texts = {path.resolve(): text for path, text in documents.items()}
    reached, waiting = set(), [(repository / "README.md").resolve()]
    while waiting:
        page = waiting.pop()
        if page not in texts or page in reached:
            continue
        reached.add(page)
        targets = [(page.parent / path).resolve() for path, _ in local_links(texts[page]) if path]
        waiting += [target / "README.md" if target.is_dir() else target for target in targets]
    # A folder's README.md explains the folder to whoever opens it; pages are what one has to be led to.
    pages = {path for path in texts if path.name != "README.md" or path.parent == (repository / "docs").resolve()}
    github = {(repository / "SECURITY.md").resolve()}  # GitHub links it by itself
    assert not pages - reached - github


def test_make_targets_in_the_documents_exist(repository: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (repository / "Makefile").read_text(), re.MULTILINE))
    for path in manuals():
        code = "\n".join(
            [*re.findall(r"`([^`\n]*)`", path.read_text()), *(block for _, block in FENCE.findall(path.read_text()))]
        )
        named = set(re.findall(r"\bmake (?:[A-Z]+=\S+ )*([a-z]+)", code))
        assert named <= targets, path
        if path == repository / "README.md":
            assert {"demo", "test"} <= named


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of every command of a document: lines of shell code, and `code` that starts with a program of ours."""
    shell = [line for language, block in FENCE.findall(text) if language == "bash" for line in block.splitlines()]
    shell += re.findall(r"`((?:python |dev/)[^`\n]*)`", FENCE.sub("", text))
    for line in shell:
        words: list[str] = []
        for word in [*shlex.split(line.replace("&&", " && "), comments=True), "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                yield words
                words = []


def program_of(words: list[str]) -> tuple[str, ...]:
    """The file or module of this project that a command runs; empty if it runs something else."""
    if Path(words[0]).name == "python":
        program = words[1:3] if words[1:2] == ["-m"] else words[1:2]
    else:
        program = words[:1] if words[0].endswith(".sh") else []
    return tuple(program) if program and OURS.match(program[-1].removeprefix("projects/DeformableConvNets/")) else ()


def commands() -> dict[tuple[str, ...], set[str]]:
    """The programs that the documents name, with all options that they give them."""
    found: dict[tuple[str, ...], set[str]] = {}
    for path in manuals():
        for words in command_lines(path.read_text()):
            if program := program_of(words):
                options = [word.partition("=")[0] for word in words if re.match(r"--\w", word)]
                found.setdefault(program, set()).update(options)
    return found


def help_of(program: tuple[str, ...]) -> str:
    """What a program says about its options."""
    name = program[-1].removeprefix("projects/DeformableConvNets/")
    if name.endswith(".sh"):
        return (PROJECT / name).read_text()
    command = [sys.executable, *program[:-1], name, "--help"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    if re.search(
        r"No module named '(mmcv|mmdet|mmengine)", done.stderr
    ):  # few have MMDetection: read the source instead
        return (PROJECT / name.replace(".", "/") / "__main__.py").read_text()
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("program", "options"), sorted(commands().items()), ids=lambda value: value[-1] if isinstance(value, tuple) else ""
)
def test_commands_in_the_documents_take_the_options_they_are_given(program: tuple[str, ...], options: set[str]) -> None:
    text = help_of(program)
    assert not [option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", text)]


def test_training_commands_in_the_documents_can_be_read(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [words for path in manuals() for words in command_lines(path.read_text()) if "train_net.py" in words]
    assert len(found) > 5
    monkeypatch.chdir(tmp_path)
    for words in found:
        for option, name in zip(words, words[1:]):  # arguments of data must exist
            if option in ("--train-images", "--test-images"):
                Path(name).mkdir(parents=True, exist_ok=True)
            if option in ("--train-json", "--test-json"):
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).touch()
        train_net.parse_arguments(words[words.index("train_net.py") + 1 :])


def test_commands_are_found_in_the_documents(repository: Path) -> None:
    found = commands()
    assert {"--config-file", "--resume", "--eval-only", "--published", "--dist-url"} <= found["train_net.py",]
    assert found["-m", "dcn_d2.info"] == {"--check"} and "--kills" in found["dev/campaign/kills.py",]


def test_files_in_commands_and_in_prose_exist(repository: Path, project: Path) -> None:
    folders = r"(?:configs|examples|dcn_d2|csrc|benchmarks|results|tests|dev|docs|projects)/"
    missing = []
    for path in manuals():
        text = path.read_text()
        words = [word for words in command_lines(text) for word in words]
        words += re.findall(r"(?<![\w/.])projects/DeformableConvNets(?:/[\w./-]*\w)?", text)
        words += re.findall(rf"`({folders}[\w./-]+\.(?:py|sh|yaml|md|txt|json))`", text)
        for word in words:
            if re.match(folders, word) and not re.search(r"[*$]|NAME|KIND", word):
                missing += [] if (project / word).exists() or (repository / word).exists() else [f"{path}: {word}"]
    assert not missing


def test_config_keys_in_the_documents_exist(repository: Path) -> None:
    cfg = load_config("")
    keys = set()
    for path in manuals():
        keys |= set(
            re.findall(r"\b((?:MODEL|SOLVER|INPUT|DATASETS|PUBLISHED|TEST)\.[A-Z_.0-9]*[A-Z0-9])\b", path.read_text())
        )
    assert len(keys) > 10
    for key in keys:
        node = cfg
        for part in key.split("."):
            assert part in node, key
            node = node[part]


def test_names_of_dcn_d2_in_the_documents_exist(repository: Path) -> None:
    found = set()
    for path in manuals():
        found |= set(re.findall(r"`(dcn_d2(?:\.\w+)+)(?=[`(])", path.read_text()))
    assert len(found) > 5
    for name in found - {"dcn_d2.ops.NAME"}:
        module, _, attribute = name.rpartition(".")
        if not hasattr(importlib.import_module(module), attribute):
            importlib.import_module(name)  # a module


def test_the_security_page_is_linked_and_its_commands_exist(repository: Path, project: Path) -> None:
    page = "docs/security.md"
    assert all(f"({page})" in (repository / name).read_text() for name in ("README.md", "SECURITY.md"))
    scripts = re.findall(r"`((?:dev/)?\w+\.(?:py|sh))`", (repository / page).read_text())
    assert {"train_net.py", "predict.py", "demo.py"} <= set(scripts)
    assert not [name for name in scripts if not (project / name).exists()]


def python_blocks() -> list[tuple[str, str]]:
    """The Python code of the documents, and where it stands."""
    found = []
    for path in manuals():
        for number, (language, block) in enumerate(FENCE.findall(path.read_text())):
            if language == "python":
                found.append((f"{path.name}-{number}", block))
    return found


@pytest.mark.parametrize("block", [block for _, block in python_blocks()], ids=[name for name, _ in python_blocks()])
def test_python_in_the_documents_runs(block: str) -> None:
    """All of what needs nothing that only the reader has; of the rest, the imports."""
    compile(block, "document", "exec")
    imports = [line for line in block.splitlines() if line.startswith(("import ", "from "))]
    needs_more = re.search(r"output/|annotations/|trained=True", block)  # weights, data or a network
    exec("\n".join(imports) if needs_more else block, {})


def test_imports_that_replace_those_of_other_packages_work(repository: Path) -> None:
    imports = [
        line for path in manuals() for line in re.findall(r"`(from dcn_d2[\w.]* import [\w, ]+)`", path.read_text())
    ]
    assert len(imports) >= 8
    for line in imports:
        exec(line, {})


def test_weights_of_torchvisions_layer_fit() -> None:
    theirs = torchvision.ops.DeformConv2d(8, 6, 3, padding=1, groups=2)
    ours = layers.ModulatedDeformConv(8, 6, 3, padding=1, groups=2, deformable_groups=2)
    ours.load_state_dict(theirs.state_dict())
    x, offset, mask = torch.randn(1, 8, 5, 7), torch.randn(1, 36, 5, 7), torch.rand(1, 18, 5, 7)
    torch.testing.assert_close(ours(x, offset, mask), theirs(x, offset, mask), rtol=1e-4, atol=1e-4)


def test_what_the_readme_says_of_torchvision_holds() -> None:
    if not torchvision.__version__.startswith("0.29."):
        pytest.skip(f"the README is about torchvision 0.29, here is {torchvision.__version__}")
    x, offset, weight = torch.randn(1, 4, 5, 7), torch.zeros(1, 18, 5, 7), torch.randn(6, 4, 3, 3, requires_grad=True)
    theirs = torchvision.ops.deform_conv2d
    with pytest.raises(RuntimeError, match="BFloat16"):
        theirs(x.bfloat16(), offset.bfloat16(), weight.bfloat16(), padding=1)
    last = theirs(x.contiguous(memory_format=torch.channels_last), offset, weight, padding=1)
    assert not last.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(last.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="double backwards"):
        grad.sum().backward()
