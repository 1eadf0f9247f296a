"""Any checkpoint on own files (Sec. 5): a class, a feature, a label for each point, or boxes.

    python predict.py a.ply my_clouds --checkpoint runs/classify/last.pt    # a class for each cloud
    python predict.py my_clouds --checkpoint runs/student/last.pt --features f.npz
    python predict.py my_clouds --checkpoint runs/parts/last.pt --category chair
    python predict.py my_rooms --checkpoint runs/scene/last.pt     # or detect: metres, z up

Files are clouds or meshes, or folders of them. A broken one is named on stderr; then the exit code
is 2. The checkpoint, ours or official, decides what is written to --out:

    Classifier   predictions.csv: the class of each file and the probability of each class
    Segmenter    <file>.npz (points, labels, label_names), coloured <file>.ply, legend labels.csv
    Detector     <file>.ply: the room and the edges of its boxes
    Student      nothing, but --features F.npz has (also of a Classifier) features (n, 2 C), names,
                 class_names, and labels by the names of the files' folders, else -1
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import act
from util import clouds, datasets, detector, files, inference, pictures, run
from util.run import flag


# -- config ----------------------------------------------------------------------------------------
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
    path = Path(config.features)
    if config.features and kind not in ("Classifier", "Student"):
        raise act.UserError(f"--features: expected a Classifier or Student, got a {kind}")
    if config.features and not (path.suffix == ".npz" and path.parent.is_dir()):
        raise act.UserError(f"--features: expected an .npz in some folder, got {path}")
    if kind == "Student" and not config.features:
        raise act.UserError(f"{config.checkpoint}: expected --features for a Student, got none")
    least = model.config.group_size
    if config.points is not None and (kind == "Detector" or config.points < least):
        expected = f"--points: expected {least} or more, and no Detector"
        raise act.UserError(f"{expected}, got {config.points} for a {kind}")
    if config.category and not getattr(model.config, "num_categories", 0):
        raise act.UserError(f"--category: expected a model with categories, got a {kind} without")


# -- model and files -------------------------------------------------------------------------------
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


def name_outputs(paths, folder):
    """Path -> the path of its results, without a suffix, in `folder`; no two are the same."""
    sources = {}
    for path in paths:
        target = folder / "-".join(part for part in path.parts if part not in ("..", path.anchor))
        while target in sources:
            target = target.with_name(target.name + "-")  # another path is joined to the same
        sources[target] = path
    return {path: target for target, path in sources.items()}


# -- classes and features --------------------------------------------------------------------------
@torch.no_grad()
def predict_class(config, model, file, target):
    """(class by its folder or -1, feature (2 C,), probability of each class) of a file. Prints the
    two likeliest classes, writes nothing."""
    c = model.config
    xyz = files.read_cloud(file, c.points, c.normalized, config.drop_invalid)  # (n, 3) float32
    if len(np.unique(xyz, axis=0)) < c.num_group:
        raise act.UserError(f"{file}: expected {c.num_group} different points, got fewer")
    feature = inference.cloud_feature(model, torch.from_numpy(xyz[None]))
    names = []
    probability = []
    if isinstance(model, act.Classifier):
        names = c.class_names
        probability = model.head(feature)[0].softmax(dim=0).tolist()
    best = sorted(zip(probability, names, strict=True), reverse=True)[:2]
    shown = ", ".join(f"{name} {value:.3f}" for value, name in best)
    print(f"{file}  {shown}".rstrip(), flush=True)
    label = -1
    for folder in reversed(file.resolve().parents[:2]):  # <class>/a.ply or <class>/test/a.ply
        if folder.name in names:
            label = names.index(folder.name)
    return label, feature[0].cpu().numpy(), probability


def write_results(config, results, names):
    """What predict_class gave for each file -> an .npz, a .csv; prints the accuracy."""
    paths = list(map(str, results))
    labels, features, probabilities = zip(*results.values(), strict=True)
    if config.features:
        np.savez(config.features, features=features, names=paths, labels=labels, class_names=names)
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


# -- labels of points, boxes -----------------------------------------------------------------------
def warn_of_width(file, xyz):
    """Says on stderr that a room is too wide to be in metres."""
    width = np.ptp(xyz, axis=0).max()
    if width > clouds.MAX_WIDTH:
        print(f"{file}: {width:.0f} m wide: metres?", file=sys.stderr, flush=True)


def predict_labels(config, model, file, target):
    """A label for each point of a file, as .npz and coloured .ply; their names as labels.csv."""
    c = model.config
    xyz = files.read_points(file, config.drop_invalid)
    if not c.normalized:
        warn_of_width(file, xyz)
    category = None
    if c.num_categories:
        name = config.category or file.resolve().parent.name
        if name not in c.class_names:
            raise act.UserError(f"{file}: expected --category of {c.class_names}, got {name}")
        category = c.class_names.index(name)
    labels = inference.label_points(model, xyz, category)
    names, colors = inference.write_legend(Path(config.out, "labels.csv"), c)
    np.savez(f"{target}.npz", points=xyz, labels=labels, label_names=names)
    files.write_ply(f"{target}.ply", xyz, colors[labels])
    shares = np.bincount(labels) / len(labels)
    shown = [f"{names[i]} {shares[i]:.0%}" for i in np.flatnonzero(shares)]
    print(f"{file}  {', '.join(shown)}", flush=True)


def predict_boxes(config, model, file, target):
    """The boxes in a room, in a printed table and a .ply."""
    names = model.config.class_names
    xyz = files.read_points(file, config.drop_invalid)
    warn_of_width(file, xyz)
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


# -- main ------------------------------------------------------------------------------------------
def main(config):
    model = open_model(config.checkpoint, run.pick_device(config.device))
    check_flags(config, model)
    c = model.config
    if config.points is not None:
        c.num_group = max(1, config.points * c.num_group // c.points)  # as many points to a patch
        c.points = config.points
    has_folder = not isinstance(model, act.Student)  # A Student has --features alone.
    if has_folder:
        try:
            Path(config.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise act.UserError(f"--out: expected a folder to write to, got {error}") from error

    predictors = {act.Segmenter: predict_labels, detector.Detector: predict_boxes}
    predict = predictors.get(type(model), predict_class)
    paths = datasets.find_clouds(config.files)
    targets = name_outputs(paths, Path(config.out))
    results = {}
    for path in paths:
        try:
            if path.is_dir():
                raise act.UserError(f"{path}: expected files {' '.join(files.READERS)}, got none")
            results[path] = predict(config, model, path, targets[path])
        except (act.UserError, OSError) as error:  # OSError: its results can't be written
            print(error, file=sys.stderr, flush=True)

    if results and predict is predict_class:
        write_results(config, results, getattr(c, "class_names", []))
    if results and has_folder:
        print(f"results in {config.out}")
    if len(results) < len(paths):
        broken = len(paths) - len(results)
        raise act.UserError(f"expected files that can be read, got {broken} of {len(paths)} broken")


if __name__ == "__main__":
    run.run_command(main, Config, __doc__)
