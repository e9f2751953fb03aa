# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Where the drawn dots are, against positions worked out by hand, and what an annotator gives back."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dcn_d2.layers import DeformConv, DeformConvPack, ModulatedDeformConv, ModulatedDeformConvPack
from dcn_d2.visualizer import SamplingAnnotator, SamplingRecord, record_sampling, trace_samples

GRID = {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}


class Stages(nn.Module):
    """Stride 2, then two deformable layers, the last with stride 2: maps of 1/2 and 1/4 of the image's size."""

    def __init__(self, shift: tuple[float, float] = (0, 0), strength: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.first = ModulatedDeformConv(4, 4, 3, padding=1)
        self.second = DeformConv(4, 4, 3, stride=2, padding=1)
        self.shift, self.strength = shift, strength

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        n, _, h, w = x.shape
        offset = torch.tensor(self.shift, dtype=torch.float32).repeat(9).reshape(1, 18, 1, 1)
        mask = torch.full((n, 9, h, w), self.strength)
        mask[:, 4] = 1  # the middle tap
        x = self.first(x, torch.zeros(n, 18, h, w), mask)
        return self.second(x, offset=offset.expand(n, 18, -(-h // 2), -(-w // 2)))


def record_of(model: nn.Module, size: tuple[int, int] = (48, 64)) -> SamplingRecord:
    with record_sampling(model) as record:
        model(torch.zeros(1, 3, *size))
    return record


def positions(layer) -> set[tuple[float, float]]:  # noqa: ANN001
    return {(float(y), float(x)) for y, x in layer.positions}


def test_zero_offsets_give_the_regular_grid_in_image_pixels() -> None:
    record = record_of(Stages())
    assert [layer.name for layer in record.layers] == ["first", "second"]
    (last,) = trace_samples(record, (20, 24), depth=1)
    # Cell (5, 6) of the stride-4 map is cell (10, 12) of its stride-2 input, that is pixel (20, 24).
    assert last.name == "second"
    assert positions(last) == {(20 + 2 * y, 24 + 2 * x) for y, x in GRID}
    assert last.weights.tolist() == [1] * 9


def test_the_nearest_cell_is_taken() -> None:
    record = record_of(Stages())
    (nearest,) = trace_samples(record, (21.9, 22.1), depth=1)
    assert positions(nearest) == {(20 + 2 * y, 24 + 2 * x) for y, x in GRID}


def test_every_sample_is_followed_into_the_layer_before() -> None:
    second, first = trace_samples(record_of(Stages(strength=0.5)), (20, 24), depth=3)
    assert (second.name, first.name) == ("second", "first")
    assert len(first.positions) == 81
    assert positions(first) == {(20 + 2 * y, 24 + 2 * x) for y in range(-2, 3) for x in range(-2, 3)}
    # In the layer before, the middle tap has modulation 1 and the others 0.5.
    assert sorted(set(first.weights.tolist())) == [0.5, 1]
    assert (first.weights == 1).sum() == 9


def test_offsets_move_the_samples_in_pixels_of_the_input_map() -> None:
    record = record_of(Stages(shift=(1.5, -0.25)))
    (last,) = trace_samples(record, (20, 24), depth=1)
    assert positions(last) == {(20 + 2 * (y + 1.5), 24 + 2 * (x - 0.25)) for y, x in GRID}


def test_samples_that_read_zero_are_left_out() -> None:
    # At the image's corner the row and column at -1 are outside, and nothing is followed there.
    second, first = trace_samples(record_of(Stages()), (0, 0))
    assert positions(second) == {(2 * y, 2 * x) for y in (0, 1) for x in (0, 1)}
    assert first.positions.min() == 0
    far = record_of(Stages(shift=(1000, 0)))
    assert [len(layer.positions) for layer in trace_samples(far, (20, 24))] == [0, 0]


def test_points_outside_take_the_border_cell() -> None:
    record = record_of(Stages())
    inside, outside = (trace_samples(record, point, depth=1)[0] for point in ((44, 60), (400, 600)))
    assert positions(inside) == positions(outside)


@pytest.mark.parametrize(("pack", "weight"), [(DeformConvPack, 1.0), (ModulatedDeformConvPack, 0.5)])
def test_layers_with_their_own_offset_branch(pack: type[nn.Module], weight: float) -> None:
    record = record_of(nn.Sequential(pack(3, 4, 3, padding=1)))
    (layer,) = trace_samples(record, (10, 20))
    assert positions(layer) == {(10 + y, 20 + x) for y, x in GRID}
    assert layer.weights.tolist() == [weight] * 9


def test_deform_groups_are_told_apart() -> None:
    layer = DeformConv(4, 4, 3, padding=1, deformable_groups=2)
    offset = torch.zeros(1, 36, 16, 16)
    offset[:, 18::2] = 2.0  # y of the second group
    with record_sampling(layer) as record:
        layer(torch.zeros(1, 4, 16, 16), offset)
    first, second = (trace_samples(record, (8, 8), group=group)[0] for group in (0, 1))
    assert (second.positions - first.positions == [2, 0]).all()


def test_a_new_pass_replaces_the_record_and_the_hooks_go_away() -> None:
    model = Stages()
    with record_sampling(model) as record:
        model(torch.zeros(1, 3, 48, 64))
        model(torch.zeros(1, 3, 32, 32))
        assert len(record.layers) == 2
        assert record.image_size == record.padded_size == (32, 32)
    model(torch.zeros(1, 3, 48, 64))
    assert record.image_size == (32, 32)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert sum(hooks) == 0


def test_layers_are_found_by_whole_parts_of_their_names() -> None:
    record = record_of(Stages())
    assert (record.find(), record.find("first")) == (1, 0)
    with pytest.raises(KeyError, match="matches 'fir'; recorded: first, second"):
        record.find("fir")
    with pytest.raises(KeyError, match="recorded: none"):
        SamplingRecord().find()


@pytest.mark.parametrize("size", [(48, 64), (96, 128), (150, 200)])
def test_annotator_keeps_kind_and_size_and_leaves_its_input_alone(size: tuple[int, int]) -> None:
    record, draw = record_of(Stages()), SamplingAnnotator()
    image = np.full((*size, 3), 90, np.uint8)
    picture = draw(image, record, (20, 24), layer="second")
    assert (picture.shape, picture.dtype) == (image.shape, image.dtype)
    assert (image == 90).all()
    assert (picture != image).any()
    for mode in ("RGB", "L"):
        pil = Image.fromarray(image).convert(mode)
        drawn = draw(pil, record, (20, 24))
        assert isinstance(drawn, Image.Image)
        assert (drawn.size, drawn.mode) == (pil.size, mode)
    assert (np.asarray(draw(Image.fromarray(image), record, (20, 24), "second")) == picture).all()


def test_dots_are_where_the_samples_are_at_any_resolution() -> None:
    record = record_of(Stages(shift=(4.0, 3.0)))
    color = (10, 200, 30)
    for scale in (1, 4):
        draw = SamplingAnnotator(depth=1, colors=[color], radius=2.0 * scale, label=False)
        image = np.full((48 * scale, 64 * scale, 3), 128, np.uint8)
        # Pixel p of the small image is centred at (p + 0.5) * scale - 0.5 of the large one.
        picture = draw(image, record, ((20.5 * scale) - 0.5, (24.5 * scale) - 0.5))
        rows, columns = np.nonzero((picture == color).all(-1))
        assert rows.mean() == pytest.approx((20 + 2 * 4 + 0.5) * scale - 0.5, abs=0.5)
        assert columns.mean() == pytest.approx((24 + 2 * 3 + 0.5) * scale - 0.5, abs=0.5)


def test_a_window_shows_a_part_of_the_image() -> None:
    record, draw = record_of(Stages(shift=(0.5, 2.0))), SamplingAnnotator(radius=4.0, label=False)
    image = np.full((48 * 8, 64 * 8, 3), 90, np.uint8)
    whole = draw(image, record, (170, 210))
    part = draw(image[80:320, 120:440], record, (170 - 80, 210 - 120), window=(10, 15, 40, 55))
    assert (part == whole[80:320, 120:440]).all()
    assert (part != 90).any()


@pytest.mark.parametrize(("row", "corner"), [(40, slice(140, None)), (150, slice(None, 50))])
def test_the_label_is_away_from_the_point(row: int, corner: slice) -> None:
    image = np.full((192, 256, 3), 90, np.uint8)
    record = record_of(Stages())
    plain, labelled = (SamplingAnnotator(label=label)(image, record, (row, 128)) for label in (False, True))
    changed = (plain != labelled).any(-1)
    assert changed.sum() == changed[corner, :128].sum() > 500


def test_weak_samples_are_fainter() -> None:
    draw = SamplingAnnotator(depth=2, colors=[(0, 0, 0), (255, 255, 255)], radius=1.0, label=False)
    image = np.zeros((48, 64, 3), np.uint8)
    strong, weak = (draw(image, record_of(Stages(strength=s)), (20, 24)).astype(int).sum() for s in (1.0, 0.1))
    assert weak < 0.8 * strong


def test_annotations_compose() -> None:
    record, draw = record_of(Stages()), SamplingAnnotator(label=False)
    image = np.full((192, 256, 3), 90, np.uint8)
    left, right = draw(image, record, (96, 48)), draw(image, record, (96, 208))
    both = draw(left, record, (96, 208))
    assert (both[:, :128] == left[:, :128]).all()
    assert (both[:, 128:] == right[:, 128:]).all()


@pytest.mark.parametrize("image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_images_of_other_kinds_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="image must be"):
        SamplingAnnotator()(image, record_of(Stages()), (4, 4))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="got 0"):
        SamplingAnnotator(depth=0)
    for radius in (-3, float("nan"), float("inf")):  # these were errors of OpenCV
        with pytest.raises(ValueError, match="radius must be finite and not negative"):
            SamplingAnnotator(radius=radius)


@pytest.mark.parametrize("window", [(0, 0, 0, 0), (8, 8, 4, 4), (0, 0, float("nan"), 8)])
def test_a_window_without_an_area_was_drawn_as_noise(window: tuple[float, float, float, float]) -> None:
    model = Stages()
    with record_sampling(model) as record:
        model(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="window must be .* with an area"):
        SamplingAnnotator()(np.zeros((16, 16, 3), np.uint8), record, (4, 4), window=window)


def test_two_threads_in_one_model_record_their_own_calls_only() -> None:
    model = Stages()
    both_inside = threading.Barrier(2, timeout=20)
    model.stem.register_forward_hook(
        lambda *_: (both_inside.wait(), None)[1]
    )  # each passes when the other one is there

    def run(size: int) -> list[tuple[int, ...]]:
        seen = []
        for _ in range(20):
            with record_sampling(model) as record:
                model(torch.zeros(1, 3, size, size))
            seen.append((*record.image_size, *(layer.input_size[0] for layer in record.layers)))
        return seen

    with ThreadPoolExecutor(2) as pool:
        small, large = pool.map(run, (32, 64))
    assert small == [(32, 32, 16, 16)] * 20
    assert large == [(64, 64, 32, 32)] * 20
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in (model, model.first, model.second))


def test_hooks_of_a_thread_that_leaves_do_not_disturb_another_ones_pass() -> None:
    model = Stages()
    stack = ExitStack()
    other = threading.Thread(target=lambda: stack.enter_context(record_sampling(model)))
    other.start()
    other.join()
    # The other thread's block ends while `first`'s hooks are being called: PyTorch has a list of them already.
    model.first.register_forward_hook(lambda *_: stack.close(), prepend=True)
    record = record_of(model)
    assert [layer.name for layer in record.layers] == ["first", "second"]


def test_nested_blocks_each_have_their_own_record() -> None:
    model = Stages()
    with record_sampling(model) as outer:
        model(torch.zeros(1, 3, 32, 32))
        with record_sampling(model) as inner:
            model(torch.zeros(1, 3, 48, 64))
        assert outer.image_size == inner.image_size == (48, 64)
        model(torch.zeros(1, 3, 64, 64))
    assert (outer.image_size, inner.image_size) == ((64, 64), (48, 64))
    assert len(outer.layers) == len(inner.layers) == 2


def test_a_model_called_with_keywords_is_recorded() -> None:
    model = Stages()
    with record_sampling(model) as record:
        model(image=torch.zeros(1, 3, 48, 64))
    assert record.image_size == (48, 64)


def test_any_image_of_a_batch_is_drawn_by_its_own_size() -> None:
    class Padded(Stages):
        def forward(self, samples: list[dict[str, Tensor]]) -> Tensor:
            return super().forward(torch.zeros(len(samples), 3, 64, 64))

    with record_sampling(model := Padded(shift=(1.5, -0.25))) as record:
        model([{"image": torch.zeros(3, 64, 64)}, {"image": torch.zeros(3, 48, 64)}])
    record.padded_size = (64, 64)  # Detectron2's models pad before their backbone, this one has none
    assert record.image_sizes == [(64, 64), (48, 64)]
    draw, image = SamplingAnnotator(label=False, radius=2.0), np.full((48, 64, 3), 90, np.uint8)
    second = draw(image, record, (20, 24), index=1)
    alone = draw(image, record_of(Stages(shift=(1.5, -0.25))), (20, 24))
    assert np.array_equal(second, alone)
    assert not np.array_equal(draw(image, record, (20, 24)), alone), "it is not as high as the first image"
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"index is {index}, but the record is of 2 images"):
            draw(image, record, (20, 24), index=index)


def test_what_is_not_in_the_record_is_refused() -> None:
    record = record_of(Stages())
    with pytest.raises(IndexError, match="group must be from 0 to 0, got 1"):
        trace_samples(record, (4, 4), group=1)
    with pytest.raises(IndexError, match="index must be from 0 to 0, got -1"):
        trace_samples(record, (4, 4), index=-1)
    with pytest.raises(ValueError, match="point must be .* finite, got"):
        trace_samples(record, (float("nan"), 4))
    with record_sampling(model := Stages()) as part:
        model.first(torch.zeros(1, 4, 8, 8), torch.zeros(1, 18, 8, 8), torch.zeros(1, 9, 8, 8))
    with pytest.raises(ValueError, match="the record knows no image"):
        trace_samples(part, (4, 4))


def test_images_with_more_than_8_bits_are_refused() -> None:
    image = Image.fromarray(np.zeros((48, 64), np.uint16))
    with pytest.raises(ValueError, match="8 bits a channel, got one of the mode I;16"):
        SamplingAnnotator()(image, record_of(Stages()), (4, 4))
    with pytest.raises(TypeError, match="numpy array or a PIL image, got Tensor"):
        SamplingAnnotator()(torch.zeros(48, 64, 3), record_of(Stages()), (4, 4))
