"""Any checkpoint on own files (Sec. 5): a class, a feature, a label for each point, or boxes.

    python predict.py a.ply my_clouds --checkpoint runs/classify/last.pt    # a class for each cloud
    python predict.py my_clouds --checkpoint runs/student/last.pt --features f.npz
    python predict.py my_clouds --checkpoint runs/parts/last.pt --category chair
    python predict.py my_rooms --checkpoint runs/scene/last.pt     # or detect: metres, z up

Files are clouds or meshes, or folders of them. A broken one is named on stderr; then the exit code
is 2. The checkpoint, ours or official, decides what is written to --out, in the folders that the
files have below the one they share. Earlier results there move to earlier-<time>/ beside them.

    Classifier   predictions.csv: the class of each file and the probability of each class
    Segmenter    <file>.npz (points, labels, label_names), coloured <file>.ply, legend labels.csv
    Detector     <file>.ply: the room and the edges of its boxes
    Student      nothing, but --features F.npz has (also of a Classifier) features (n, 2 C), names,
                 class_names, and labels by the names of the files' folders, else -1
"""

import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import act
from util import clouds, datasets, detector, files, inference, pictures, run
from util.run import flag


@dataclass
class Config:
    files: list = flag((), "clouds, or folders of them", kind="positional")
    checkpoint: str = flag("runs/classify/last.pt", "the model")
    features: str = flag("", "an .npz for the features of a Classifier or Student")
    out: str = flag("runs/predict", "folder of the results")
    category: str = flag("", "what a Segmenter finds the parts of (default: the folder's name)")
    points: int = flag(None, "points taken of a cloud (default: as in training)", None, int)
    drop_invalid: bool = flag(False, "leave out points that are not finite, else an error")
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")


def check_flags(config, model):
    """Raises UserError for flags that do not fit the checkpoint's kind of model."""
    kind = type(model).__name__
    if config.features and kind not in ("Classifier", "Student"):
        raise act.UserError(f"--features: expected a Classifier or Student, got a {kind}")
    inference.check_features(config.features)
    if kind == "Student" and not config.features:
        raise act.UserError(f"{config.checkpoint}: expected --features for a Student, got none")
    least = model.config.group_size
    if config.points is not None and (kind == "Detector" or config.points < least):
        expected = f"--points: expected {least} or more, and no Detector"
        raise act.UserError(f"{expected}, got {config.points} for a {kind}")
    if config.category and not getattr(model.config, "num_categories", 0):
        raise act.UserError(f"--category: expected a model with categories, got a {kind} without")


def open_model(path, device):
    """The model of a checkpoint, in eval mode, with the names that official files do not tell."""
    obj = act.read_tensors(path)
    if isinstance(obj, dict) and obj.get("kind") == "Detector":
        return detector.load_detector(path, device)
    model = run.load_model(path, device, act.Classifier, act.Segmenter, act.Student)
    c = model.config
    if isinstance(model, act.Student) or c.class_names:
        return model
    if isinstance(model, act.Classifier):
        c.class_names = [f"class {i}" for i in range(c.num_classes)]
    elif c.num_categories:
        c.class_names = list(datasets.SHAPENET_PARTS)
        c.part_ranges = list(datasets.SHAPENET_PARTS.values())
    else:
        c.class_names = list(datasets.S3DIS_CLASSES)
        c.normalized = False
    return model


def locate(path):
    """The absolute path, through links as given: their names, not their targets', say the class."""
    if ".." in path.parts:  # the folder above the target of a link
        return path.parent.resolve() / path.name
    return path.absolute()


def name_outputs(paths, folder):
    """Path -> the path of its results, without a suffix: the files' tree, from the folder that all
    share, is kept below `folder`. One file is there once, by whatever paths it was given."""
    sources = {}
    for path in paths:
        sources.setdefault(os.path.realpath(path), path)
    shared = os.path.commonpath([locate(path).parent for path in sources.values()])
    return {path: folder / locate(path).relative_to(shared) for path in sources.values()}


def make_room(config, outputs, inputs):
    """Moves earlier results aside in their folders. UserError, before that, if one is an input."""
    real = set(map(os.path.realpath, inputs))
    for path in filter(None, outputs + [config.features]):
        if os.path.realpath(path) in real:
            raise act.UserError(f"{path}: expected a place for results, got a file to predict")
    for folder, earlier in itertools.groupby(filter(os.path.exists, outputs), os.path.dirname):
        run.move_aside(list(earlier), Path(folder))


def check_points(file, xyz, num_group):
    """UserError unless a file has a different point for each patch."""
    number = clouds.count_points(xyz)
    if number < num_group:
        raise act.UserError(f"{file}: expected {num_group} different points, got {number}")


@torch.no_grad()
def predict_class(config, model, file, target):
    """(class by its folder or -1, feature (2 C,), probabilities) of a file, the likeliest shown."""
    c = model.config
    frame = None if c.normalized else (c.center, c.radius)
    xyz = files.read_cloud(file, c.points, c.normalized, config.drop_invalid, frame)
    check_points(file, xyz, c.num_group)
    feature = inference.cloud_feature(model, torch.from_numpy(xyz[None]))
    names = getattr(c, "class_names", [])  # a Student has none
    probability = []
    if names:
        probability = model.head(feature)[0].softmax(dim=0).tolist()
    best = sorted(zip(probability, names, strict=True), reverse=True)[:2]
    shown = ", ".join(f"{name} {value:.3f}" for value, name in best)
    print(f"{file}  {shown}".rstrip(), flush=True)
    label = -1
    for folder in reversed(locate(file).parents[:2]):  # <class>/a.ply or <class>/test/a.ply
        if datasets.nfc(folder.name) in names:
            label = names.index(datasets.nfc(folder.name))
    return label, feature[0].cpu().numpy(), probability


