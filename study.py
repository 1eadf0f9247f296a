"""The paper's tables over seeds: many runs of the commands, and what they give with its spread.

    python study.py teacher                        # which backbone teaches, on synthetic shapes
    python study.py target mask --seeds 5 --jobs 2
    python study.py teacher --data shapes --weights none random dino_vits16 --transfer scans

An arm is a row of a table; its runs are in <out>/<table>/<arm>/seed<k>. Equal ones are made once.
The same command again makes or resumes what is missing. Leaves <table>.md, .json and .svg.
"""

import datetime
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import act
from util import datasets, files, pictures, run
from util.run import flag

ROOT = Path(__file__).resolve().parent
MASK_RATIO = {"tiny": "0.6", "small": "0.8", "base": "0.8"}  # where an arm has no other


@dataclass
class Config:
    tables: list = flag((), "teacher prompt target mask decoder loss transfer", None, "positional")
    data: str = flag("synthetic", "'synthetic' or the path of a labelled data set")
    weights: list = flag((), "none, random, NAMEs, PATHs: arms of teacher; other tables take one")
    transfer: list = flag((), "further labelled data sets, for fine-tuning")
    seeds: int = flag(3, "runs of each arm")
    jobs: int = flag(1, "runs side by side, which share the cores")
    teacher_epochs: int = flag(None, "of stage I (default: those of the size)", None, int)
    student_epochs: int = flag(None, "of stage II (default: those of the size)", None, int)
    size: str = flag("tiny", "of teachers and students", choices=tuple(run.BACKBONES))
    out: str = flag("runs/study", "folder of all runs and tables")


# -- tables
class Arm(NamedTuple):  # a row of a table: the flags that make it differ from the others
    table: str
    name: str
    teacher: dict = {}
    student: dict = {}
    finetune: dict = {}  # of the table transfer
    stages: tuple = ("teacher", "student")  # what is trained before the read-outs


TABLES = "teacher prompt target mask decoder loss transfer".split()
ARMS = [  # of tables other than teacher; the others of a table are compared with its first
    Arm("prompt", "deep"),
    Arm("prompt", "shallow", teacher={"--prompt": "shallow"}),
    Arm("prompt", "none", teacher={"--prompt": "none"}),
    Arm("prompt", "backbone trained", teacher={"--tune": "full"}),
    Arm("target", "features"),
    Arm("target", "backbone's tokens", student={"--target": "backbone"}),
    Arm("target", "codes", student={"--target": "codes"}),
    Arm("target", "coordinates", student={"--target": "coordinates"}, stages=("student",)),
    Arm("mask", "random 0.4", student={"--mask-ratio": "0.4"}),
    Arm("mask", "random 0.6", student={"--mask-ratio": "0.6"}),
    Arm("mask", "random 0.8", student={"--mask-ratio": "0.8"}),
    Arm("mask", "random 0.9", student={"--mask-ratio": "0.9"}),
    Arm("mask", "block 0.6", student={"--mask-ratio": "0.6", "--mask": "block"}),
    Arm("mask", "block 0.8", student={"--mask-ratio": "0.8", "--mask": "block"}),
    Arm("decoder", "1 block", student={"--set": "decoder_depth=1"}),
    Arm("decoder", "2 blocks"),
    Arm("decoder", "4 blocks", student={"--set": "decoder_depth=4"}),
    Arm("loss", "cosine"),
    Arm("loss", "smooth L1", student={"--loss": "smooth_l1"}),
    Arm("loss", "L2", student={"--loss": "l2"}),
    Arm("transfer", "scratch", finetune={"--checkpoint": "none"}, stages=()),
    Arm("transfer", "full", finetune={"--protocol": "full"}),
    Arm("transfer", "MLP-3", finetune={"--protocol": "mlp3"}),
    Arm("transfer", "linear", finetune={"--protocol": "linear"}),
]


