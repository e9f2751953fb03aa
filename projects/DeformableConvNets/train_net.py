#!/usr/bin/env python3
# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Trains and evaluates deformable detectors; takes the arguments of Detectron2's tools/train_net.py.

PyTorch and Detectron2 are imported in the functions, so that --help and mistyped arguments answer at once.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from dcn_d2.command_line.cluster import given_places, said_once, speaks, without_slurm
from dcn_d2.command_line.train import TOLERANCE, build_parser, parse_arguments
from dcn_d2.quiet import silence_detectron2_warnings

if TYPE_CHECKING:
    from detectron2.config import CfgNode

    from dcn_d2.engine.restart import Mark

silence_detectron2_warnings()  # here, because each process of a job imports this file first

PUBLISHED_ON = "coco_2017_val"


def read_job(args: argparse.Namespace) -> CfgNode:
    """Reads the config, and finds what cannot work before processes are started.

    Those are values of the config, OUTPUT_DIR, data sets, weights and the number of GPUs.

    Returns:
        The config; all processes of this machine get this one.
    """
    import torch
    from detectron2.utils import comm

    from dcn_d2.config.published import use_published_weights
    from dcn_d2.engine import DCNTrainer, folder, load_config
    from dcn_d2.engine.checks import check_weights_exist
    from dcn_d2.engine.own_data import use_own_data
    from dcn_d2.export.settings import read_exported
    from dcn_d2.model_zoo import find_config_file

    args.config_file = find_config_file(args.config_file)
    cfg = read_exported(args, args.num_gpus) if args.model else load_config(args.config_file, args.opts)
    if args.published:
        check_published(args.config_file, cfg)
        use_published_weights(cfg, "--published", args.config_file)
    if not args.eval_only and args.machine_rank == 0 and comm.is_main_process():
        folder.check_unlocked(cfg.OUTPUT_DIR)
        folder.check_start(cfg, args.resume, args.overwrite)
    args.notes = use_own_data(args, cfg)
    if args.model:
        args.notes.append(f"evaluating {args.exported}")
    DCNTrainer.check(cfg, train=not args.eval_only)
    if not args.eval_only:
        folder.check_writable(cfg.OUTPUT_DIR)
    if not (args.resume and folder.describe_earlier_run(cfg.OUTPUT_DIR)) and not args.published:
        check_weights_exist(cfg, needed=args.eval_only)
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and args.num_gpus > gpus:
        raise ValueError(f"--num-gpus is {args.num_gpus}, but this machine has {gpus}")
    if args.published:
        from detectron2.utils.file_io import PathManager

        PathManager.get_local_path(cfg.MODEL.WEIGHTS)  # so that the processes find it in the cache
    return cfg


def check_data(args: argparse.Namespace) -> int:
    """Inspects the data and gives the exit code. It starts no process and trains nothing."""
    from dcn_d2.config import load_config
    from dcn_d2.data.inspection.command import run_check_data
    from dcn_d2.model_zoo import find_config_file

    return run_check_data(args, load_config(find_config_file(args.config_file), args.opts))


def check_published(config_file: str, cfg: CfgNode) -> None:
    """Refuses a config whose published AP cannot be compared; `config_file` is for messages."""
    if not cfg.PUBLISHED.WEIGHTS or not cfg.PUBLISHED.BOX_AP:
        raise ValueError(f"--published: the config {config_file!r} has no PUBLISHED.WEIGHTS and PUBLISHED.BOX_AP")
    if cfg.DATASETS.TEST != (PUBLISHED_ON,):
        raise ValueError(f"--published: the published AP is for {PUBLISHED_ON}, DATASETS.TEST is {cfg.DATASETS.TEST}")


def compare_with_published(published: dict[str, float], results: dict[str, Any]) -> tuple[str, list[str]]:
    """Compares an evaluation with what is published.

    Args:
        published: BOX_AP and, for a model with masks, MASK_AP; 0 stands for nothing.
        results: what the evaluation gave, {"bbox": {"AP": …}, …}.

    Returns:
        A table, and the names of the numbers that differ by more than `TOLERANCE`.
    """
    lines, off = [f"{'':10}{'published':>10}{'measured':>10}{'difference':>12}"], []
    for name, key, task in (("box AP", "BOX_AP", "bbox"), ("mask AP", "MASK_AP", "segm")):
        expected = published.get(key, 0)
        if not expected:
            continue
        measured = results.get(task, {}).get("AP", float("nan"))
        difference = measured - expected
        lines.append(f"{name:10}{expected:10.1f}{measured:10.2f}{difference:+12.2f}")
        if not abs(difference) <= TOLERANCE:  # true for nan, too
            off.append(name)
    return "\n".join(lines), off


