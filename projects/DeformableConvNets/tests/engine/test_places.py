# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import pytest

from dcn_d2.engine.places import Place, find_place
from dcn_d2.engine.torchrun import _device, check_agrees, check_joined

MEET = {"MASTER_ADDR": "node1", "MASTER_PORT": "29400"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MEET}
MPI = {f"OMPI_COMM_WORLD_{key}": value for key, value in zip(("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK"), "4321")}
MPI |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_RANK": "3"}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08],big3",
}


@pytest.mark.parametrize(
    "environ, expected",
    [
        (TORCHRUN, ("torchrun", 3, 4, 1, 2, "node1", 29400)),
        (TORCHRUN | {"LOCAL_RANK": "0"}, ("torchrun", 3, 4, 1, 2, "node1", 29400)),  # --virtual-local-rank
        (TORCHRUN | {"SUBMITIT_EXECUTOR": "slurm"}, ("the SLURM job", 3, 4, 1, 2, "node1", 29400)),
        # Tasks that srun has dealt out like cards are numbered node by node.
        (SRUN, ("srun", 2, 4, 0, 2, "gpu07", 15000 + 16 * 77)),
        (SRUN | {"SLURM_STEP_NODELIST": "a-1,a-2"}, ("srun", 2, 4, 0, 2, "a-1", 15000 + 16 * 77)),
        (SRUN | MEET, ("srun", 2, 4, 0, 2, "node1", 29400)),
        (SRUN | MEET | {"RANK": "2", "WORLD_SIZE": "4"}, ("a launcher", 2, 4, 0, 2, "node1", 29400)),
        (MPI | {"MASTER_ADDR": "node1"}, ("mpirun", 3, 4, 1, 2, "node1", 29500)),
        (MPI | MEET | {"RANK": "3", "WORLD_SIZE": "4"}, ("a launcher", 3, 4, 1, 2, "node1", 29400)),
    ],
)
def test_place_is_read_from_the_environment(environ: dict[str, str], expected: tuple) -> None:
    place = find_place(environ)
    assert place
    found = (place.launcher, place.rank, place.world_size, place.local_rank, place.local_size)
    assert (*found, place.address, place.port) == expected
    assert find_place({**place.variables()}) == Place("torchrun", *expected[1:], own_gpu=place.local_rank == 0)


@pytest.mark.parametrize(
    "environ, message",
    [
        ({"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, "torchrun has started 2 .* RANK and LOCAL_RANK and"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            "MASTER_ADDR and MASTER_PORT are",
        ),
        ({"RANK": "0", "WORLD_SIZE": "4", **MEET}, "a launcher has started 4.*LOCAL_RANK and LOCAL_WORLD_SIZE are not"),
        (MPI, "mpirun has started 4 processes, but MASTER_ADDR is not set.*each would train by itself"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started 2 processes, but OMPI_COMM_WORLD_RANK and"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "srun has started 2 tasks .* SLURM_TASKS_PER_NODE is not set"),
        (SRUN | {"SLURM_STEP_NODELIST": ""}, "srun has started 4 tasks .*MASTER_ADDR is not set"),
        (SRUN | {"SLURM_DISTRIBUTION": "arbitrary"}, "MASTER_ADDR is not set"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3,1"}, "on the nodes 3,1 .*--ntasks-per-node"),
        (TORCHRUN | {"RANK": "2", "LOCAL_RANK": "1"}, "number 2 is number 1 of 2 on its machine.*machine by machine"),
        (TORCHRUN | {"WORLD_SIZE": "5"}, "equally many on each machine"),
    ],
)
def test_processes_that_cannot_find_each_other_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_place(environ)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},  # the script of a batch job, before srun
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"},
    ],
)
def test_single_process_has_no_place(environ: dict[str, str]) -> None:
    assert find_place(environ) is None
    check_joined(environ)


def test_one_launcher_on_each_machine_is_fine() -> None:
    assert find_place(SRUN, num_machines=2) is None
    assert find_place({"RANK": "1", "WORLD_SIZE": "2"}, num_machines=2) is None
    assert find_place(TORCHRUN, num_machines=2)


def test_single_process_of_ray_is_connected_too() -> None:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    place = find_place(TORCHRUN | alone, connected=True)
    assert place and (place.world_size, place.machines) == (1, 1)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"num_gpus": 4}, "--num-gpus is 4, but torchrun has started 2 process"),
        ({"num_gpus": 1}, "--num-gpus is 1, but"),
        ({"num_machines": 1}, "--num-machines is 1, but .* each of 2 machine"),
        ({"machine_rank": 0}, "--machine-rank is 0, but .* this is machine 1"),
        ({"dist_url": "tcp://other:29400"}, "--dist-url is tcp://other:29400, but .* meet at tcp://node1:29400"),
    ],
)
def test_arguments_that_contradict_the_launcher_are_refused(given: dict, message: str) -> None:
    place = find_place(TORCHRUN)
    assert place
    with pytest.raises(ValueError, match=message):
        check_agrees(given, place)


def test_arguments_that_repeat_the_launcher_are_fine() -> None:
    place = find_place(TORCHRUN)
    assert place
    check_agrees({"num_gpus": 2, "num_machines": 2, "machine_rank": 1, "dist_url": place.url}, place)
    check_agrees({}, place)


def test_trainer_in_a_process_that_has_not_joined_is_refused() -> None:
    with pytest.raises(ValueError, match="torchrun has started 4 processes, but this program has not joined them"):
        check_joined(TORCHRUN)


def test_each_process_has_its_gpu() -> None:
    place = find_place(TORCHRUN)
    assert place and _device(place, 2) == 1 and _device(place, 8) == 1
    with pytest.raises(ValueError, match="2 processes on this machine, but it has 1 GPU"):
        _device(place, 1)
    alone = find_place(SRUN | {"SLURM_LOCALID": "1"})
    assert alone and _device(alone, 1) == 0 and _device(alone, 2) == 1
