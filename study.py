"""The paper's tables over seeds: many runs of the commands, and what they give with its spread.

    python study.py teacher                        # which backbone teaches, on synthetic shapes
    python study.py target mask --seeds 5 --jobs 2
    python study.py teacher --data shapes --weights none random dino_vits16 --transfer scans

A row of a table, an arm, is trained once for each seed, in <out>/<table>/<arm>/seed<k>. A run that
arms share is made once. The same command, given again, makes only what is missing and resumes what
was interrupted. Leaves <table>.md, <table>.json and <table>.svg.
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
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import act
from util import pictures, run
from util.run import flag

ROOT = Path(__file__).resolve().parent
PUBLIC = {  # the public backbone of each --size
    "tiny": "vit_tiny_patch16_224",
    "small": "vit_small_patch16_384",
    "base": "vit_base_patch16_384",
}
MASK_RATIO = {"tiny": "0.6", "small": "0.8", "base": "0.8"}  # where an arm has no other


@dataclass
class Config:
    tables: list = flag((), "teacher prompt target mask decoder loss transfer", None, "positional")
    data: str = flag("synthetic", "'synthetic' or the path of a labelled data set")
    weights: list = flag((), "none, random, NAMEs, PATHs: arms of teacher; others take the first")
    transfer: list = flag((), "further labelled data sets, for fine-tuning")
    seeds: int = flag(3, "runs of each arm")
    jobs: int = flag(1, "runs side by side, which share the cores")
    teacher_epochs: int = flag(None, "of stage I (default: those of the size)", None, int)
    student_epochs: int = flag(None, "of stage II (default: those of the size)", None, int)
    size: str = flag("tiny", "of teachers and students", choices=tuple(PUBLIC))
    out: str = flag("runs/study", "folder of all runs and tables")


# -- tables ---------------------------------------------------------------------------------------
class Arm(NamedTuple):
    """A row of a table: the flags of each command that make it differ from the other rows."""

    name: str
    teacher: dict = {}
    student: dict = {}
    finetune: dict = {}  # of the table transfer
    stages: tuple = ("teacher", "student")  # what is trained before the read-outs


TABLES = {  # other arms are compared with the first
    "teacher": [],  # an arm for each of --weights
    "prompt": [
        Arm("deep"),
        Arm("shallow", teacher={"--prompt": "shallow"}),
        Arm("none", teacher={"--prompt": "none"}),
        Arm("backbone trained", teacher={"--tune": "full"}),
    ],
    "target": [
        Arm("features"),
        Arm("backbone's tokens", student={"--target": "backbone"}),
        Arm("codes", student={"--target": "codes"}),
        Arm("coordinates", student={"--target": "coordinates"}, stages=("student",)),
    ],
    "mask": [
        Arm("random 0.4", student={"--mask-ratio": "0.4"}),
        Arm("random 0.6", student={"--mask-ratio": "0.6"}),
        Arm("random 0.8", student={"--mask-ratio": "0.8"}),
        Arm("random 0.9", student={"--mask-ratio": "0.9"}),
        Arm("block 0.6", student={"--mask-ratio": "0.6", "--mask": "block"}),
        Arm("block 0.8", student={"--mask-ratio": "0.8", "--mask": "block"}),
    ],
    "decoder": [
        Arm("1 block", student={"--set": "decoder_depth=1"}),
        Arm("2 blocks"),
        Arm("4 blocks", student={"--set": "decoder_depth=4"}),
    ],
    "loss": [
        Arm("cosine"),
        Arm("smooth L1", student={"--loss": "smooth_l1"}),
        Arm("L2", student={"--loss": "l2"}),
    ],
    "transfer": [
        Arm("scratch", finetune={"--checkpoint": "none"}, stages=()),
        Arm("full", finetune={"--protocol": "full"}),
        Arm("MLP-3", finetune={"--protocol": "mlp3"}),
        Arm("linear", finetune={"--protocol": "linear"}),
    ],
}


def arms_of(table: str, config: Config) -> list[Arm]:
    """The arms of a table."""
    if table != "teacher":
        return TABLES[table]
    names = config.weights or ["none", "random", PUBLIC[config.size]]
    return [Arm(short_name(name), teacher={"--weights": name}) for name in names]


def short_name(name: str) -> str:
    """The name of a file without its folder and suffix; of model.safetensors, the folder's."""
    path = Path(name).absolute()
    if not path.exists():
        return name
    return path.parent.name if path.stem == "model" else path.stem


