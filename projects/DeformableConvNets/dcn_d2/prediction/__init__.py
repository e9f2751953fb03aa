# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Prediction for many images: what predict.py is made of, and what demo.py shares with it.

Modules here import PyTorch and Detectron2 in functions where a script needs them before it has read its arguments.
"""
