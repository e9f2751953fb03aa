# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The former name of `python -m dcn_d2.checkpoint`, with the same arguments."""

from dcn_d2.checkpoint.__main__ import main

if __name__ == "__main__":
    main()
