# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Prints the constraints that suit this environment: what it has already stays, the rest gets the tested version.

Handing constraints.txt to pip as it is would replace a torch of another version, which may be one that was built
for the machine. Runs before anything is installed, hence only with pip's own copy of `packaging`.
"""

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

DEV = Path(__file__).resolve().parent
KEPT = ("torch", "torchvision")  # never replaced; dev/setup.sh sees to detectron2


def installed_version(name: str) -> str | None:
    """Returns the version that this interpreter sees, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def read(path: Path) -> list[Requirement]:
    """Returns the requirements of a file that apply to this interpreter."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    return [r for r in found if r.marker is None or r.marker.evaluate()]


def pins(
    requirements: list[Requirement],
    tested: list[Requirement],
    installed: Callable[[str], str | None] = installed_version,
) -> Iterator[str]:
    """Yields one `name==version` for each package of the tested set.

    Raises:
        SystemExit: a torch or torchvision is there that is too old; replacing it is the user's decision.
    """
    accepted = {r.name: r.specifier for r in requirements}
    for pin in tested:
        have = installed(pin.name)
        if have is None:
            # A torch of another version needs the torchvision that goes with it: pip works it out.
            if pin.name != "torchvision" or installed("torch") is None:
                yield f"{pin.name}{pin.specifier}"
        elif accepted[pin.name].contains(have, prereleases=True):
            yield f"{pin.name}=={have}"
        elif pin.name in KEPT:
            raise SystemExit(
                f"{sys.prefix} has {pin.name} {have}, but {pin.name}{accepted[pin.name]} is needed. Upgrade it there, "
                "or leave VENV out to get a separate environment in .venv."
            )
        else:
            yield f"{pin.name}{pin.specifier}"


if __name__ == "__main__":
    print("\n".join(pins(read(DEV / "requirements.txt"), read(DEV / "constraints.txt"))))
