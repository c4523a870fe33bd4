"""Losses and metrics of the built-in tasks: torch's losses, and torchmetrics' figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedtan_hpc.runtime.torchvision_import import import_torchvision
from fedtan_hpc.tasks.builtin import Classification, Multilabel, Regression, Segmentation
from fedtan_hpc.tasks.task import Task

N, C, IGNORED = 40, 4, 255


def drawn(kind: str, ignored: bool = False) -> tuple[Tensor, Tensor]:
    """Scores and targets; a tenth of them are ignored if asked for."""
    torch.manual_seed(3)
    if kind == "classification":
        return torch.randn(N, C).double(), torch.randint(C, (N,))
    if kind == "regression":
        return torch.randn(N, 2).double(), 100 + torch.randn(N, 2).double()
    if kind == "multilabel":
        output, targets = torch.randn(N, C).double(), torch.randint(2, (N, C)).double()
    else:
        output, targets = torch.randn(N, C, 5, 6).double(), torch.randint(C, (N, 5, 6))
    if ignored:
        targets[torch.rand(targets.shape) < 0.1] = IGNORED
    return output, targets


def figures(task: Task, output: Tensor, targets: Tensor) -> dict[str, Any]:
    """Metrics from sums that are added in unequal parts, as ranks do."""
    parts = [slice(0, 7), slice(7, 30), slice(30, None)]
    sums = [task.sums(output[part], targets[part]).double().sum(0) for part in parts]
    return dict(task.metrics(torch.stack(sums).sum(0), len(targets)))


def test_losses_without_options_are_torchs() -> None:
    close = torch.testing.assert_close
    output, targets = drawn("classification")
    close(Classification().losses(output, targets).mean(), F.cross_entropy(output, targets))
    output, targets = drawn("segmentation")
    close(Segmentation().losses(output, targets).mean(), F.cross_entropy(output, targets))
    output, targets = drawn("multilabel")
    expected = F.binary_cross_entropy_with_logits(output, targets)
    close(Multilabel().losses(output, targets).mean(), expected)
    output, targets = drawn("regression")
    close(Regression().losses(output, targets).mean(), F.mse_loss(output, targets))
    close(
        Regression().losses(output[:, :1], targets[:, 0]).mean(),
        F.mse_loss(output[:, 0], targets[:, 0]),
    )


def test_options_change_the_loss_of_each_sample_as_torch_does() -> None:
    weights, smoothing = [1.0, 2.0, 0.0, 3.0], 0.1
    w_C = torch.tensor(weights).double()
    output, targets = drawn("classification")
    expected = F.cross_entropy(output, targets, w_C, reduction="none", label_smoothing=smoothing)
    losses = Classification(weights, smoothing).losses(output, targets)
    torch.testing.assert_close(losses, expected)
    output, targets = drawn("segmentation", ignored=True)
    targets[0] = IGNORED
    options: dict[str, Any] = {"weight": w_C, "label_smoothing": smoothing, "reduction": "none"}
    pixels = F.cross_entropy(output, targets, ignore_index=IGNORED, **options)
    count = (targets != IGNORED).flatten(1).sum(1)
    losses = Segmentation(weights, smoothing, IGNORED).losses(output, targets)
    assert losses[0] == 0
    torch.testing.assert_close(losses, pixels.flatten(1).sum(1) / count.clamp_min(1))
    output, targets = drawn("multilabel", ignored=True)
    kept = targets != IGNORED
    for n, loss in enumerate(Multilabel(weights, smoothing, IGNORED).losses(output, targets)):
        soft = targets[n, kept[n]] * (1 - smoothing) + smoothing / 2
        expected = F.binary_cross_entropy_with_logits(
            output[n, kept[n]], soft, pos_weight=w_C[kept[n]]
        )
        torch.testing.assert_close(loss, expected)


def test_no_gradient_comes_from_what_is_ignored() -> None:
    for task, kind in ((Segmentation, "segmentation"), (Multilabel, "multilabel")):
        output, targets = drawn(kind, ignored=True)
        output.requires_grad_()
        task(ignore_index=IGNORED).losses(output, targets).sum().backward()
        assert output.grad is not None
        ignored = targets == IGNORED
        if kind == "segmentation":
            ignored = ignored.unsqueeze(1).expand_as(output)
        assert not output.grad[ignored].any()
        assert output.grad[~ignored].all()


@pytest.mark.slow  # torchmetrics takes seconds to load
@pytest.mark.parametrize("ignored", [False, True])
def test_metrics_are_those_of_torchmetrics(ignored: bool) -> None:
    import_torchvision()
    tm = pytest.importorskip("torchmetrics")
    more: dict[str, Any] = {"ignore_index": IGNORED} if ignored else {}

    def computed(metric: Any, output: Tensor, targets: Tensor) -> Any:
        metric.update(output, targets.long())
        return metric.compute()

    close = torch.testing.assert_close
    output, targets = drawn("segmentation", ignored)
    found = figures(Segmentation(None, 0.0, more.get("ignore_index")), output, targets)
    multiclass = tm.classification
    jaccard = computed(multiclass.MulticlassJaccardIndex(C, None, **more), output, targets)
    close(found["iou_by_class"], jaccard.double(), check_dtype=False)
    close(found["iou"], jaccard.double().mean())
    dice = computed(multiclass.MulticlassF1Score(C, average="macro", **more), output, targets)
    close(found["dice"], dice, check_dtype=False, atol=1e-6, rtol=1e-6)
    right = computed(multiclass.MulticlassAccuracy(C, average="micro", **more), output, targets)
    close(found["pixel_accuracy"], right, check_dtype=False, atol=1e-6, rtol=1e-6)
    output, targets = drawn("multilabel", ignored)
    found = figures(Multilabel(None, 0.0, more.get("ignore_index")), output, targets)
    for name, average in (("f1", "macro"), ("f1_micro", "micro"), ("f1_by_class", None)):
        metric = multiclass.MultilabelF1Score(C, average=average, **more)
        close(found[name], computed(metric, output, targets), check_dtype=False, atol=1e-6, rtol=0)
    if ignored:
        return
    output, targets = drawn("classification")
    found = figures(Classification(), output, targets)
    right = computed(multiclass.MulticlassAccuracy(C, average="micro"), output, targets)
    close(found["accuracy"], right, check_dtype=False, atol=1e-6, rtol=0)
    recall = computed(multiclass.MulticlassRecall(C, average=None), output, targets)
    close(found["recall_by_class"], recall, check_dtype=False, atol=1e-6, rtol=0)
    close(found["recall"], recall.mean(), check_dtype=False, atol=1e-6, rtol=0)
    output, targets = drawn("regression")
    found = figures(Regression(), output, targets)
    close(found["mae"], tm.functional.mean_absolute_error(output, targets))
    close(found["r2"], tm.functional.r2_score(output, targets))


def test_a_class_that_does_not_occur_is_left_out_of_the_means() -> None:
    output, targets = torch.eye(3).double()[[0, 1, 1]], torch.tensor([0, 1, 0])
    found = figures(Classification(), output, targets)
    assert (found["accuracy"], found["recall"]) == (pytest.approx(2 / 3), 0.75)
    assert found["recall_by_class"][2].isnan()
    maps = torch.tensor([[0, 0, 1, 1]])
    found = figures(Segmentation(), F.one_hot(maps, 3).movedim(-1, 1).double(), maps)
    assert (found["iou"], found["dice"]) == (1, 1)
    assert found["iou_by_class"][2].isnan()


def test_a_class_that_is_ignored_is_left_out_of_the_means() -> None:
    """Also where the network finds it, which no target can confirm."""
    maps, found = torch.tensor([[0, 0, 1, 2]]), torch.tensor([[0, 1, 0, 2]])
    scores = F.one_hot(found, 3).movedim(-1, 1).double()
    values = figures(Segmentation(ignore_index=0), scores, maps)
    assert values["iou_by_class"][1:].tolist() == [0, 1]
    assert values["iou_by_class"][0].isnan()
    assert (values["iou"], values["dice"], values["pixel_accuracy"]) == (0.5, 0.5, 0.5)