def arms_of(table: str, config: Config) -> list[Arm]:
    if table != "teacher":
        return [arm for arm in ARMS if arm.table == table]
    names = config.weights or ["none", "random", run.BACKBONES[config.size][0]]
    return [Arm(table, short_name(name), teacher={"--weights": name}) for name in names]


def short_name(name: str) -> str:
    """The name of a file without its folder and suffix; of model.safetensors, the folder's."""
    path = Path(name).absolute()
    if not path.exists():
        return name
    return path.parent.name if path.stem == "model" else path.stem


def slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)  # fit for a folder


# -- runs
@dataclass
class Run:  # of a command
    script: str
    flags: dict
    needs: "Run | None"  # whose last.pt it takes
    key: str  # stands for the three above
    folder: Path  # whose name ends in the key
    state: str = "open"  # then running, finished or failed
    process: subprocess.Popen | None = None

    def start(self, threads: int) -> None:
        """Starts the process, which resumes the run if it was interrupted."""
        flags = {"--out": str(self.folder)} | self.flags
        if self.needs is not None:
            name = "--teacher" if self.script == "train_student.py" else "--checkpoint"
            flags[name] = str(self.needs.folder / "last.pt")
        command = [sys.executable, str(ROOT / self.script), *sum(flags.items(), ())]
        if (self.folder / "last.pt").exists():
            command.append("--resume")
        self.folder.mkdir(parents=True, exist_ok=True)
        # In a session of its own, the process gets Ctrl-C from make_runs alone, and once.
        options = dict(stderr=subprocess.STDOUT, start_new_session=True)
        options["env"] = os.environ | dict(OMP_NUM_THREADS=str(threads))
        with open(self.folder / "output.txt", "a") as output:
            self.process = subprocess.Popen(command, stdout=output, **options)
        self.state = "running"

    def end(self) -> str:
        """Notes how the ended process has ended, and returns it in words."""
        if self.process.returncode == 0:
            self.state = "finished"
            (self.folder / "finished").touch()
            return "finished"
        self.state = "failed"
        output = (self.folder / "output.txt").read_text(errors="replace")
        last_line = output.rstrip().rpartition("\n")[2]
        return f"failed with code {self.process.returncode}: {last_line}"


def add_run(runs: dict, script: str, flags: dict, folder: Path, needs: Run | None) -> Run:
    """The run of this command; if it is new, its folder is `folder` or that of an earlier start."""
    words = [script, flags, needs.key if needs else None]
    key = f"{zlib.crc32(json.dumps(words).encode()):08x}"
    if key not in runs:
        folder = folder.with_name(f"{folder.name}-{key}")
        folder = next(folder.parents[3].glob(f"*/*/seed*/*-{key}"), folder)
        runs[key] = Run(script, flags, needs, key, folder)
        if (folder / "finished").exists():
            runs[key].state = "finished"
    return runs[key]


def plan_arm(runs: dict, config: Config, arm: Arm, seed: int) -> dict:
    """Adds the runs of an arm with a seed, and returns what they will give: (arm, metric, seed) ->
    (run, name of the value in the last row of its metrics.jsonl)."""
    folder = Path(config.out, arm.table, slug(arm.name), f"seed{seed}")
    common = {"--data": config.data, "--size": config.size, "--seed": str(seed)}
    defaults = {"teacher": {}, "student": {"--mask-ratio": MASK_RATIO[config.size]}}
    backbones = [name for name in config.weights if name != "none"]
    if backbones:
        defaults["teacher"]["--weights"] = backbones[0]
    last = None
    for stage in arm.stages:
        flags = common | defaults[stage]
        epochs = getattr(config, f"{stage}_epochs")
        if epochs is not None:
            flags["--epochs"] = str(epochs)
        flags.update(getattr(arm, stage))
        last = add_run(runs, f"train_{stage}.py", flags, folder / stage, last)
    results = {}
    sets = config.transfer
    protocols = {", full": {}, ", linear": {"--protocol": "linear"}}
    if arm.table == "transfer":
        sets = sets or [config.data]
        protocols = {"": arm.finetune}
    else:
        for metric, name in (("linear SVM", "svm_trained"), ("kNN", "knn_trained")):
            results[arm.name, metric, seed] = (last, name)
    for data in sets:
        for ending, own in protocols.items():
            metric = short_name(data) + ending
            flags = common | {"--data": data} | own
            tuned = add_run(runs, "finetune.py", flags, folder / slug(metric), last)
            results[arm.name, metric, seed] = (tuned, "accuracy")
    return results


