# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Measures the speed, the memory and, in `benchmarks.parity`, the results of dcn_d2 against other implementations.

Five modules are programs: `deform_conv2d`, `deform_roi_pool`, `detector`, `profile_cuda` and `predict_memory`. Run one
from the project's folder with `python -m benchmarks.deform_conv2d`; `python benchmarks/deform_conv2d.py` works too.

    command_line   the options that all of them have
    measure        what a call costs: time and memory
    failures       who drops out of a row, and why
    results        the file of rows below results/
    origin         where and on what it was measured
    rows           how to read a row; imports no torch
    goal, goals_cpu, goals_cuda, goals     what a goal is, the goals of each device, and which of them a file meets
    layer, peers   the operands of one convolution, and other implementations of it
    on_cuda        what happens on a GPU only
    parity         a program of its own, which compares with MMDetection: `python -m benchmarks.parity --help`
"""