def slug(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^\w.-]+", "-", name)


# -- runs -----------------------------------------------------------------------------------------
@dataclass
class Run:
    """A run of a command. `words` has all that its result depends on: the script, its flags, and
    the words of the run whose last.pt it takes, or None."""

    words: list
    folder: Path
    needs: "Run | None" = None
    state: str = "open"  # then running, finished or failed
    process: subprocess.Popen | None = None
    began: float = 0.0

    def start(self, threads: int) -> None:
        """Starts the process, which resumes an interrupted run of the same words."""
        script, flags, _ = self.words
        command = [sys.executable, str(ROOT / script), "--out", str(self.folder)]
        for name, value in flags.items():
            command += [name, value]
        if self.needs is not None:
            name = "--teacher" if script == "train_student.py" else "--checkpoint"
            command += [name, str(self.needs.folder / "last.pt")]
        if read_note(self.folder).get("words") == self.words:
            command.append("--resume")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write_note(finished=False)
        # In a session of its own, the process gets Ctrl-C from make_runs alone, and once.
        options = dict(stderr=subprocess.STDOUT, start_new_session=True)
        options["env"] = os.environ | dict(OMP_NUM_THREADS=str(threads))
        with open(self.folder / "output.txt", "a") as output:
            self.process = subprocess.Popen(command, stdout=output, **options)
        self.state = "running"
        self.began = time.monotonic()

    def write_note(self, finished: bool) -> None:
        """Writes study.json, by which a later start of the study knows the run."""
        note = dict(words=self.words, finished=finished)
        (self.folder / "study.json").write_text(json.dumps(note))


def read_note(folder: Path) -> dict:
    """What Run.write_note wrote; {} where nothing is, or the write was cut short."""
    try:
        return json.loads((folder / "study.json").read_text())
    except (OSError, ValueError):
        return {}


class Plan:
    """All runs, in the order in which they are made; those of the same words are one."""

    def __init__(self, out: str):
        self.runs = {}  # words as JSON -> Run
        self.folders = {}  # words as JSON -> folder of an earlier start
        for note in Path(out).glob("*/*/seed*/*/study.json"):
            self.folders[json.dumps(read_note(note.parent).get("words"))] = note.parent

    def add(self, script: str, flags: dict, folder: Path, needs: Run | None) -> Run:
        words = [script, flags, needs.words if needs else None]
        key = json.dumps(words)
        if key in self.runs:
            return self.runs[key]
        folder = self.folders.get(key, folder)
        while any(other.folder == folder for other in self.runs.values()):
            folder = folder.with_name(folder.name + "-")  # an earlier start had other arms
        self.runs[key] = Run(words, folder, needs)
        if read_note(folder) == dict(words=words, finished=True):
            self.runs[key].state = "finished"
        return self.runs[key]


def stage_flags(config: Config, arm: Arm, seed: int, stage: str) -> dict:
    """The flags of a run of train_teacher.py or train_student.py."""
    flags = {"--data": config.data, "--size": config.size, "--seed": str(seed)}
    if stage == "student":
        flags["--mask-ratio"] = MASK_RATIO[config.size]
    elif config.weights:
        flags["--weights"] = config.weights[0]
    epochs = getattr(config, f"{stage}_epochs")
    if epochs is not None:
        flags["--epochs"] = str(epochs)
    return flags | getattr(arm, stage)


def plan_arm(plan: Plan, config: Config, table: str, arm: Arm, seed: int) -> dict:
    """Adds the runs of an arm with a seed: metric -> (Run, name in its last row)."""
    folder = Path(config.out, table, slug(arm.name), f"seed{seed}")
    last = None
    for stage in arm.stages:
        flags = stage_flags(config, arm, seed, stage)
        last = plan.add(f"train_{stage}.py", flags, folder / stage, last)
    sources = {"linear SVM": (last, "svm_trained"), "kNN": (last, "knn_trained")}
    sets = config.transfer
    protocols = {", full": {}, ", linear": {"--protocol": "linear"}}
    if table == "transfer":
        sources = {}
        sets = sets or [config.data]
        protocols = {"": arm.finetune}
    for data in sets:
        for ending, own in protocols.items():
            metric = short_name(data) + ending
            flags = {"--data": data, "--size": config.size, "--seed": str(seed)} | own
            tuned = plan.add("finetune.py", flags, folder / slug(metric), last)
            sources[metric] = (tuned, "accuracy")
    return sources