def write_results(config, results, names):
    """What predict_class gave for each file -> an .npz, a .csv; prints the accuracy."""
    paths = [str(path).encode(errors="backslashreplace").decode() for path in results]
    labels, features, probabilities = zip(*results.values(), strict=True)
    if config.features:
        with files.complete_file(config.features) as file:
            np.savez(file, features=features, names=paths, labels=labels, class_names=names)
        print(f"features of {len(paths)} clouds in {config.features}")
    if names:
        best = [int(np.argmax(probability)) for probability in probabilities]
        table = [["file", "label"] + names]
        for path, label, probability in zip(paths, best, probabilities, strict=True):
            table.append([path, names[label]] + probability)
        inference.write_csv(Path(config.out, "predictions.csv"), table)
        hits = np.equal(best, labels)[np.array(labels) >= 0]
        if len(hits):
            print(f"accuracy {100 * np.mean(hits):.2f} % of {len(hits)} clouds in class folders")


def read_all(config, model, file):
    """All points of a file, (n, 3) float64. Says on stderr that a room is too wide for metres."""
    xyz = files.read_points(file, config.drop_invalid)
    check_points(file, xyz, model.config.num_group)
    width = np.ptp(xyz, axis=0).max()
    if width > clouds.MAX_WIDTH and not model.config.normalized:
        print(f"{file}: {width:.0f} m wide: metres?", file=sys.stderr, flush=True)
    return xyz


def predict_labels(config, model, file, target):
    """A label for each point of a file, as .npz and coloured .ply; their names as labels.csv."""
    c = model.config
    xyz = read_all(config, model, file)
    category = None
    if c.num_categories:
        name = datasets.nfc(config.category or locate(file).parent.name)
        if name not in c.class_names:
            raise act.UserError(f"{file}: expected --category of {c.class_names}, got {name}")
        category = c.class_names.index(name)
    labels = inference.label_points(model, xyz - xyz.min(axis=0), category)  # the floor at 0
    names, colors = inference.write_legend(Path(config.out, "labels.csv"), c)
    with files.complete_file(f"{target}.npz") as archive:
        np.savez(archive, points=xyz, labels=labels, label_names=names)
    files.write_ply(f"{target}.ply", xyz, colors[labels])
    shares = np.bincount(labels) / len(labels)
    shown = [f"{names[i]} {shares[i]:.0%}" for i in np.flatnonzero(shares)]
    print(f"{file}  {', '.join(shown)}", flush=True)


def predict_boxes(config, model, file, target):
    """The boxes in a room, in a printed table and a .ply."""
    names = model.config.class_names
    xyz = read_all(config, model, file)
    low = xyz.min(axis=0)  # subtracted in float64: coordinates may be large
    scene = clouds.Scene("", np.float32(xyz - low), np.zeros((0, 6)), np.zeros(0))
    boxes, scores = detector.find_boxes(model, [scene])[0]
    best, labels = scores.max(dim=1)
    shown = best > detector.SCORE_THRESHOLD
    boxes = boxes[shown].numpy() + np.append(low, [0, 0, 0])
    labels = labels[shown].tolist()
    size = " x ".join(f"{length:.2f}" for length in np.ptp(xyz, axis=0))
    print(f"{file}: {len(xyz)} points, {size} m, {len(boxes)} boxes")
    for box, label, score in zip(boxes.round(2), labels, best[shown].tolist(), strict=True):
        print(f"  {names[label]:16}{score:.2f}  center {box[:3]}  size {box[3:]}", flush=True)
    points, colors = detector.outline(xyz, boxes, pictures.palette(len(names))[labels])
    files.write_ply(f"{target}.ply", points, np.uint8(255 * colors))


RESULTS = {  # kind of model -> what predicts, suffixes of each file's results, a table of all
    act.Classifier: (predict_class, [], ["predictions.csv"]),
    act.Student: (predict_class, [], []),
    act.Segmenter: (predict_labels, [".npz", ".ply"], ["labels.csv"]),
    detector.Detector: (predict_boxes, [".ply"], []),
}


def main(config):
    model = open_model(config.checkpoint, run.pick_device(config.device))
    check_flags(config, model)
    c = model.config
    if config.points is not None:
        c.num_group = max(1, config.points * c.num_group // c.points)  # as many points to a patch
        c.points = config.points
    predict, suffixes, tables = RESULTS[type(model)]
    if predict is predict_class and not c.normalized:
        x, y, z = c.center
        frame = f"centre ({x:.4g}, {y:.4g}, {z:.4g}) and radius {c.radius:.4g} of its training"
        print(f"{config.checkpoint}: takes clouds as stored; each is moved and scaled to {frame}")
    targets = name_outputs(datasets.find_clouds(config.files), Path(config.out))
    outputs = [Path(config.out, table) for table in tables]
    for target in targets.values():
        outputs += [Path(f"{target}{suffix}") for suffix in suffixes]
    if outputs:
        run.open_folder(config.out)
    make_room(config, outputs, targets)

    results = {}
    for path, target in targets.items():
        try:
            if suffixes:
                target.parent.mkdir(parents=True, exist_ok=True)
            results[path] = predict(config, model, path, target)
        except (act.UserError, OSError) as error:  # OSError: its results can't be written
            print(error, file=sys.stderr, flush=True)
    if results and predict is predict_class:
        write_results(config, results, getattr(c, "class_names", []))
    if results and outputs:
        print(f"results in {config.out}")
    if len(results) < len(targets):
        raise act.UserError(f"expected results of {len(targets)} files, got {len(results)}")


if __name__ == "__main__":
    run.run_command(main, Config, __doc__)
