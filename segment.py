"""A label for each point (Sec. 5): the parts of objects, or what stands in rooms. Needs no data.

    python segment.py  # parts of synthetic shapes, after train_student.py
    python segment.py --task scene  # synthetic rooms
    python segment.py --data ShapeNetPart --checkpoint student.pth --size base  # as published
    python segment.py --task scene --data S3DIS --checkpoint student.pth --size base

--data is `synthetic` or a folder, recognised by the files in it:

    ShapeNetPart  PointNet++'s shapenetcore_partanno_segmentation_benchmark_v0_normal; --task parts
    S3DIS         Area_1_office_1.npy ..., by PointNet's collect_indoor3d_data.py; --task scene
    own labels    train/*, test/* (.npy .txt): x y z ... label, classes.txt; scene: metres, z up

Leaves last.pt (for predict.py), metrics.jsonl, config.json, loss.svg, a picture and labels.csv.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

import act
from util import clouds, datasets, inference, metrics, processes, run, transfer

PRESETS = {  # base: as published (Sec. 5)
    "parts": {
        "tiny": dict(points=1024, epochs=3, batch_size=16, lr=2e-4),
        "small": dict(points=2048, epochs=30, batch_size=16, lr=2e-4),
        "base": dict(points=2048, epochs=300, batch_size=16, lr=2e-4),
    },
    "scene": {
        "tiny": dict(points=1024, epochs=6, batch_size=32, lr=2e-4),
        "small": dict(points=2048, epochs=10, batch_size=32, lr=2e-4),
        "base": dict(points=2048, epochs=60, batch_size=32, lr=2e-4),
    },
}
UNUSED = ["protocol", "variant"]  # flags that neither task uses
SHOWN = 6  # test clouds in the picture
SHOWN_POINTS = 30_000  # at most, of each of them


@dataclass
class Config(transfer.TransferConfig):
    task: str = run.flag("parts", "what is labelled", choices=("parts", "scene"))
    area: int = run.flag(5, "the area of S3DIS that is the test set", 5)
    unused: ClassVar[dict] = {"parts": UNUSED + ["area"], "scene": UNUSED + ["cache"]}


class Segmentation(transfer.Task):
    """Subclasses set `config`, `sizes`, `names`, `test`; `predictions` are of a share."""

    def build_model(self):
        return act.Segmenter(self.sizes)

    def move(self, xyz, generator, share):
        return clouds.scale_translate(xyz, generator, (0.8, 1.25), 0.1, False, share)

    def count_labels(self, train, test):
        """How many of `train` are 0, 1, ..., (parts,). Sets `absent`, which count in no mean."""
        count = np.bincount(train, minlength=self.sizes.num_parts)
        transfer.check_labels(self.config, count)
        self.absent = torch.from_numpy(count + np.bincount(test, minlength=len(count)) == 0)
        return count

    def evaluate(self, model):
        """Accuracy over all test points. Keeps each cloud's counts, and a few clouds."""
        model.eval()
        every = math.ceil(len(self.test) / SHOWN)
        counts = {}  # number of a cloud -> its counts
        self.shown = {}
        for i, name, xyz, truth, predicted in self.predictions(model):
            counts[i] = metrics.confusion(truth, predicted, self.sizes.num_parts)
            if i % every == 0:
                self.shown[name] = (xyz, truth, predicted)
        for other_counts, other_shown in processes.collect((counts, self.shown)):
            counts |= other_counts
            self.shown |= other_shown
        self.matrices = [counts[i] for i in sorted(counts)]
        return metrics.accuracy(sum(self.matrices))

    def finish(self, model, folder):
        """Writes picture and legend; each label's IoU, unless labels are of categories."""
        names, colors = inference.write_legend(folder / "labels.csv", model.config)
        hidden = np.isin(names, ("ceiling", "wall"))
        shown = {}
        for name, (xyz, truth, predicted) in self.shown.items():
            seen = np.flatnonzero(~hidden[truth])[:: len(xyz) // SHOWN_POINTS + 1]
            shown[name] = (xyz[seen], truth[seen], predicted[seen])
        transfer.write_examples(folder / self.config.task, shown, colors / 255)
        if self.sizes.num_categories:
            return {}
        matrix = sum(self.matrices)
        metrics.print_table(matrix, names)
        each = metrics.iou(matrix).masked_fill(self.absent, math.nan)
        values = {}
        for i in np.flatnonzero(~self.absent):
            values[f"iou_{names[i]}"] = each[i].item()
        return values | {"miou": each.nanmean().item()}


class Parts(Segmentation):
    """Parts of objects of given categories; own labelled clouds have none."""

    metric = "instance_miou"

    def __init__(self, config, data, sizes, device):
        self.config = config
        self.device = device
        self.train = data.train.to(device)
        self.test = data.test.to(device)
        self.names = data.train.identities()
        self.categories = data.train.classes
        ranges = data.train.part_ranges
        self.sizes = act.SegmenterConfig(**sizes, num_categories=len(self.categories))
        clouds.check_sizes([data.train, data.test], self.sizes, config.points)
        self.sizes.num_parts = max(end for _, end in ranges)
        self.sizes.class_names = self.categories or data.train.part_names
        self.test_labels = torch.zeros(len(data.test), dtype=torch.int64)
        if self.categories:
            self.sizes.part_ranges = [list(pair) for pair in ranges]
            self.test_labels = data.test.labels.cpu()
        self.test_ranges = [ranges[label] for label in self.test_labels.tolist()]
        self.count_labels(data.train.parts.cpu(), data.test.parts.cpu())

    def sample(self, indices, step, generator):
        return self.draw(self.train, indices, generator, processes.SHARE)

    def draw(self, split, indices, generator, share=(0, 1)):
        """Drawn with replacement, as published: xyz, parts (B, N), category (B,) or None."""
        rank, world = share
        options = dict(generator=generator, device=self.device)
        uniform = torch.rand(len(indices), self.config.points, **options)[rank::world]
        indices = indices[rank::world].to(self.device, non_blocking=True)
        start = split.offsets[indices][:, None]  # (B, 1)
        size = split.offsets.diff()[indices][:, None]  # (B, 1)
        flat = start + (uniform * size).long().minimum(size - 1)  # rounding may give size itself
        category = split.labels[indices] if self.categories else None
        return clouds.unit_sphere(split.points[flat]), split.parts[flat], category

    @torch.no_grad()
    def predictions(self, model):
        """Of a fixed sample of each test cloud: number, name, xyz, truth, prediction."""
        for indices in processes.share(torch.arange(len(self.test)).split(32)):
            generator = run.seeded(self.device, "test", int(indices[0]))
            xyz, truth, category = self.draw(self.test, indices, generator)
            logits = model(xyz, category).float().cpu()  # (B, N, parts)
            for row, i in enumerate(indices.tolist()):
                first, end = self.test_ranges[i]
                predicted = logits[row, :, first:end].argmax(dim=1) + first
                yield i, self.test.names[i], xyz[row].cpu().numpy(), truth[row].cpu(), predicted

    def evaluate(self, model):
        """Also the mean IoU of clouds' parts over clouds, and over categories' means."""
        values = super().evaluate(model)
        each = []
        for matrix, (first, end) in zip(self.matrices, self.test_ranges, strict=True):
            iou = metrics.iou(matrix)
            if self.categories:  # as published, a part that a cloud has not counts 100
                iou = iou.nan_to_num(100.0)
            each.append(iou.masked_fill(self.absent, math.nan)[first:end].nanmean())
        each = torch.stack(each)  # (test clouds,)
        by_category = [each[self.test_labels == i].mean() for i in self.test_labels.unique()]
        values["instance_miou"] = each.mean().item()
        return values | {"class_miou": torch.stack(by_category).mean().item()}


def sample_block(room, num_points, rng):
    """xyz (num_points, 3) and labels of 1 m x 1 m around a random point of a room sorted along x:
    more than num_points / 2 points (Sec. 5), some repeated if too few."""
    for _ in range(200):
        center = room.xyz[rng.integers(len(room.xyz)), :2]
        first, end = np.searchsorted(room.xyz[:, 0], [center[0] - 0.5, center[0] + 0.5])
        inside = first + np.flatnonzero(abs(room.xyz[first:end, 1] - center[1]) <= 0.5)
        if len(inside) > num_points // 2:
            chosen = rng.choice(inside, num_points, replace=len(inside) < num_points)
            return room.xyz[chosen] - np.append(center, 0).astype(np.float32), room.labels[chosen]
    expected = f"expected metres, over {num_points // 2} points in 1 m x 1 m; lower --points"
    raise act.UserError(f"{room.name}: {expected}")


class Scenes(Segmentation):  # rooms, trained on blocks; labelled at the end, which takes long
    def __init__(self, config, data, sizes, device):
        self.config = config
        self.device = device
        self.test = data.test
        self.train = []
        self.names = []
        for room in data.train:
            order = room.xyz[:, 0].argsort(kind="stable")
            room = room._replace(xyz=room.xyz[order], labels=room.labels[order])
            repeats = max(1, len(order) // config.points)  # so that all its points are seen
            self.train += [room] * repeats
            self.names += [clouds.identity(room.name, room.xyz, room.labels)] * repeats
        self.sizes = act.SegmenterConfig(**sizes, normalized=False, num_categories=0)
        self.sizes.num_parts = len(data.classes)
        self.sizes.class_names = data.classes
        train = np.concatenate([room.labels for room in data.train])
        test = np.concatenate([room.labels for room in data.test])
        count = self.count_labels(train, test)
        weight = (count.max() / np.maximum(count, 1)) ** (1 / 3)  # as published
        self.loss_weight = torch.from_numpy(weight).float().to(device)

    def turn(self, xyz, generator, share):
        return clouds.rotate_y(xyz[..., [1, 2, 0]], generator, share)[..., [2, 0, 1]]  # y up, back

    def sample(self, indices, step, generator):
        blocks = []
        for i in processes.share(indices).tolist():
            rng = np.random.default_rng([self.config.seed, step, i])
            blocks.append(sample_block(self.train[i], self.config.points, rng))
        xyz = torch.from_numpy(np.stack([points for points, _ in blocks]))  # (B, N, 3)
        labels = torch.from_numpy(np.stack([labels for _, labels in blocks]))  # (B, N)
        return xyz.to(self.device), labels.long().to(self.device), None

    def predictions(self, model):
        """Number, name, xyz with y up, truth and prediction of each test room."""
        print(f"labelling every point of {len(self.test)} test rooms", flush=True)
        for i in processes.share(range(len(self.test))):
            room = self.test[i]
            upright = clouds.normalize(room.xyz[:, [0, 2, 1]] * [1, 1, -1])
            yield i, room.name, upright, room.labels, inference.label_points(model, room.xyz)


TASKS = {"parts": Parts, "scene": Scenes}


def main(given):
    config, device = run.setup(given, PRESETS[given.task])
    if config.augment == "auto":
        config = replace(config, augment="scale_translate")
    source = transfer.load_source(config)
    if config.task == "scene":
        density = 0.6 * config.points
        data = datasets.open_rooms(config.data, config.area, density, config.drop_invalid)
    else:
        data = datasets.open_parts(config.data, config.cache, config.drop_invalid)
    print(datasets.describe(data))
    print(f"{transfer.describe(config)}, on {device} x {processes.WORLD}")
    sizes = transfer.encoder_sizes(config, source, given.size)
    transfer.train(config, TASKS[config.task](config, data, sizes, device), source, device)


if __name__ == "__main__":
    run.run_command(main, Config, __doc__, PRESETS)