def make_plan(config: Config) -> tuple[list[Run], dict]:
    """All runs, seed by seed, so that an interrupted study has equal arms; and where the tables'
    values come from: table -> arm -> metric -> seed -> (Run, name in its last row)."""
    plan = Plan(config.out)
    tables = {}
    for seed in range(config.seeds):
        for table in config.tables:
            for arm in arms_of(table, config):
                metrics = tables.setdefault(table, {}).setdefault(arm.name, {})
                for metric, source in plan_arm(plan, config, table, arm, seed).items():
                    metrics.setdefault(metric, {})[seed] = source
    return list(plan.runs.values()), tables


def make_runs(runs: list[Run], jobs: int) -> None:
    """Makes the open runs, `jobs` at a time, each after the one it needs."""
    durations = {}  # script -> seconds of its runs that have ended
    try:
        while any(each.state in ("open", "running") for each in runs):
            for each in runs:
                if each.state == "running" and each.process.poll() is not None:
                    end_run(each, runs, durations, jobs)
            start_runs(runs, jobs)
            time.sleep(0.1)
    finally:  # after Ctrl-C: what has been trained is in each run's last.pt
        for each in runs:
            if each.state == "running":
                each.process.send_signal(signal.SIGINT)
                each.process.wait()


def start_runs(runs: list[Run], jobs: int) -> None:
    """Starts the first open runs, up to `jobs` at a time. One that needs a failed run fails."""
    busy = sum(each.state == "running" for each in runs)
    for each in runs:
        if each.state != "open":
            continue
        before = "finished" if each.needs is None else each.needs.state
        if before == "failed":
            each.state = "failed"
        elif before == "finished" and busy < jobs:
            each.start(max(1, torch.get_num_threads() // jobs))
            busy += 1


def end_run(ended: Run, runs: list[Run], durations: dict, jobs: int) -> None:
    """Notes how a run has ended, and prints a line with the time that the open ones will take."""
    seconds = time.monotonic() - ended.began
    how = f"finished in {seconds:.0f} s"
    if ended.process.returncode == 0:
        ended.state = "finished"
        ended.write_note(finished=True)
    else:
        ended.state = "failed"
        output = (ended.folder / "output.txt").read_text(errors="replace")
        last_line = output.rstrip().rpartition("\n")[2]
        how = f"failed with code {ended.process.returncode}: {last_line}"
    script = ended.words[0]
    durations.setdefault(script, []).append(seconds)
    left = 0.0
    for each in runs:
        if each.state in ("open", "running"):
            left += np.mean(durations.get(each.words[0], durations[script])) / jobs
    done = sum(each.state == "finished" for each in runs)
    print(f"{done} of {len(runs)} runs, {left / 60:.0f} min left: {ended.folder} {how}", flush=True)


# -- statistics -----------------------------------------------------------------------------------
def t_quantile(df: int) -> float:
    """The 97.5 % quantile of Student's t with `df` degrees of freedom."""
    # With t = sqrt(df) tan(angle), the density of the angle is proportional to cos^(df - 1).
    angle = np.linspace(-np.pi / 2, np.pi / 2, 100_001)
    density = np.cos(angle) ** (df - 1)
    cumulative = np.cumsum((density[1:] + density[:-1]) / 2)
    return math.sqrt(df) * math.tan(np.interp(0.975, cumulative / cumulative[-1], angle[1:]))


def spread(values: list[float]) -> tuple[float, float | None, float | None]:
    """The mean, its standard error, and half its 95 % interval; None for both of one value."""
    mean = float(np.mean(values))
    n = len(values)
    if n == 1:
        return mean, None, None
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean, error, t_quantile(n - 1) * error


def paired(values: dict, reference: dict) -> list[float]:
    """The values less the reference, seed by seed, where both have the seed."""
    return [values[seed] - reference[seed] for seed in values if seed in reference]


# -- results --------------------------------------------------------------------------------------
HEAD = """# {table}

`python study.py {words}`, {made}.
Percent; mean ± standard error over n seeds. Beside it the difference to the arm `{first}`, paired
by seed, its 95 % t-interval, and the smallest difference that is beyond it. Last, what the best
epoch on the test set of the best seed would have reported; for the SVM and kNN, the best seed.
"""
COLUMNS = """
## {metric}

| arm | n | mean | minus {first} | 95 % interval | least seen | best of all |
| --- | --- | --- | --- | --- | --- | --- |
"""


def collect(sources: dict) -> tuple[dict, float | None]:
    """Of the finished runs of seed -> (Run, name in its last row): seed -> value of the last epoch,
    and the best value of all epochs and seeds."""
    values = {}
    best = []
    for seed, (source, name) in sources.items():
        if source.state == "finished":
            row = json.loads((source.folder / "metrics.jsonl").read_text().splitlines()[-1])
            if name in row:  # a student of unlabelled clouds has no SVM
                values[seed] = row[name]
                best.append(row.get(f"best_{name}", row[name]))
    return values, max(best, default=None)


def format_row(arm: str, values: dict, reference: dict, best: float) -> str:
    """A row of the table of a metric; `reference` has the values of the first arm."""
    mean, error, _ = spread(list(values.values()))
    cells = [arm, str(len(values)), f"{mean:.2f}", "", "", "", f"{best:.2f}"]
    if error is not None:
        cells[2] += f" ± {error:.2f}"
    differences = paired(values, reference)
    if differences and values is not reference:
        mean, _, reach = spread(differences)
        cells[3] = f"{mean:+.2f}"
        if reach is not None:
            cells[4] = f"{mean - reach:+.2f} to {mean + reach:+.2f}"
            cells[5] = f"{reach:.2f}"
    return f"| {' | '.join(cells)} |\n"


def write_table(config: Config, table: str, arms: dict) -> None:
    """Writes <table>.json, .md and .svg, of the runs that are finished."""
    first = next(iter(arms))
    values = {}  # arm -> metric -> seed -> value
    sections = {}  # metric -> its part of the .md
    panels = {}  # metric -> its part of the .svg
    for arm, metrics in arms.items():
        values[arm] = {}
        for metric, sources in metrics.items():
            by_seed, best = collect(sources)
            if not by_seed:
                continue
            values[arm][metric] = by_seed
            reference = values[first].get(metric, {})
            sections.setdefault(metric, COLUMNS.format(metric=metric, first=first))
            sections[metric] += format_row(arm, by_seed, reference, best)
            points = list(by_seed.values())
            panels.setdefault(metric, []).append((arm, points, spread(points)[2]))
    words = " ".join(sys.argv[1:])
    made = f"{datetime.date.today()}, torch {torch.__version__}"
    text = HEAD.format(table=table, words=words, made=made, first=first)
    text += "".join(sections.values())
    Path(config.out, f"{table}.json").write_text(json.dumps(values, indent=1))
    Path(config.out, f"{table}.md").write_text(text)
    pictures.write_dots(Path(config.out, f"{table}.svg"), panels)
    print(text)


def main(config):
    for table in config.tables:
        if table not in TABLES:
            raise act.UserError(f"expected tables of {', '.join(TABLES)}, got {table}")
    if config.seeds < 1 or config.jobs < 1:
        found = f"got {config.seeds} and {config.jobs}"
        raise act.UserError(f"--seeds, --jobs: expected 1 or more, {found}")
    for names in (config.weights, config.transfer):
        if len({slug(short_name(name)) for name in names}) < len(names):
            raise act.UserError(f"expected files of different names, got {' '.join(names)}")
    for data in [config.data] + config.transfer:
        run.check_apart(data, config.out)
    run.open_folder(config.out)
    runs, tables = make_plan(config)
    done = sum(each.state == "finished" for each in runs)
    print(f"{len(runs)} runs, of which {done} are finished", flush=True)
    try:
        make_runs(runs, config.jobs)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
    for table, arms in tables.items():
        write_table(config, table, arms)
    failed = [str(each.folder) for each in runs if each.state == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    if any(each.state != "finished" for each in runs):
        sys.exit(1)


if __name__ == "__main__":
    run.run_command(main, Config, __doc__)
