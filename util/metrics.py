"""Metrics: accuracy and IoU of labels, IoU and precision of boxes, a linear SVM.

Shapes: N and M boxes, n detections, K true boxes, C classes, D features. A box is its center (3)
and its size (3), with faces along the axes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def confusion(truth, predicted, num_classes: int) -> Tensor:
    """Counts (C, C) int64 of two lists of labels, a row for each true class."""
    truth = torch.as_tensor(truth).long().cpu()
    predicted = torch.as_tensor(predicted).long().cpu()
    counts = torch.bincount(truth * num_classes + predicted, minlength=num_classes**2)
    return counts.view(num_classes, num_classes)


def accuracy(matrix: Tensor) -> dict:
    """From counts (C, C): accuracy and its mean over classes that occur, in percent."""
    hits = matrix.diag().double()
    count = matrix.sum(dim=1)  # 0 / 0 = NaN is left out
    return {
        "accuracy": 100 * (hits.sum() / count.sum()).item(),
        "mean_accuracy": 100 * (hits / count).nanmean().item(),
    }


def iou(matrix: Tensor) -> Tensor:
    """From counts (C, C): each class's IoU in percent, (C,); NaN if it does not occur."""
    hits = matrix.diag()
    union = matrix.sum(dim=0) + matrix.sum(dim=1) - hits
    return 100 * hits.double() / union


def print_table(matrix: Tensor, names: list) -> None:
    """Prints a line for each class that occurs."""
    width = max(len(name) for name in names) + 2
    count = matrix.sum(dim=1)
    recalls = 100 * matrix.diag() / count
    overlaps = iou(matrix)
    print(f"{'class':{width}}{'number':>10}{'accuracy':>10}{'IoU':>8}")
    for i in count.nonzero()[:, 0].tolist():
        print(f"{names[i]:{width}}{count[i]:10d}{recalls[i]:10.1f}{overlaps[i]:8.1f}")


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of all pairs of boxes: (..., N, 6), (..., M, 6) -> (..., N, M), 0 for flat boxes."""
    inner, union, _ = _volumes(a, b)
    return inner / union


def generalized_box_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU of all pairs, IoU - 1 + union / hull, from -1 to 1 (Rezatofighi et al. 2019).
    Shapes as in box_iou. Value and gradient are finite for flat boxes."""
    inner, union, hull = _volumes(a, b)
    return inner / union - 1 + union / hull


def _volumes(a, b):
    """Volumes (..., N, M) of pairs' intersection, union, hull, the last two >= 1e-9."""
    a = a.unsqueeze(-2)  # (..., N, 1, 6)
    b = b.unsqueeze(-3)  # (..., 1, M, 6)
    a_low = a[..., :3] - a[..., 3:] / 2
    a_high = a[..., :3] + a[..., 3:] / 2
    b_low = b[..., :3] - b[..., 3:] / 2
    b_high = b[..., :3] + b[..., 3:] / 2
    sides = torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)  # (..., N, M, 3)
    inner = sides.clamp_min(0).prod(dim=-1)
    hull = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).prod(dim=-1)
    both = (a_high - a_low).prod(dim=-1) + (b_high - b_low).prod(dim=-1)
    union = (both - inner).clamp_min(1e-9)
    return inner, union, hull.clamp_min(1e-9)


def average_precision(detections: list, truths: list, num_classes: int, threshold: float) -> tuple:
    """Average precision (the area under the envelope of precision over recall) and recall of each
    class: two tensors (C,) float64 from 0 to 1, NaN for a class without true boxes.
    detections, truths: each room's boxes (n, 6), scores (n, C), or (K, 6), labels (K,)
    By score, a detection takes the box of its class of highest IoU. It is right if that exceeds
    the threshold and the box was not taken."""
    ap = torch.zeros(num_classes, dtype=torch.float64)
    recall = torch.zeros(num_classes, dtype=torch.float64)
    for c in range(num_classes):
        scores = []
        taken = []  # the true box that a detection takes, -1: none
        count = 0
        for (boxes, score), (true_boxes, labels) in zip(detections, truths, strict=True):
            true_boxes = true_boxes[labels == c]
            overlaps = F.pad(box_iou(boxes, true_boxes), (0, 1), value=-1)  # or no box
            best, box = overlaps.max(dim=1)
            scores.append(score[:, c])
            taken.append(torch.where(best > threshold, count + box, -1))
            count += len(true_boxes)
        order = torch.cat(scores).argsort(descending=True, stable=True)
        box, first = np.unique(torch.cat(taken)[order].numpy(), return_index=True)
        right = torch.zeros(len(order), dtype=torch.float64)
        right[first[box >= 0]] = 1  # the first that takes a box
        precision = right.cumsum(dim=0) / torch.arange(1, len(right) + 1)
        envelope = precision.flip(0).cummax(dim=0).values.flip(0)
        ap[c] = (envelope * right).sum() / count
        recall[c] = right.sum() / count  # 0 / 0 = NaN
    return ap, recall


def linear_svm(x: Tensor, labels: Tensor, C: float) -> Tensor:
    """Weights (D, classes) of one-against-rest linear SVMs on x (n, D): each class's minimum of
    |w|^2 / 2 + C sum_i max(0, 1 - y_i w . x_i)^2, where y_i is 1 in the class, else -1. By L-BFGS,
    without randomness. For an intercept, append a column of ones to x."""
    y = 2.0 * F.one_hot(labels) - 1
    w = x.new_zeros(x.shape[1], y.shape[1])

    def objective():
        slack = (1 - y * (x @ w)).clamp_min(0)
        w.grad = w - 2 * C * x.T @ (y * slack)
        return w.square().sum() / 2 + C * slack.square().sum()

    options = dict(max_iter=1000, tolerance_grad=1e-6 * len(x), tolerance_change=1e-12)
    options |= dict(history_size=20, line_search_fn="strong_wolfe")
    torch.optim.LBFGS([w], **options).step(objective)
    return w


def _percent_right(C, x, labels, queries, truth):
    scores = queries @ linear_svm(x, labels, C)
    return 100 * (scores.argmax(dim=1) == truth).double().mean().item()


def svm_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> tuple:
    """Percent of test features (m, D) that a linear SVM on train features (n, D) labels right,
    standardised by the latter, and its C, the best on every fifth of these by class."""
    mean = train.double().mean(dim=0)
    std = train.double().std(dim=0) + 1e-6
    order = train_labels.argsort(stable=True)
    x = F.pad((train - mean) / std, (0, 1), value=1.0)[order]
    y = train_labels[order]
    queries = F.pad((test - mean) / std, (0, 1), value=1.0)
    held_out = torch.arange(len(x), device=x.device) % 5 == 0
    split = (x[~held_out], y[~held_out], x[held_out], y[held_out])
    percent = {C: _percent_right(C, *split) for C in (0.001, 0.01, 0.1, 1.0)}
    best_C = max(percent, key=percent.get)  # the first of equally good ones
    return _percent_right(best_C, x, y, queries, test_labels), best_C


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Percent of test features (m, D) whose label most of the 5 train features (n, D) of highest
    cosine have; of even votes, the higher sum of cosines wins."""
    cosine = F.normalize(test.double(), dim=1) @ F.normalize(train.double(), dim=1).T  # (m, n)
    value, nearest = cosine.topk(min(5, len(train)), dim=1)
    one_hot = F.one_hot(train_labels)[nearest].double()  # (m, 5, classes)
    votes = one_hot.sum(dim=1) + 0.01 * (one_hot * value[..., None]).sum(dim=1)
    return 100 * (votes.argmax(dim=1) == test_labels).double().mean().item()
