# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Config files are data: nothing in them runs, and what cannot be read is told with file and line."""

import os
import subprocess
import sys
from pathlib import Path

import detectron2.model_zoo
import pytest
import yaml

from dcn_d2 import model_zoo
from dcn_d2.config import ConfigError, load_config
from dcn_d2.config.reader import read_config_file

DETECTRON2_CONFIGS = Path(detectron2.model_zoo.__file__).parent / "configs"

ATTACKS = {
    "a call": "SEED: !!python/object/apply:os.mkdir ['{harm}']",
    "a call below a key": "MODEL:\n  WEIGHTS: !!python/object/apply:os.mkdir ['{harm}']",
    "a call in a list": "DATASETS:\n  TRAIN: [!!python/object/apply:os.mkdir ['{harm}']]",
    "a call as a key": "? !!python/object/apply:os.mkdir ['{harm}']\n: 1",
    "a new object": "SEED: !!python/object/new:os.mkdir ['{harm}']",
    "the whole file": "!!python/object/apply:os.mkdir ['{harm}']",
    "a mapping of the whole file": "!!python/object/apply:os.mkdir\nargs: ['{harm}']",
    "a module": "SEED: !!python/module:antigravity",
    "a name": "SEED: !!python/name:os.system",
}


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("door", ["itself", "_BASE_", "list of _BASE_"])
def test_code_in_a_config_ran(text: str, door: str, tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    evil = write(tmp_path / "evil.yaml", text.replace("{harm}", str(harm)))
    if door != "itself":
        base = "evil.yaml" if door == "_BASE_" else "[evil.yaml]"
        write(tmp_path / "child.yaml", f"_BASE_: {base}\nSEED: 1\n")
    with pytest.raises(ConfigError, match=r"evil.yaml, line \d: the tag !!python/.* is refused") as error:
        load_config(evil if door == "itself" else str(tmp_path / "child.yaml"))
    assert not harm.exists()
    assert "\n" not in str(error.value)


def test_the_refused_tag_is_named_with_its_line(tmp_path: Path) -> None:
    evil = write(tmp_path / "evil.yaml", "MODEL:\n  MASK_ON: False\nSEED: !!python/object/apply:os.mkdir [a]\n")
    with pytest.raises(ConfigError, match="evil.yaml, line 3: the tag !!python/object/apply:os.mkdir is refused"):
        load_config(evil)


@pytest.mark.parametrize("script, more", [("train_net.py", []), ("demo.py", ["--input", "a.png"])])
def test_code_in_a_config_ran_through_a_command_line(
    script: str, more: list[str], project: Path, tmp_path: Path
) -> None:
    harm = tmp_path / "harm"
    evil = write(tmp_path / "evil.yaml", ATTACKS["a call"].replace("{harm}", str(harm)))
    result = subprocess.run(
        [sys.executable, project / script, "--config-file", evil, *more],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(project)},
    )
    assert result.returncode != 0 and not harm.exists()
    assert "the tag !!python/object/apply:os.mkdir is refused" in result.stderr