def train(args: argparse.Namespace, cfg: CfgNode, mark: Mark | None = None) -> Any:
    """Trains in one process of the job; returns the results of the last evaluation in the main process."""
    from detectron2.utils import comm

    from dcn_d2.engine import DCNTrainer, log_traceback, one_line, setup
    from dcn_d2.engine.folder import unlock_folder
    from dcn_d2.engine.restart import MarkHook
    from dcn_d2.report import try_report

    cfg = setup(args, cfg)
    try:
        trainer = DCNTrainer(cfg)
        trainer.resume_or_load(resume=args.resume, overwrite=args.overwrite)
        trainer.register_hooks([MarkHook(mark)] if mark else [])
        try:
            results = trainer.train()
        except Exception as error:
            log_traceback(error)
            fail(one_line(error))
        if comm.is_main_process() and cfg.TEST.REPORT:
            try_report(cfg.OUTPUT_DIR)
        return results
    finally:
        unlock_folder(cfg.OUTPUT_DIR)


def load_model(args: argparse.Namespace, cfg: CfgNode) -> Any:
    """Builds the model of a config, and loads the weights that are evaluated."""
    from dcn_d2.checkpoint import DCNCheckpointer
    from dcn_d2.engine import DCNTrainer
    from dcn_d2.engine.class_names import class_names_of

    model = DCNTrainer.build_model(cfg)
    checkpointer = DCNCheckpointer(model, save_dir=cfg.OUTPUT_DIR, class_names=class_names_of(cfg))
    checkpointer.load_trained(cfg.MODEL.WEIGHTS, resume=args.resume)
    return model


def evaluate(args: argparse.Namespace, cfg: CfgNode) -> Any:
    """Evaluates in one process of the job; returns the results in the main process."""
    from detectron2.evaluation import verify_results
    from detectron2.utils import comm

    from dcn_d2.engine import DCNTrainer, setup
    from dcn_d2.report import record_evaluation

    cfg = setup(args, cfg)
    model = args.exported if args.model else load_model(args, cfg)
    results = DCNTrainer.test(cfg, model)
    record_evaluation(cfg, results)
    if comm.is_main_process():
        verify_results(cfg, results)
    if args.published and comm.is_main_process():
        table, off = compare_with_published(cfg.PUBLISHED, results)
        logging.getLogger("dcn_d2").info(f"{cfg.PUBLISHED.WEIGHTS}:\n{table}")
        if off:
            fail(f"more than {TOLERANCE} away from the published value: {', '.join(off)}")
    return results


def main(args: argparse.Namespace, cfg: CfgNode, mark: Mark | None = None) -> Any:
    """Runs one process of the job.

    Args:
        args: the command line.
        cfg: what `read_job` has read.
        mark: of a job that may be started again; it is set when training begins.

    Returns:
        The results of the last evaluation in the main process.
    """
    from dcn_d2.engine import MISTAKES, log_traceback, one_line

    try:
        return evaluate(args, cfg) if args.eval_only else train(args, cfg, mark)
    except MISTAKES as error:
        log_traceback(error)
        fail(one_line(error))


def fail(message: str) -> NoReturn:
    """Ends this process with one line on stderr and exit code 1."""
    sys.exit(f"train_net.py: {message}")


def start(args: argparse.Namespace, argv: list[str], mark: Mark | None) -> None:
    """Runs the job in this process and in those that it starts, or that have been started with it; or submits it."""
    from torch import distributed as dist

    from dcn_d2.engine import MISTAKES, find_place, launch, one_line
    from dcn_d2.engine.restart import find_mark, go_on_after_restart
    from dcn_d2.engine.slurm import check_slurm, submit
    from dcn_d2.engine.torchrun import check_agrees, run_in_group

    def read() -> CfgNode:
        try:
            return read_job(args)
        except MISTAKES as error:
            fail(one_line(error))

    if args.slurm:
        cfg = read_job(args)
        check_slurm(cfg, args.slurm)
        print(submit(__file__, without_slurm(argv), cfg, args.slurm))
        return
    place = find_place(num_machines=args.num_machines, connected=dist.is_initialized())
    mark = mark or find_mark()
    go_on_after_restart(args, mark)
    if place is None:
        job = (args, read_job(args), mark)
        launch(main, args.num_gpus, args.num_machines, args.machine_rank, dist_url=args.dist_url, args=job)
    else:
        check_agrees(given_places(argv, build_parser()), place)
        run_in_group(place, read, lambda cfg: main(args, cfg, mark))


def run(argv: list[str] | None = None, mark: Mark | None = None) -> None:
    """Runs the command line, in as many processes as it asks for.

    Args:
        argv: the arguments; by default those of this process.
        mark: of a job that may be started again, to go on then; torchrun's are found without it.
    """
    argv = sys.argv[1:] if argv is None else argv
    with said_once():
        args = parse_arguments(argv)
    try:
        from dcn_d2.engine import MISTAKES, ProcessFailedError, one_line
        from dcn_d2.engine.torchrun import end

        try:
            if args.check_data:
                sys.exit(check_data(args))
            start(args, argv, mark)
        except (*MISTAKES, ProcessFailedError) as error:
            message = str(error) if isinstance(error, ProcessFailedError) else one_line(error)
            end(f"train_net.py: {message}", tells=speaks())  # other launchers' processes say it once
    except KeyboardInterrupt:
        print("train_net.py: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    run()