def make_runs(runs: list[Run], jobs: int) -> None:
    """Makes the open runs, `jobs` at a time, each after the one it needs."""
    began = time.monotonic()
    made = 0
    try:
        while count(runs, "open") + count(runs, "running"):
            for each in runs:
                if each.state == "running" and each.process.poll() is not None:
                    ending = each.end()
                    made += 1
                    left = count(runs, "open") + count(runs, "running")
                    minutes = (time.monotonic() - began) / made * left / 60
                    print(f"{each.folder} {ending}; {left} runs left, {minutes:.0f} min")
                before = getattr(each.needs, "state", "finished")
                if each.state == "open" and before == "failed":
                    each.state = "failed"
                if each.state == "open" and before == "finished" and count(runs, "running") < jobs:
                    each.start(max(1, torch.get_num_threads() // jobs))
            sys.stdout.flush()
            time.sleep(0.1)
    finally:  # after Ctrl-C: what has been trained is in each run's last.pt
        for each in runs:
            if each.state == "running":
                each.process.send_signal(signal.SIGINT)
                each.process.wait()


def count(runs: list[Run], state: str) -> int:
    return sum(each.state == state for each in runs)


# -- statistics and results
def t_quantile(df: int) -> float:
    """The 97.5 % quantile of Student's t with `df` degrees of freedom."""
    # With t = sqrt(df) tan(angle), the density of the angle is proportional to cos^(df - 1).
    angle = np.linspace(-np.pi / 2, np.pi / 2, 100_001)
    density = np.cos(angle) ** (df - 1)
    cumulative = np.cumsum((density[1:] + density[:-1]) / 2)
    return math.sqrt(df) * math.tan(np.interp(0.975, cumulative / cumulative[-1], angle[1:]))


def spread(values: list[float]) -> tuple[float, float | None, float | None]:
    """The mean, its standard error and half its 95 % interval; no spread, no interval: None."""
    mean = float(np.mean(values))
    if np.ptp(values) < 1e-9:
        return mean, None, None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, error, t_quantile(len(values) - 1) * error


def head_of(table: str, first: str, results: dict) -> str:
    """What stands above a table whose first arm is `first`."""
    backbones, precisions = set(), set()  # of its runs, which may have been left to auto
    for source, _ in results.values():
        while source is not None:
            about = json.loads((source.folder / "config.json").read_text())
            precisions.add(about["settings"]["precision"])
            if source.script == "train_teacher.py":
                backbones.add(short_name(about["config"]["weights"]))
            source = source.needs
    return f"""# {table}

`python study.py {" ".join(sys.argv[1:])}`, {datetime.date.today()}, torch {torch.__version__}.
Percent; mean ± standard error over n seeds. Beside it the difference to the arm `{first}`, paired
by seed, its 95 % t-interval, and half of that: no smaller difference could have been seen. Last,
what the best epoch on the test set of the best seed would have reported (SVM, kNN: the best seed).
Precision of the runs: {", ".join(sorted(precisions)) or "no run"}. Backbones of the teachers:
{", ".join(sorted(backbones)) or "no teacher"}.
"""


def format_row(arm: str, values: dict, reference: dict, best: float) -> str:
    """A row of the table of a metric; `reference` has the values of the first arm."""
    mean, error, _ = spread(list(values.values()))
    cells = [arm, str(len(values)), f"{mean:.2f}", "", "", "", f"{best:.2f}"]
    if error is not None:
        cells[2] += f" ± {error:.2f}"
    differences = [values[seed] - reference[seed] for seed in values if seed in reference]
    if differences and values is not reference:
        mean, _, reach = spread(differences)
        cells[3] = f"{mean:+.2f}"
        if reach is not None:
            cells[4] = f"{mean - reach:+.2f} to {mean + reach:+.2f}"
            cells[5] = f"{reach:.2f}"
    return f"| {' | '.join(cells)} |\n"


def write_table(config: Config, table: str, results: dict) -> None:
    """Writes <table>.json, .md and .svg, of the runs that are finished."""
    arms = [arm.name for arm in arms_of(table, config)]
    results = {key: each for key, each in results.items() if each[0].state == "finished"}
    values = {arm: {} for arm in arms}  # arm -> metric -> seed -> value of the last epoch
    best = {}  # (arm, metric) -> value of the best epoch of all seeds
    panels = {}  # metric -> its part of the .svg
    for (arm, metric, seed), (source, key) in results.items():
        row = json.loads((source.folder / "metrics.jsonl").read_text().splitlines()[-1])
        value = row.get(key)
        if value is not None:  # null is a figure that could not be had
            values[arm].setdefault(metric, {})[seed] = value
            best[arm, metric] = max(best.get((arm, metric), value), row.get(f"best_{key}") or value)
            panels[metric] = []
    text = head_of(table, arms[0], results)
    for metric, panel in panels.items():
        columns = f"arm | n | mean | minus {arms[0]} | 95 % interval | least seen | best of all"
        text += f"\n## {metric}\n\n| {columns} |\n{7 * '| --- '}|\n"
        for arm in arms:
            by_seed = values[arm].get(metric)
            if by_seed:
                reference = values[arms[0]].get(metric, {})
                text += format_row(arm, by_seed, reference, best[arm, metric])
                panel.append((arm, list(by_seed.values()), spread(list(by_seed.values()))[2]))
    for suffix, content in ((".json", json.dumps(values, indent=1)), (".md", text)):
        with files.complete_file(Path(config.out, table + suffix)) as file:
            file.write(content.encode())
    pictures.write_dots(Path(config.out, f"{table}.svg"), panels)
    print(text)


def main(config):
    for table in config.tables:
        if table not in TABLES:
            raise act.UserError(f"expected tables of {', '.join(TABLES)}, got {table}")
    if min(config.seeds, config.jobs) < 1:
        raise act.UserError("--seeds, --jobs: expected 1 or more, got 0")
    for names in (config.weights, config.transfer):
        if len({slug(short_name(name)) for name in names}) < len(names):
            raise act.UserError(f"expected files of different names, got {' '.join(names)}")
    for data in sorted({config.data}.union(config.transfer) - {"synthetic"}):
        run.check_apart(data, config.out)
        labels = datasets.open_dataset(data).train.labels
        if labels is None or len(labels.unique()) < 2:
            raise act.UserError(f"{data}: expected clouds of two classes or more, for the metrics")
    run.open_folder(config.out)
    for number in (signal.SIGINT, signal.SIGTERM):  # a script's & has the first ignored
        signal.signal(number, signal.default_int_handler)  # no run is left behind
    plan = {}  # the runs by their keys
    tables = {table: {} for table in config.tables}
    for seed in range(config.seeds):  # so that an interrupted study has equal arms
        for table, results in tables.items():
            for arm in arms_of(table, config):
                results |= plan_arm(plan, config, arm, seed)
    runs = list(plan.values())
    print(f"{len(runs)} runs, of which {count(runs, 'finished')} are finished")
    try:
        make_runs(runs, config.jobs)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
    for table, results in tables.items():
        write_table(config, table, results)
    failed = [str(each.folder) for each in runs if each.state == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    if count(runs, "finished") < len(runs):
        sys.exit(1)


if __name__ == "__main__":
    run.run_command(main, Config, __doc__)
