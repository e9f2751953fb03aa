# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Stands in for the package panopticapi, which is not on PyPI: its two functions that Detectron2 calls.

They compute panoptic quality by its definition, so that a test notices wrong files, categories and segments.
"""
