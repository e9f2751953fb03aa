# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Steps over several batches and in mixed precision, and clipped gradients."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine.train_loop import SimpleTrainer
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.events import EventStorage
from torch import nn

from dcn_d2.engine import DCNTrainer, precision, scale_learning_rate
from dcn_d2.engine.steps import StepTrainer, build_steps

from .test_stopping import signals_that_are_not_ignored  # noqa: F401  a fixture
from .test_trainer import loggers_as_before, train  # noqa: F401  a fixture
from .tiny import tiny_config

# Without statistics of a batch, and so that every anchor and proposal takes part: the losses of a large batch are then
# the means of those of its parts.
ALL_TAKE_PART = [
    *("MODEL.RESNETS.NORM", "GN", "MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 32, "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 512, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 100_000),
]


class Squares(nn.Module):
    """One weight w, with the loss 'square' (w x - y)^2 and the loss 'linear' w x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch: list[tuple[float, float]]) -> dict[str, torch.Tensor]:
        x, y = torch.tensor(batch).T
        return {"square": ((self.weight * x - y) ** 2).mean(), "linear": (self.weight * x).mean()}


def step(steps: SimpleTrainer) -> dict[str, float]:
    with EventStorage() as storage:
        steps.run_step()
        return {name: value for name, (value, _) in storage.latest().items()}


def test_gradients_and_losses_are_the_means_of_the_batches() -> None:
    model = Squares()
    batches = [[(1.0, 0.0)], [(2.0, 0.0)], [(3.0, 0.0)], [(4.0, 0.0)]]
    steps = StepTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.01), batches=2)
    # By hand: the gradients are 2 x^2 w + x, 3 and 10 in the first step.
    logged = step(steps)
    assert model.weight.item() == pytest.approx(1 - 0.01 * 6.5)
    assert logged["square"] == pytest.approx(2.5) and logged["linear"] == pytest.approx(1.5)
    assert logged["total_loss"] == pytest.approx(4.0)
    w = model.weight.item()
    step(steps)
    assert model.weight.item() == pytest.approx(w - 0.01 * (25 * w + 3.5))


def test_accumulated_batches_of_a_detector_equal_a_large_one(tmp_path: Path) -> None:
    found = {}
    cfg = tiny_config(tmp_path, *ALL_TAKE_PART, "SOLVER.BASE_LR", 0.02)
    samples = list(islice((batch[0] for batch in DCNTrainer.build_train_loader(cfg)), 4))
    for size in (4, 2, 1):
        torch.manual_seed(0)
        model = DCNTrainer.build_model(cfg)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        batches = [samples[i : i + size] for i in range(0, 4, size)]
        steps = StepTrainer(model, batches, DCNTrainer.build_optimizer(cfg, model), batches=4 // size)
        logged = step(steps)
        moved = {name: value - before[name] for name, value in model.state_dict().items()}
        found[size] = (logged, moved)
    for size in (2, 1):
        for name in ("total_loss", "loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"):
            assert found[size][0][name] == pytest.approx(found[4][0][name], rel=1e-5), name
        for name, expected in found[4][1].items():
            error = (found[size][1][name] - expected).norm()
            # Sums in another order: 0.3 to 1.5 % below the deformable layers, and 1e-6 in the heads. A batch
            # that is left out, or counts twice, would change all by far more.
            assert error <= 0.05 * expected.norm() + 1e-8, name


def test_steps_are_counted_and_the_rate_is_that_of_all_images_of_a_step(tmp_path: Path) -> None:
    keys = ("SOLVER.ACCUMULATE_BATCHES", 3, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.CHECKPOINT_PERIOD", 2)
    rate = ("SOLVER.BASE_LR", 0.02, "SOLVER.REFERENCE_IMS_PER_BATCH", 12)
    cfg = tiny_config(tmp_path, *keys, *rate)
    scale_learning_rate(cfg)
    assert cfg.SOLVER.BASE_LR == pytest.approx(0.01) and cfg.SOLVER.REFERENCE_IMS_PER_BATCH == 6
    trainer = DCNTrainer(tiny_config(tmp_path, *keys, *rate))
    assert trainer.cfg.SOLVER.BASE_LR == pytest.approx(0.01)
    assert DCNTrainer(trainer.cfg).cfg.SOLVER.BASE_LR == pytest.approx(0.01), "never twice"
    taken = []
    loader = trainer.data_loader
    trainer.data_loader = (taken.append(len(batch)) or batch for batch in loader)
    trainer.train()
    assert taken == [2] * 12, "4 steps of 3 batches of 2 images"
    assert {path.name for path in tmp_path.glob("*.pth")} == {
        "model_0000001.pth",
        "model_0000003.pth",
        "model_final.pth",
    }
    assert json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])["iteration"] == 3


class Vanished(DCNTrainer):
    """Its third batch fails as an image does that vanished: the first of the second step."""

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        yield from islice(super().build_train_loader(cfg), 3)
        raise FileNotFoundError(2, "No such file or directory", "gone.png")


def test_error_of_data_in_the_middle_of_a_step_gets_no_traceback(tmp_path: Path) -> None:
    trainer = Vanished(tiny_config(tmp_path, "SOLVER.ACCUMULATE_BATCHES", 2))
    with pytest.raises(FileNotFoundError, match="gone.png"):
        trainer.train()
    assert "Traceback" not in (tmp_path / "log.txt").read_text()


def test_default_is_the_loop_of_detectron2(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    steps = build_steps(tiny_config(tmp_path), model, [], torch.optim.SGD(model.parameters(), 0.1))
    assert type(steps) is SimpleTrainer


def clipped(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
    return maybe_add_gradient_clipping(cfg, torch.optim.SGD(model.parameters(), lr=0.01))


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, limit, expected", [("norm", 5.0, 5.0), ("value", 6.0, 6.0), ("norm", 7.0, 6.5)])
def test_gradients_are_clipped_after_all_batches_and_without_the_scale(
    kind: str, limit: float, expected: float, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    cfg = tiny_config(tmp_path, "SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", kind)
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = limit
    model = Squares()
    batches = [[(1.0, 0.0)], [(2.0, 0.0)]]  # gradients of 3 and 10: clipped one by one, their mean would be less
    steps = StepTrainer(model, batches, clipped(cfg, model), batches=2, dtype=dtype)
    assert steps.grad_scaler.is_enabled() == (dtype == torch.float16)
    step(steps)
    assert model.weight.item() == pytest.approx(1 - 0.01 * expected, rel=1e-3)


def test_offset_branches_in_groups_of_their_own_are_clipped_too(tmp_path: Path) -> None:
    keys = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm")
    cfg = tiny_config(tmp_path, *keys, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5, "SOLVER.OFFSET_LR_FACTOR", 0.1)
    cfg.merge_from_list(["SOLVER.MOMENTUM", 0.0, "SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.BASE_LR", 0.1])
    model = DCNTrainer.build_model(cfg)
    optimizer = DCNTrainer.build_optimizer(cfg, model)
    assert len(optimizer.param_groups) > 1
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for value in model.parameters():
        value.grad = torch.full_like(value, 3.0)
    optimizer.step()
    for name, value in model.named_parameters():
        rate = 0.01 if "_offset." in name else 0.1
        assert (before[name] - value).norm().item() == pytest.approx(rate * 0.5, rel=1e-2), name


def test_scaler_survives_resuming_and_a_change_of_precision() -> None:
    model = Squares()

    def steps(dtype: torch.dtype | None) -> StepTrainer:
        batches = [[(1.0, 0.0)]] * 4
        return StepTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), dtype=dtype)

    half = steps(torch.float16)
    step(half)
    half.grad_scaler.update(1024.0)
    state = half.state_dict()
    again = steps(torch.float16)
    again.load_state_dict(state)
    assert again.grad_scaler.get_scale() == 1024.0
    steps(torch.bfloat16).load_state_dict(state)  # and without a scale
    again.load_state_dict(steps(None).state_dict())
    assert again.grad_scaler.get_scale() == 1024.0


def test_bfloat16_trains_on_cpu_with_weights_in_float32(tmp_path: Path) -> None:
    losses = {}
    for enabled in (False, True):
        folder = tmp_path / str(enabled)
        torch.manual_seed(0)
        keys = ("SOLVER.AMP.ENABLED", enabled, "SOLVER.AMP.DTYPE", "bfloat16", "SOLVER.MAX_ITER", 2)
        trainer = train(folder, *keys)
        kinds = set()
        trainer.model.backbone.fpn_lateral2.register_forward_hook(lambda m, i, output: kinds.add(output.dtype))
        losses[enabled] = step(trainer._trainer)["loss_rpn_cls"]
        assert kinds == {torch.bfloat16 if enabled else torch.float32}
        saved = torch.load(folder / "model_final.pth")
        assert all(value.dtype != torch.bfloat16 for value in saved["model"].values())
        assert "grad_scaler" not in saved["trainer"]["_trainer"]
    assert losses[True] == pytest.approx(losses[False], rel=0.05)
    train(tmp_path / "True", "SOLVER.MAX_ITER", 3, resume=True)  # goes on in float32


def test_processor_decides_whether_auto_trains_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (False, True):
        monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: has)
        assert bool(precision.why_not_on_cpu("auto")) != has
        assert precision.why_not_on_cpu("bfloat16") == ""
        assert "needs a GPU" in precision.why_not_on_cpu("float16")
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    assert "no instructions for bfloat16" in precision.why_not_on_cpu("auto")


@pytest.mark.parametrize(
    "device, dtype, expected",
    [
        ("cpu", "auto", torch.bfloat16),
        ("cuda", "auto", torch.float16),
        ("cuda:1", "auto", torch.float16),
        ("cuda", "bfloat16", torch.bfloat16),
    ],
)
def test_type_of_mixed_precision(device: str, dtype: str, expected: torch.dtype, tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, "MODEL.DEVICE", device, "SOLVER.AMP.DTYPE", dtype)
    assert precision.amp_dtype(cfg) is None
    cfg.SOLVER.AMP.ENABLED = True
    assert precision.amp_dtype(cfg) == expected
