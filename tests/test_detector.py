"""The detector: its model, and how detections are chosen from its outputs."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import act
from common import ENCODER, randn
from util import detector, metrics

noise = functools.partial(randn, dtype=torch.float64)


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = dict(num_queries=8, decoder_width=32, decoder_depth=2, class_names=["table", "chair"])
    return detector.Detector(detector.DetectorConfig(**ENCODER | sizes)).double().eval()


def test_decoder_layer_without_positions_is_torchs_own():
    layer = detector.DecoderLayer(32, 4, dropout=0.1).eval()
    theirs = torch.nn.TransformerDecoderLayer(32, 4, 32, batch_first=True, norm_first=True).eval()
    for name, value in layer.state_dict().items():
        name = name.replace("cross_attn", "multihead_attn").replace("fc", "linear")
        theirs.get_parameter(name).data = value
    x = randn(2, 5, 32)
    found = layer(x, torch.zeros_like(x), x[:, :3], x[:, :3])
    assert torch.allclose(found, theirs(x, x[:, :3]), atol=1e-5)


def test_published_sizes_have_the_published_number_of_parameters():
    model = detector.Detector(detector.DetectorConfig(width=256, num_heads=4, depth=1))
    count = sum(p.numel() for name, p in model.named_parameters() if name[:8] != "encoder.")
    heads = 667_419 - 264_706  # without the heads of the angle
    assert count == 5_276_160 + 198_144 + 131_584 + heads  # decoder, projection, query MLP


@pytest.mark.parametrize("bias, offset, share", [(100.0, 0.5, 1.0), (-100.0, -0.5, 0.0)])
def test_boxes_reach_half_a_metre_and_the_rooms_extent(model, bias, offset, share):
    for head in model.heads:
        torch.nn.init.constant_(head[-1].bias, bias)  # the logits are then extreme
    xyz = noise(2, 128, 3)
    logits, center, size, extent = model(xyz)
    assert logits.shape == (2, 2, 8, 3)  # layers, rooms, queries, classes and "no object"
    query = act.gather_points(xyz, act.farthest_point_sample(xyz, 8))
    assert torch.allclose(center, (query + offset).expand(2, 2, 8, 3))
    assert torch.allclose(size, share * extent[:, None].expand(2, 2, 8, 3))


def test_boxes_move_with_the_room(model):
    outputs = zip(model(noise(2, 128, 3) + 30), model(noise(2, 128, 3)), strict=True)
    for (found, expected), shift in zip(outputs, [0, 30, 0, 0], strict=True):  # the center's
        assert torch.allclose(found, expected + shift, atol=1e-9)


@given(seed=st.integers(0, 10**6), shift=st.sampled_from([0, 0, 0, 9]))  # 9: all boxes are empty
def test_detections_are_those_of_loops(seed, shift):
    # Coordinates are round, so that points lie on faces and IoUs at the threshold.
    boxes = (1.5 * noise(20, 6, seed=seed).abs()).ceil()
    xyz = (2 * noise(300, 3, seed=seed + 1).abs()).round() / 2 + shift
    probability = (3 * noise(20, 3, seed=seed + 2)).softmax(dim=1)
    label = probability[:, :2].argmax(dim=1)
    objectness = 1 - probability[:, 2]
    center, size = boxes.split(3, dim=1)
    full = ((xyz - center[:, None]).abs() * 2 <= size[:, None]).all(dim=2).sum(dim=1) >= 5
    if shift:
        full = objectness == objectness.max()
    kept = []
    for q in objectness.argsort(descending=True).tolist():
        overlaps = [metrics.box_iou(boxes[[q]], boxes[[k]]) for k in kept if label[k] == label[q]]
        if full[q] and objectness[q] > 0.05 and max(overlaps, default=0) <= 0.25:
            kept.append(q)
    found, scores = detector.select_detections(center, size, probability.log(), xyz)
    assert torch.equal(found, boxes[kept])
    assert torch.allclose(scores, (probability[:, :2] * objectness[:, None])[kept])
