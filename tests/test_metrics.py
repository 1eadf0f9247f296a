"""util/metrics.py beside cases by hand, counting and loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import randn
from util import metrics


def test_accuracy_iou_and_table_of_a_case_by_hand(capsys):
    matrix = metrics.confusion([0, 0, 0, 1, 1, 3], [0, 0, 1, 1, 0, 3], 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    expected = {"accuracy": 100 * 4 / 6, "mean_accuracy": 100 * (2 / 3 + 1 / 2 + 1) / 3}
    assert metrics.accuracy(matrix) == pytest.approx(expected)  # no third class
    assert metrics.iou(matrix).tolist() == pytest.approx([50, 100 / 3, np.nan, 100], nan_ok=True)
    metrics.print_table(matrix, ["cat", "dog", "cow", "hen"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "cat 3 66.7 50.0 dog 2 50.0" in shown and "cow" not in shown


@pytest.mark.parametrize("seed", range(20))
def test_iou_and_giou_are_shares_of_unit_cubes(seed):
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 5, (2, 3))
    high = low + rng.integers(1, 5, (2, 3))
    cubes = np.indices((9, 9, 9)).reshape(3, -1).T[:, None]  # (cubes, 1, 3)
    inside = ((cubes >= low) & (cubes < high)).all(axis=2)  # (cubes, boxes)
    hull = np.prod(high.max(axis=0) - low.min(axis=0))
    iou = inside.all(axis=1).sum() / inside.any(axis=1).sum()
    giou = iou - (hull - inside.any(axis=1).sum()) / hull
    boxes = torch.from_numpy(np.hstack([(low + high) / 2, high - low]))
    assert metrics.box_iou(boxes, boxes)[0].tolist() == pytest.approx([1, iou])
    assert metrics.generalized_box_iou(boxes, boxes)[0].tolist() == pytest.approx([1, giou])
    flat = (boxes * torch.tensor([1, 1, 1, 1, 1, 0])).requires_grad_()
    metrics.generalized_box_iou(flat, flat).square().sum().backward()
    assert flat.grad.isfinite().all()


def test_average_precision_of_a_case_by_hand():
    """By score: right, the same box again, right, right, too far; the fourth box is not found."""
    boxes = torch.tensor([[0, 0, 0, 1, 1, 1], [2.0, 0, 0, 1, 1, 1]])
    far = boxes + torch.tensor([[0.5], [0.7]]) * torch.eye(6)[0]  # IoU 1 / 3 and 0.18
    first = (boxes[[1, 0, 0]], torch.tensor([[0.3, 0], [0.9, 0], [0.8, 0]]))
    second = (far, torch.tensor([[0.7, 0], [0.1, 1]]))
    truths = [(boxes, torch.zeros(2)), (boxes, torch.zeros(2)), (boxes[:0], torch.zeros(0))]
    none = (boxes[:0], torch.zeros(0, 2))
    ap, recall = metrics.average_precision([first, second, none], truths, 2, 0.25)
    assert [ap[0], recall[0]] == pytest.approx([(1 + 3 / 4 + 3 / 4) / 4, 3 / 4])
    assert ap[1].isnan() and recall[1].isnan()  # no true box


def test_the_svm_is_at_a_minimum_for_features_of_any_scale():
    labels = torch.arange(160) % 7 // 2  # the last class is rarer
    features = randn(160, 6, seed=1) + F.one_hot(labels, 6)
    x = (features - features[:100].mean(0)) / features[:100].std(0)
    x = F.pad(x, (0, 1), value=1.0).double()
    w = metrics.linear_svm(x, labels, C=0.5)
    y = 2.0 * F.one_hot(labels) - 1
    gradient = w - x.T @ (y * (1 - y * (x @ w)).clamp_min(0))  # 2 C = 1
    assert gradient.abs().max() < 1e-3
    moved = features * torch.logspace(0, 3, 6) + 7
    percent, C = metrics.svm_accuracy(moved[:100], labels[:100], moved[100:], labels[100:])
    w = metrics.linear_svm(x[:100], labels[:100], C)
    right = (x[100:] @ w).argmax(dim=1) == labels[100:]
    assert percent == pytest.approx(100 * right.double().mean())
    assert C == 0.1  # the best on the held out


def test_five_neighbours_vote_and_of_even_votes_the_nearer_win():
    angle = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.5, 0.6, 0.7])
    train = angle[:, None].exp() * torch.stack([angle.cos(), angle.sin()], dim=1)
    labels = torch.tensor([0, 0, 1, 1, 2, 0, 0])
    for angle, winner in ((0.0, 1), (0.8, 0)):
        query = torch.tensor([[np.cos(angle), np.sin(angle)]])
        assert metrics.knn_accuracy(train, labels, query, torch.tensor([winner])) == 100
