"""util/metrics.py beside cases by hand, counting and loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import randn, seeded
from util import metrics


def test_accuracy_iou_and_table_of_a_case_by_hand(capsys):
    matrix = metrics.confusion([0, 0, 0, 1, 1, 3], [0, 0, 1, 1, 0, 3], 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    expected = {"accuracy": 100 * 4 / 6, "mean_accuracy": 100 * (2 / 3 + 1 / 2 + 1) / 3}
    assert metrics.accuracy(matrix) == pytest.approx(expected)  # The third class does not occur.
    assert metrics.iou(matrix).tolist() == pytest.approx([50, 100 / 3, np.nan, 100], nan_ok=True)
    metrics.print_table(matrix, ["cat", "dog", "cow", "hen"])
    assert "cat 3 66.7 50.0 dog 1 dog 2 50.0" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("seed", range(20))
def test_iou_and_giou_are_shares_of_unit_cubes_and_flat_boxes_have_gradients(seed):
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


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_that_of_loops(seed):
    """The mean over recalls 1/6, 2/6 ... of the best precision at that recall or a higher one."""
    boxes = torch.rand(4, 6, 6, generator=seeded(seed)) + 0.5
    scores = torch.rand(4, 6, 2, generator=seeded(seed + 5))
    true = torch.rand(6, 6, generator=seeded(seed + 10)).add(0.5).split([0, 1, 2, 3])
    truths = [(true[room], torch.zeros(room)) for room in range(4)]
    taken = set()
    precisions = []
    for number, k in enumerate(scores[..., 0].flatten().argsort(descending=True), start=1):
        room, i = divmod(k.item(), 6)
        overlaps = metrics.box_iou(boxes[room, [i]], true[room])[0].tolist() + [-1]
        best = (room, int(np.argmax(overlaps)))
        if max(overlaps) > 0.25 and best not in taken:
            taken.add(best)
            precisions.append(len(taken) / number)
    best = [max(precisions[i:]) for i in range(len(precisions))]
    detections = list(zip(boxes, scores, strict=True))
    ap, recall = metrics.average_precision(detections, truths, 2, threshold=0.25)
    assert [ap[0], recall[0]] == pytest.approx([sum(best) / 6, len(taken) / 6])
    assert ap[1].isnan() and recall[1].isnan()  # No true box is of class 1.


def test_the_svm_is_at_a_minimum_and_chooses_c_on_every_fifth_feature_in_order_of_class():
    labels = torch.arange(160) % 7 // 2  # the last class is rarer
    features = randn(160, 6, seed=1) + F.one_hot(labels, 6)
    x = (features - features[:100].mean(0)) / features[:100].std(0)
    x = F.pad(x, (0, 1), value=1.0).double()
    w = metrics.linear_svm(x, labels, C=0.5)
    y = 2.0 * F.one_hot(labels) - 1
    gradient = w - x.T @ (y * (1 - y * (x @ w)).clamp_min(0))  # 2 C = 1
    assert gradient.abs().max() < 1e-3

    def percent(fitted, tested, C):
        w = metrics.linear_svm(x[fitted], labels[fitted], C)
        return 100 * ((x[tested] @ w).argmax(dim=1) == labels[tested]).double().mean().item()

    order = labels[:100].argsort(stable=True)
    fitted = order[torch.arange(100) % 5 != 0]
    best = max((0.001, 0.01, 0.1, 1.0), key=lambda C: percent(fitted, order[::5], C))
    moved = features * torch.logspace(0, 3, 6) + 7
    result = metrics.svm_accuracy(moved[:100], labels[:100], moved[100:], labels[100:])
    assert result == pytest.approx([percent(slice(100), slice(100, None), best), best])


def test_nearest_neighbours_vote_and_of_even_votes_the_nearer_ones_win():
    train = randn(40, 3)
    labels = torch.arange(40) % 4
    queries = randn(60, 3, seed=1)
    winners = []
    for query in queries:
        cosine = F.cosine_similarity(train, query[None])
        nearest = cosine.argsort(descending=True)[:5]
        votes = [cosine[nearest[labels[nearest] == label]].tolist() for label in range(4)]
        winners.append(max(range(4), key=lambda label: (len(votes[label]), sum(votes[label]))))
    assert metrics.knn_accuracy(train, labels, queries, torch.tensor(winners)) == 100
