# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Prediction inside of engines for large data: Ray Data, Spark, or anything that calls a function with batches of rows.

Importing it imports none of them, and neither pandas nor pyarrow.
"""

from .actor import DetectorActor

__all__ = ["DetectorActor"]
