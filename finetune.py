"""A class for each cloud (Sec. 5): what a pretrained encoder is worth. Needs no data set.

    python finetune.py                        # full fine-tuning, after train_student.py
    python finetune.py --protocol linear      # the encoder frozen; mlp3: a larger head
    python finetune.py --checkpoint none      # from scratch, for comparison
    python finetune.py --task fewshot --way 5 --shot 10    # ten episodes, mean and deviation
    python finetune.py --task svm             # a linear SVM on frozen features
    python finetune.py --data ScanObjectNN --checkpoint student.pth --size base   # as published
    torchrun --nproc_per_node=8 finetune.py --data ModelNet40 --vote 10 --size base

--data is `synthetic` or a folder: own clouds in a sub-folder for each class, below train/ and test/
if they are split, or a published set (ScanObjectNN, ModelNet40, pairs of .h5; Point-BERT's episodes
for --task fewshot). --checkpoint is a student, ours or official; a tiny one gets 64 patches. Leaves
last.pt, for predict.py, metrics.jsonl, config.json, loss.svg, confusion.png and six test clouds.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

import act
from util import clouds, datasets, files, inference, metrics, pictures, processes, run, transfer

PRESETS = {  # base: as published (Sec. 5, and Point-MAE's settings)
    "classify": {
        "tiny": dict(points=1024, epochs=8, batch_size=32, lr=5e-4),
        "small": dict(points=1024, epochs=50, batch_size=32, lr=5e-4),
        "base": dict(points=1024, epochs=300, batch_size=32, lr=5e-4),
    },
    "fewshot": {
        "tiny": dict(points=1024, epochs=60, batch_size=32, lr=5e-4),
        "small": dict(points=1024, epochs=50, batch_size=32, lr=5e-4),
        "base": dict(points=1024, epochs=150, batch_size=32, lr=5e-4),
    },
    "svm": {"tiny": dict(points=1024), "small": dict(points=1024), "base": dict(points=1024)},
}
QUERIES = 20  # test clouds per class of a few-shot episode
FOLDS = 10  # few-shot episodes
SHOWN = 6  # test clouds in the picture
TRAINING = "protocol augment epochs steps batch_size lr weight_decay compile resume log_every vote"


@dataclass
class Config(transfer.TransferConfig):
    task: str = run.flag("classify", "what is learnt", choices=tuple(PRESETS))
    vote: int = run.flag(0, "also the mean logits of so many augmented samples", 10)
    way: int = run.flag(5, "fewshot: classes of an episode", "5, 10")
    shot: int = run.flag(10, "fewshot: training clouds per class of an episode", "10, 20")
    features: str = run.flag("", "svm: an .npz for the features (n, 2 C)")
    unused: ClassVar[dict] = {
        "classify": ["way", "shot", "features"],
        "fewshot": ["features"],
        "svm": TRAINING.split() + ["way", "shot"],
    }

    def __post_init__(self):
        super().__post_init__()
        if self.protocol != "full" and self.lr is None:
            self.lr = 1e-3  # since the encoder is frozen


def settle(config, given, data, source):
    """The config with --points and --augment, which depend on the data (None: published ones)."""
    scanned = data is not None and data.name.startswith("ScanObjectNN")
    if given.points is None and config.task == "svm" and source is not None:
        config.points = source.config.points
    elif given.points is None and scanned and config.size != "tiny":
        config.points = 2048  # as published
    if config.augment == "auto" and config.task != "svm":
        turned = config.task == "classify" and (scanned or config.data == "synthetic")
        config.augment = "rotate" if turned else "scale_translate"
    return config


class Classification(transfer.Task):
    def __init__(self, config, data, sizes, device):
        transfer.check_labels(config, np.bincount(data.train.labels))
        self.config = config
        self.device = device
        self.classes = data.train.classes
        self.sizes = act.ClassifierConfig(**sizes, num_classes=len(self.classes))
        fewest = clouds.check_sizes([data.train, data.test], self.sizes, config.points)
        if config.task == "classify":  # a patch for 16 points, as published, if not for fewer
            self.sizes.num_group = max(self.sizes.num_group, min(config.points // 16, fewest))
        self.train = clouds.subsample(run.place(data.train, device), config.points, device)
        self.test = clouds.subsample(run.place(data.test, device), config.points, device)
        self.names = data.train.identities()
        self.sizes.normalized = self.train.normalized
        self.sizes.center, self.sizes.radius = data.train.frame()  # for predict.py
        self.sizes.class_names = self.classes
        if config.protocol == "linear":
            self.sizes.head = "linear"
        if config.task == "classify":
            self.metric = "accuracy"

    def build_model(self):
        return act.Classifier(self.sizes)

    def sample(self, indices, step, generator):
        xyz, _ = self.train.sample(indices, self.config.points, generator, processes.SHARE)
        own = processes.share(indices).to(self.device, non_blocking=True)
        return xyz, self.train.labels[own], None

    def evaluate(self, model):
        """Accuracy by the farthest points of each test cloud."""
        model.eval()
        self.predicted = inference.each_cloud(model, self.test, self.config.points).argmax(dim=1)
        self.matrix = metrics.confusion(self.test.labels, self.predicted, len(self.classes))
        return metrics.accuracy(self.matrix)

    @torch.no_grad()
    def vote(self, model):
        """Accuracy by the mean logits of --vote augmented samples of each test cloud."""
        model.eval()
        logits = torch.zeros(len(self.test), len(self.classes))
        for indices in torch.arange(len(self.test)).split(64):
            for i in range(self.config.vote):
                generator = run.seeded(self.device, self.config.seed, "vote", i, int(indices[0]))
                xyz, _ = self.test.sample(indices, self.config.points, generator)
                logits[indices] += model(self.augment(xyz, generator)).float().cpu()
        predicted = logits.argmax(dim=1)
        return metrics.accuracy(metrics.confusion(self.test.labels, predicted, len(self.classes)))

    def finish(self, model, folder):
        if self.config.task == "classify":
            metrics.print_table(self.matrix, self.classes)
            self.write_pictures(folder)
        closing = {}
        if self.config.vote:
            closing = {f"vote_{name}": value for name, value in self.vote(model).items()}
        return closing | {"confusion": self.matrix.tolist()}

    def write_pictures(self, folder):
        """The confusion, darker for larger shares of a true class, and clouds in both colours."""
        shares = self.matrix / self.matrix.sum(dim=1, keepdim=True).clamp(min=1)
        gray = (255 - 255 * shares).byte().numpy().repeat(16, axis=0).repeat(16, axis=1)
        pictures.write_png(folder / "confusion.png", gray[..., None].repeat(3, axis=2))
        shown = {}
        for i in range(0, len(self.test), -(-len(self.test) // SHOWN)):  # rounded up
            truth = int(self.test.labels[i])
            predicted = int(self.predicted[i])
            name = f"{self.test.names[i]} ({self.classes[truth]}: {self.classes[predicted]})"
            shown[name] = (clouds.normalize(self.test[i].cpu()), truth, predicted)
        transfer.write_examples(folder / "classify", shown, pictures.palette(len(self.classes)))


def draw_episode(data, way, shot, fold):
    """An episode of `way` classes, the same for every --seed: `shot` support, <= QUERIES query."""
    support = data.train.labels.bincount(minlength=len(data.train.classes))
    query = data.test.labels.bincount(minlength=len(support))
    enough = np.flatnonzero((support >= shot) & (query > 0))
    if shot < 1 or not 2 <= way <= len(enough):
        expected = f"a shot, and 2 to the {len(enough)} classes of so many clouds"
        raise act.UserError(f"--way {way} --shot {shot}: expected {expected}")
    rng = np.random.default_rng([way, shot, fold])
    chosen = rng.permutation(enough)[:way].tolist()
    classes = [data.train.classes[label] for label in chosen]
    splits = []
    for split, count in ((data.train, shot), (data.test, QUERIES)):
        drawn = [rng.permutation(np.flatnonzero(split.labels == c))[:count] for c in chosen]
        labels = torch.from_numpy(np.repeat(np.arange(way), list(map(len, drawn))))
        split = split.select(np.concatenate(drawn))
        splits.append(replace(split, labels=labels, classes=classes))
    return datasets.Dataset(data.name, splits[0], splits[1])


def fewshot(config, data, sizes, source, device):
    """A run for each fold in --out/fold_<k>; the mean and deviation of their last accuracies.
    Episodes are drawn from `data`, or are published files if it is None."""
    episodes = []
    for fold in range(FOLDS):
        if data is None:
            path = Path(config.data, f"{config.way}way_{config.shot}shot", f"{fold}.pkl")
            episodes.append(datasets.Dataset(path.name, *datasets.read_episode(path, config.way)))
        else:
            episodes.append(draw_episode(data, config.way, config.shot, fold))
    accuracies = []
    for fold, episode in enumerate(episodes):
        fold_config = replace(config, out=f"{config.out}/fold_{fold}")
        print(f"fold {fold}, {fold + 1} of {FOLDS}: {', '.join(episode.train.classes)}")
        task = Classification(fold_config, episode, sizes, device)
        log = transfer.train(fold_config, task, source, device)
        accuracies.append(log.rows[-1].get("accuracy"))  # None but on the first process
    log, _ = run.begin(replace(config, resume=False), task.build_model(), None, [])
    if processes.RANK == 0:
        figures = dict(accuracy=np.mean(accuracies).item(), folds=accuracies)
        figures["accuracy_std"] = np.std(accuracies, ddof=1).item()
        transfer.close(log, config, figures)


def svm(config, data, sizes, source, device):
    """A linear SVM on the frozen features of all training clouds."""
    task = Classification(config, data, sizes, device)
    torch.manual_seed(config.seed)
    model = task.build_model()
    del model.head  # the features are the encoder's
    model = transfer.start_model(config, model, source).to(device).eval()
    log, _ = run.begin(config, model, None, task.names)
    feature = partial(inference.cloud_feature, model)
    train = inference.each_cloud(feature, task.train, config.points)  # (n, 2 C)
    test = inference.each_cloud(feature, task.test, config.points)
    if processes.RANK > 0:
        return
    percent, C = metrics.svm_accuracy(train, task.train.labels, test, task.test.labels)
    transfer.close(log, config, {"accuracy": percent, "C": C})
    if config.features:
        x = torch.cat([train, test]).cpu()
        names = task.train.names + task.test.names
        y = torch.cat([task.train.labels, task.test.labels]).cpu()
        split = np.repeat(["train", "test"], [len(train), len(test)])
        with files.complete_file(config.features) as file:
            np.savez(file, features=x, names=names, labels=y, split=split, class_names=task.classes)


def main(given):
    inference.check_features(given.features)
    preset, device = run.setup(given, PRESETS[given.task])
    source = transfer.load_source(preset)
    data = None
    if preset.task == "fewshot" and any(Path(preset.data).glob("*way_*shot")):
        print(f"{preset.data}: published episodes")
    else:
        data = datasets.open_dataset(preset.data, preset.cache, preset.variant, preset.drop_invalid)
        print(datasets.describe(data))
        if data.train.labels is None:
            raise act.UserError(f"{preset.data}: expected a sub-folder for each class")
    config = settle(preset, given, data, source)
    sizes = transfer.encoder_sizes(config, source, given.size)
    print(f"{transfer.describe(config)}, on {device} x {processes.WORLD}")
    if config.task == "fewshot":
        fewshot(config, data, sizes, source, device)
    elif config.task == "svm":
        svm(config, data, sizes, source, device)
    else:
        transfer.train(config, Classification(config, data, sizes, device), source, device)


if __name__ == "__main__":
    run.run_command(main, Config, __doc__, PRESETS)
