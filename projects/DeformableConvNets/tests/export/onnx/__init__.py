# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