@pytest.mark.parametrize("value", ["__import__('os').mkdir('{harm}')", "[x for x in (1,)]", "open('{harm}', 'w')"])
def test_values_of_the_command_line_are_literals(value: str, tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    value = value.replace("{harm}", str(harm))
    assert load_config("", ["MODEL.WEIGHTS", value]).MODEL.WEIGHTS == value
    with pytest.raises(ConfigError, match="SEED must be a whole number"):
        load_config("", ["SEED", value])
    assert not harm.exists()


def test_lazy_configs_are_refused(tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    program = write(tmp_path / "config.py", f"import os\nos.mkdir({str(harm)!r})\ncfg = {{}}\n")
    with pytest.raises(ConfigError, match="config.py is a program .* give a YAML file"):
        load_config(program)
    assert not harm.exists()


def test_tuples_are_data(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "SOLVER:\n  STEPS: !!python/tuple [1, 2]\nVERSION: 2\n")
    assert load_config(file).SOLVER.STEPS == (1, 2)


@pytest.mark.parametrize("name", model_zoo.list_models())
def test_dumped_configs_can_be_read_again(name: str, tmp_path: Path) -> None:
    cfg = model_zoo.get_config(name)
    again = load_config(write(tmp_path / "config.yaml", cfg.dump()))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())  # tuples in tuples have become lists
    assert type(again) is type(cfg) and type(again.MODEL.DCN) is type(cfg.MODEL.DCN)


@pytest.mark.parametrize(
    "file",
    sorted(DETECTRON2_CONFIGS.rglob("*.yaml")),
    ids=lambda file: file.relative_to(DETECTRON2_CONFIGS).as_posix(),
)
def test_every_config_of_detectron2_is_as_detectron2_reads_it(file: Path) -> None:
    from detectron2.config import get_cfg

    theirs, mine = get_cfg(), load_config(str(file))
    theirs.merge_from_file(str(file))  # Base-RetinaNet.yaml computes its anchors with a tag that runs code
    for key in ("DCN", *theirs.MODEL):
        if key != "DCN":
            assert mine.MODEL[key] == theirs.MODEL[key]
    for node in ("DATASETS", "TEST"):  # TEST has keys of dcn_d2 besides
        for key in theirs[node]:
            assert mine[node][key] == theirs[node][key]


def test_a_copy_of_detectron2s_config_is_a_strangers(tmp_path: Path) -> None:
    copy = write(tmp_path / "Base-RetinaNet.yaml", (DETECTRON2_CONFIGS / "Base-RetinaNet.yaml").read_text())
    with pytest.raises(ConfigError, match="!!python/object/apply:eval is refused.*write the value out"):
        load_config(copy)


BROKEN = {
    "a tab": ("MODEL:\n\tMASK_ON: True\n", "a.yaml, line 2: not valid YAML: a tab; YAML is indented with spaces"),
    "an open bracket": ("SEED: [1\nVERSION: 2\n", r"a.yaml, line 2: not valid YAML: expected ',' or '\]'"),
    "a list": ("- 1\n- 2\n", "a.yaml holds a list, but lines KEY: VALUE were expected"),
    "a word": ("hello\n", "a.yaml holds a single value"),
    "nothing": ("# nothing\n", "a.yaml holds nothing"),
    "two documents": ("SEED: 1\n---\nSEED: 2\n", "a.yaml, line 2: not valid YAML: but found another document"),
    "a number as a key": ("SEED: 1\n2: 3\n", "a.yaml, line 2: a key must be a name, got '2'"),
    "a truth as a key": ("on: 3\n", "a.yaml, line 1: a key must be a name, got 'on'"),
    "a list as a key": ("? [1]\n: 3\n", "a.yaml, line 1: a key must be a name"),
    "a key twice": (
        "MODEL:\n  MASK_ON: True\nSEED: 1\nMODEL:\n  DEVICE: cpu\n",
        "a.yaml: MODEL stands twice, in lines 1 and 4; only the last would count",
    ),
    "an unknown alias": ("SEED: *a\n", "a.yaml, line 1: not valid YAML: found undefined alias 'a'"),
    "itself inside": ("MODEL: &a\n  DCN: *a\n", "a.yaml, line 1: MODEL.DCN contains itself"),
    "a bomb of aliases": (
        "A0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"A{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(8)),
        "its aliases grow to more than 100000 values",
    ),
    "a deep nest": ("SEED: " + "[" * 5000 + "]" * 5000, "a.yaml is nested too deeply"),
    "no date": ("SEED: 2020-13-45\n", "a.yaml is not valid YAML: month must be in 1..12"),
    "a date": ("SEED: 2020-01-01\n", "a.yaml, line 1: .*SEED must be a whole number"),
    "no version": ("VERSION: 3\n", "a.yaml, line 1: VERSION must be 1 or 2, got 3"),
    "its own base": ("_BASE_: a.yaml\n", "a.yaml: its _BASE_ .*a.yaml leads back to itself"),
    "an unknown base": ("_BASE_: b.yaml\n", "Config file '.*/b.yaml' does not exist"),
    "a folder as base": ("_BASE_: .\n", "Config file '.*' is a folder"),
    "a number as base": ("SEED: 1\n_BASE_: 3\n", "a.yaml, line 2: _BASE_ must name a file, or a list of files, got 3"),
    "a tag of nobody": ("SEED: !mine 3\n", "a.yaml, line 1: not valid YAML: could not determine a constructor"),
    "an unknown key": (
        "SEED: 1\nMODEL:\n  DCN:\n    NORM_EVALL: True\n",
        "a.yaml, line 4: Non-existent key: MODEL.DCN.NORM_EVALL; did you mean 'MODEL.DCN.NORM_EVAL'?",
    ),
    "an unknown node": (
        "MODEL:\n  RESNET:\n    DEPTH: 50\n",
        "a.yaml, line 2: Non-existent key: MODEL.RESNET; did you mean 'MODEL.RESNETS'?",
    ),
    "a wrong type": ("SEED: abc\n", "a.yaml, line 1: Type mismatch: SEED must be a whole number .*, got 'abc'"),
    "a value for a node": ("MODEL: 3\n", "a.yaml, line 1: Type mismatch: MODEL is a node"),
    "a node for a value": ("SEED:\n  A: 1\n", "a.yaml, line 1: Type mismatch: SEED must be a whole number"),
    "a value out of range": ("SEED: -7\n", "a.yaml, line 1: SEED must be a whole number of at least -1"),
}


@pytest.mark.parametrize("text, message", BROKEN.values(), ids=BROKEN)
def test_broken_files_are_told_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_files_that_are_none_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Config file '/nowhere/a.yaml' does not exist"):
        load_config("/nowhere/a.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(str(tmp_path))
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="a.yaml is not a text file"):
        load_config(str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_bytes(b"SEED: \x00\x01")
    with pytest.raises(ConfigError, match="a.yaml: not valid YAML"):
        load_config(str(tmp_path / "a.yaml"))


def test_a_circle_of_bases_ended_in_a_recursion_error(tmp_path: Path) -> None:
    for name, base in ("ab", "bc", "ca"):
        write(tmp_path / f"{name}.yaml", f"_BASE_: {base}.yaml\n")
    with pytest.raises(ConfigError, match="c.yaml: its _BASE_ .*a.yaml leads back to itself"):
        load_config(str(tmp_path / "a.yaml"))


def test_bases_are_merged_in_detectron2s_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sub").mkdir()
    write(tmp_path / "one.yaml", "MODEL: {MASK_ON: True, DEVICE: cpu}\nSEED: 1\n")
    write(tmp_path / "sub" / "two.yaml", "_BASE_: ../one.yaml\nSEED: 2\nVIS_PERIOD: 2\n")
    write(tmp_path / "three.yaml", "MODEL: {DEVICE: cuda}\n")
    file = write(tmp_path / "a.yaml", f"_BASE_: [~/sub/two.yaml, {tmp_path}/three.yaml]\nVIS_PERIOD: 3\n")
    values, origins = read_config_file(file)
    assert values == {"MODEL": {"MASK_ON": True, "DEVICE": "cuda"}, "SEED": 2, "VIS_PERIOD": 3}
    assert origins["MODEL.DEVICE"] == f"{tmp_path}/three.yaml, line 1"
    assert origins["SEED"] == f"{tmp_path}/sub/two.yaml, line 2"
    assert origins["VIS_PERIOD"] == f"{file}, line 2"
    from detectron2.config import CfgNode

    assert CfgNode.load_yaml_with_base(file) == values


def test_what_an_alias_shares_is_changed_in_one_place(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "MODEL:\n  RPN: &shared {NMS_THRESH: 0.7}\n  FPN: *shared\n")
    values, _ = read_config_file(
        write(tmp_path / "a.yaml", "_BASE_: base.yaml\nMODEL: {RPN: {NMS_THRESH: 0.5}}\n"),
    )
    assert values["MODEL"] == {"RPN": {"NMS_THRESH": 0.5}, "FPN": {"NMS_THRESH": 0.7}}


def test_a_base_that_is_a_value_in_one_file_and_a_node_in_another(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "MODEL: 3\n")
    with pytest.raises(
        ConfigError, match="a.yaml, line 2: MODEL has keys below it, but a value in .*base.yaml, line 1"
    ):
        load_config(write(tmp_path / "a.yaml", "_BASE_: base.yaml\nMODEL: {MASK_ON: True}\n"))


def test_configs_of_version_1_are_brought_up_to_date(tmp_path: Path) -> None:
    file = write(tmp_path / "old.yaml", "MODEL:\n  WEIGHT: a.pth\nVERSION: 1\n")
    assert load_config(file).MODEL.WEIGHTS == "a.pth"


def test_merge_keys_of_yaml_are_read(tmp_path: Path) -> None:
    text = "A: &a {X: 1, Y: 2}\nB:\n  <<: *a\n  Y: 3\n"
    file = write(tmp_path / "a.yaml", text)
    assert read_config_file(file)[0] == yaml.safe_load(text)


OPTIONS = {
    "a typo": (
        ["MODEL.DCN.NORM_EVALL", "True"],
        "Non-existent key: MODEL.DCN.NORM_EVALL; did you mean 'MODEL.DCN.NORM",
    ),
    "a typo in a node": (
        ["MODEL.RESNET.DEPTH", "50"],
        "Non-existent key: MODEL.RESNET.DEPTH; did you mean 'MODEL.RESN",
    ),
    "the last part alone": (["NORM_EVAL", "True"], "Non-existent key: NORM_EVAL; did you mean 'MODEL.DCN.NORM_EVAL'"),
    "below a value": (["MODEL.DEVICE.c", "1"], "Non-existent key: MODEL.DEVICE.c"),
    "in small letters": (["model.device", "cpu"], "Non-existent key: model.device; did you mean 'MODEL.DEVICE'"),
    "the key of bases": (["_BASE_", "a.yaml"], "Non-existent key: _BASE_"),
    "no pair": (["SEED"], "KEY VALUE must come in pairs, got SEED"),
    "no word for a truth": (["MODEL.DCN.NORM_EVAL", "maybe"], "MODEL.DCN.NORM_EVAL must be True or False, got 'maybe'"),
    "no point": (
        ["SOLVER.OFFSET_LR_FACTOR", "1"],
        "SOLVER.OFFSET_LR_FACTOR must be written with a decimal point, 1.0, got 1",
    ),
    "a number for a string": (
        ["OUTPUT_DIR", "5"],
        """OUTPUT_DIR must be a string, got 5 .quotes make it one: "'5'".""",
    ),
    "a node": (["MODEL", "5"], "MODEL is a node with the keys LOAD_PROPOSALS, "),
    "nothing": (["MODEL.DCN.NORM_EVAL", "None"], "MODEL.DCN.NORM_EVAL must be True or False, got None"),
    "no hashable": (["SEED", "{[]: 1}"], "SEED must be a whole number"),
    "a deep nest": (["SEED", "(" * 10000], "SEED must be a whole number"),
    "a long value": (["SEED", "9" * 3000], "SEED must be a whole number"),
    "a zero byte": (["SEED", "\0"], "SEED must be a whole number"),
}


@pytest.mark.parametrize("options, message", OPTIONS.values(), ids=OPTIONS)
def test_mistaken_options_are_told_in_one_line(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config("", options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_options_override_a_wrong_value_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "SEED: -7\n")
    assert load_config(file, ["SEED", "7"]).SEED == 7
    with pytest.raises(ConfigError) as error:
        load_config(file, ["SEED", "-8"])
    assert "a.yaml" not in str(error.value)
    assert load_config(file, check=False).SEED == -7
