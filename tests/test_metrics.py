"""util/metrics.py beside cases by hand, counting and loops."""

from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import randn, seeded
from util import metrics


def test_accuracy_iou_and_table_of_a_case_by_hand(capsys):
    matrix = metrics.confusion([0, 0, 0, 1, 1, 3], [0, 0, 1, 1, 0, 3], 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    found = list(metrics.accuracy(matrix).values())  # The third class does not occur.
    assert found == pytest.approx([100 * 4 / 6, 100 * (2 / 3 + 1 / 2 + 1) / 3])
    assert metrics.iou(matrix).tolist() == pytest.approx([50, 100 / 3, np.nan, 100], nan_ok=True)
    metrics.print_table(matrix, ["cat", "dog", "cow", "hen"])
    rows = capsys.readouterr().out.splitlines()
    assert rows[1].split() == "cat 3 66.7 50.0 dog 1".split() and rows[3].split()[2:] == ["-", "-"]


def test_the_confusion_is_drawn_with_names_and_counts_darker_for_larger_shares(tmp_path):
    names = ["<bag>", "cup", "no cloud"]
    path = tmp_path / "confusion.svg"
    metrics.write_confusion(path, torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]), names)
    nodes = list(ElementTree.parse(path).getroot())
    texts = [node.text for node in nodes if node.text]
    assert texts == ["<bag>", "<bag>", "3", "1", "cup", "cup", "4", "no cloud", "no cloud"]
    shares = [node.get("fill-opacity") for node in nodes if node.get("fill-opacity")]
    assert shares == ["0.75", "0.25", "1.00"]


@pytest.mark.parametrize("seed", range(20))
def test_iou_and_giou_are_shares_of_unit_cubes(seed):
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 5, (2, 3))
    high = low + rng.integers(1, 5, (2, 3))
    cubes = np.stack(np.meshgrid(*[np.arange(9)] * 3, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    inside = ((cubes >= low) & (cubes < high)).all(axis=2)  # (cubes, boxes)
    hull = np.prod(high.max(axis=0) - low.min(axis=0))
    iou = inside.all(axis=1).sum() / inside.any(axis=1).sum()
    giou = iou - (hull - inside.any(axis=1).sum()) / hull
    boxes = torch.from_numpy(np.hstack([(low + high) / 2, high - low]))
    assert metrics.box_iou(boxes, boxes)[0].tolist() == pytest.approx([1, iou])
    assert metrics.generalized_box_iou(boxes, boxes)[0].tolist() == pytest.approx([1, giou])


def test_giou_of_flat_boxes_is_finite_and_so_is_its_gradient():
    flat = torch.tensor([[0.0] * 6, [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1e-4]]).requires_grad_()
    giou = metrics.generalized_box_iou(flat, flat)
    giou.sum().backward()
    assert (giou.abs() <= 1 + 1e-6).all() and flat.grad.isfinite().all()


def slow_average_precision(detections, truths):
    """For rooms of 6 detections, 6 true boxes in all: the mean over recalls 1 / 6, 2 / 6 ... of
    the best precision at that recall or a higher one."""
    taken = set()
    precisions = []
    scores = torch.cat([scores for _, scores in detections])[:, 0]
    for number, k in enumerate(scores.argsort(descending=True).tolist(), start=1):
        room, i = divmod(k, 6)
        overlaps = metrics.box_iou(detections[room][0][[i]], truths[room][0])[0].tolist() + [-1]
        best = (room, int(np.argmax(overlaps)))
        if max(overlaps) > 0.25 and best not in taken:
            taken.add(best)
            precisions.append(len(taken) / number)
    total = sum(max(precisions[i:]) for i in range(len(precisions)))
    return [total / 6, len(taken) / 6]


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_that_of_loops(seed):
    rng = seeded(seed)
    detections = []
    truths = []
    for room in range(4):  # the first has no true box
        detections.append((torch.rand(6, 6, generator=rng) + 0.5, torch.rand(6, 2, generator=rng)))
        truths.append((torch.rand(room, 6, generator=rng) + 0.5, torch.zeros(room)))
    result = torch.stack(metrics.average_precision(detections, truths, 2, threshold=0.25))
    assert result[:, 0].tolist() == pytest.approx(slow_average_precision(detections, truths))
    assert result[:, 1].isnan().all()  # No true box is of class 1.


def test_the_svm_meets_the_optimality_condition_of_its_objective():
    """At the minimum the gradient w - 2 C sum_i y_i x_i max(0, 1 - y_i w . x_i) vanishes."""
    x = randn(60, 5, dtype=torch.float64)
    labels = torch.arange(60) % 3
    x[:, 0] += labels
    w = metrics.linear_svm(x, labels, C=0.5)
    y = 2.0 * F.one_hot(labels, 3) - 1
    assert (w - x.T @ (y * (1 - y * (x @ w)).clamp_min(0))).abs().max() < 1e-3


def test_the_svm_chooses_c_on_every_fifth_training_feature_whatever_their_scale_and_shift():
    labels = torch.arange(160) % 7 // 2  # the last class is rarer
    features = randn(160, 6, seed=1) + F.one_hot(labels, 6)
    x = (features - features[:100].mean(0)) / features[:100].std(0)
    x = F.pad(x, (0, 1), value=1.0).double()

    def accuracy(fitted, tested, C):
        w = metrics.linear_svm(x[fitted], labels[fitted], C)
        return ((x[tested] @ w).argmax(dim=1) == labels[tested]).double().mean().item()

    order = labels[:100].argsort(stable=True)
    fitted = order[torch.arange(100) % 5 != 0]
    best = max((0.001, 0.01, 0.1, 1.0), key=lambda C: accuracy(fitted, order[::5], C))
    moved = features * torch.logspace(0, 3, 6) + 7
    result = metrics.svm_accuracy(moved[:100], labels[:100], moved[100:], labels[100:])
    assert result == (pytest.approx(100 * accuracy(slice(100), slice(100, None), best)), best)


def test_nearest_neighbours_vote_and_of_even_votes_the_nearer_ones_win():
    train = randn(40, 3)
    labels = torch.arange(40) % 4
    queries = randn(60, 3, seed=1)
    winners = torch.zeros(60)
    for i, query in enumerate(queries):
        cosine = F.cosine_similarity(train, query[None])
        votes = [(0, 0.0)] * 4  # of each label the number and the sum of cosines
        for k in cosine.argsort(descending=True)[:5].tolist():
            number, total = votes[labels[k]]
            votes[labels[k]] = (number + 1, total + cosine[k].item())
        winners[i] = votes.index(max(votes))
    winners[:15] += 1
    assert metrics.knn_accuracy(train, labels, queries, winners) == 75
