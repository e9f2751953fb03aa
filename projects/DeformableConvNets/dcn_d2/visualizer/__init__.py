# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Shows where deformable convolutions look: records a model's offsets and draws the sampled locations on the image.

    with record_sampling(predictor.model) as record:
        outputs = predictor(image_bgr)
    draw = SamplingAnnotator(depth=3)
    picture = draw(image_rgb, record, point=(80.0, 120.0), layer="res4")

Positions come from `dcn_d2.ops.sampling`, which the reference operator uses too.
"""

from .draw import SamplingAnnotator
from .record import LayerSamples, SamplingRecord, TracedLayer, record_sampling, trace_samples

__all__ = [
    "LayerSamples",
    "SamplingAnnotator",
    "SamplingRecord",
    "TracedLayer",
    "record_sampling",
    "trace_samples",
]
