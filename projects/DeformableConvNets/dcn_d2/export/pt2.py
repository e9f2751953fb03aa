# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Files of torch.export: programs that PyTorch runs, or packages that AOTInductor has compiled from them.

A file needs the operators of dcn_d2 and torchvision's RoIAlign where it runs, that is their compiled libraries, but
neither Detectron2 nor the Python code of dcn_d2. Both kinds are programs: load only files that you trust. A package
holds machine code, and PyTorch evaluates text in the other kind as Python.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from ..files import write_atomically
from .description import KEY, Description
from .shapes import dynamic_shapes
from .torch_files import EXTRA_FILE, Archive, TorchSession, explained, without_expected_warnings

# The key of a package's metadata that holds the version of PyTorch that compiled it.
_TORCH = "torch"
# The folder of a package that holds its machine code.
_COMPILED = "data/aotinductor/"
# What the instruction sets of a package are called, and whether this processor has them.
_INSTRUCTION_SETS: dict[str, Callable[[], bool]] = {
    "AVX2": torch.cpu._is_avx2_supported,
    "AVX512": torch.cpu._is_avx512_supported,
    "AVX512_VNNI": torch.cpu._is_vnni_supported,
    "AMX_TILE": torch.cpu._is_amx_tile_supported,
}


def write(
    module: nn.Module, inputs: tuple[Tensor, ...], description: Description, path: Path, compile: bool = False
) -> None:
    """Exports a module by torch.export and writes it.

    Args:
        module: in evaluation mode.
        inputs: examples, with which it is traced.
        description: says which sizes are free, and goes into the file.
        path: of the file.
        compile: whether AOTInductor compiles it into a package. That needs a C++ compiler here, but not where it runs.
            The package is for this operating system, and for processors that have the instruction sets of this one.
            The environment variable ATEN_CPU_CAPABILITY chooses older ones: avx2, or default for none.

    Raises:
        ValueError: there is no C++ compiler to compile it with, or PyTorch is too old to choose processors.
    """
    if compile:
        _check_compiler()
    with torch.no_grad(), without_expected_warnings(), write_atomically(path) as file:
        program = torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes(description), strict=False)
        if compile:
            _compile(program, description, file)
        else:
            # They would lie in the file as a pickle, and are only noise.
            program.example_inputs = None
            torch.export.save(program, file, extra_files={EXTRA_FILE: description.to_json()})


def _check_compiler() -> None:
    from torch._inductor import config, cpp_builder, exc

    if platform.machine() == "x86_64" and not hasattr(
        config.cpp, "march"
    ):  # PyTorch 2.10 and 2.11 have no such setting
        raise ValueError(
            f"PyTorch {torch.__version__} compiles for all that this processor has, and a package would crash on "
            "others. Export with a later version, or without compiling"
        )
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        tried = " or ".join(name for name in config.cpp.cxx if name)
        raise ValueError(
            f"AOTInductor needs a C++ compiler, and {tried} does not run. Install it, or name another one in the "
            "environment variable CXX, or export without compiling; only this machine needs it"
        ) from error


def _compile(program: torch.export.ExportedProgram, description: Description, file: IO[bytes]) -> None:
    import torch._inductor

    options: dict[str, Any] = {
        "aot_inductor.metadata": {KEY: description.to_json(), _TORCH: torch.__version__},
        "freezing": True,  # weights are laid out for the processor: 1.3 times as fast for a ResNet-50 on one core
        "cpp.dynamic_threads": True,  # otherwise it runs with as many threads as there are now
    }
    if platform.machine() == "x86_64" and torch._inductor.config.cpp.march is None:
        # Otherwise the compiler uses all that this processor has, and a package does not say what that was.
        instruction_set = str(torch._inductor.cpu_vec_isa.pick_vec_isa()).upper()
        level = "v4" if "AVX512" in instruction_set else "v3" if "AVX2" in instruction_set else "v2"
        options["cpp.march"] = f"x86-64-{level}"
    torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs=options)


class Session(TorchSession):
    """A file of torch.export or a package of AOTInductor that dcn_d2 wrote, ready to run on the CPU.

    The file is a program: trust it before you load it.

    Args:
        path: of the file.
        threads: how many PyTorch uses while it runs; 0 leaves it to `torch.set_num_threads`.

    Raises:
        ValueError: dcn_d2 did not write the file, it is damaged, or it was compiled for another machine.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 0) -> None:
        archive = Archive(path)
        self.compiled = any(name.startswith(_COMPILED) for name in archive.names)
        description, program = (_load_package if self.compiled else _load_program)(archive)
        super().__init__(description, program, threads)


def _load_program(archive: Archive) -> tuple[Description, Callable[..., Any]]:
    description = archive.description()
    with explained(archive.path):
        return description, torch.export.load(archive.path).module()


def _load_package(archive: Archive) -> tuple[Description, Callable[..., Any]]:
    metadata = next(
        (
            archive.read(name)
            for name in archive.names
            if name.startswith(_COMPILED) and name.endswith("wrapper_metadata.json")
        ),
        "{}",
    )
    try:
        values: Mapping[str, str] = json.loads(metadata)
        text = values[KEY]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{archive.path} was not exported by dcn_d2: it does not describe itself") from error
    description = Description.from_json(text, archive.path)
    _check_machine(values, archive.path)
    # torch._inductor.aoti_load_package does the same, but first compiles a program to learn about the processor.
    with explained(archive.path):
        package = torch._C._aoti.AOTIModelPackageLoader(archive.path, "model", False, 1, -1)
    return description, lambda *tensors: package.run(list(tensors))


def _check_machine(metadata: Mapping[str, str], path: str) -> None:
    """Refuses machine code for another machine, on which it would crash the process."""
    here = {"AOTI_PLATFORM": sys.platform, "AOTI_MACHINE": platform.machine()}
    for key, value in here.items():
        if metadata.get(key) != value:
            raise ValueError(
                f"{path} was compiled for {metadata.get(key)}, and this machine is {value}. Export it on such a "
                "machine, or without compiling it"
            )
    missing = [
        name
        for name in metadata.get("AOTI_CPU_ISA", "").upper().split()
        if name in _INSTRUCTION_SETS and not _INSTRUCTION_SETS[name]()
    ]
    if missing:
        raise ValueError(
            f"{path} was compiled for processors with {' and '.join(missing)}, which this one does not have. Export it "
            "here, or with the environment variable ATEN_CPU_CAPABILITY=avx2, or without compiling it"
        )
