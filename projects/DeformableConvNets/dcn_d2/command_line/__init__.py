# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The arguments of the scripts. Nothing here imports torch or Detectron2, so that --help answers at once."""
