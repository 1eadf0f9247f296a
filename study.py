"""The paper's tables over seeds: many runs of the commands, and what they give with its spread.

    python study.py teacher                        # which backbone teaches, on synthetic shapes
    python study.py target mask --seeds 5 --jobs 2
    python study.py teacher --data shapes --weights none random dino_vits16 --transfer scans

A table has an arm for each choice, an arm a run of each command for each seed, in
<out>/<table>/<arm>/seed<k>. A run that arms share is made once. The same command, given again,
makes only what is missing and resumes what was interrupted. Leaves <table>.md, .json, .svg.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import act
from util import pictures, run
from util.run import flag

ROOT = Path(__file__).resolve().parent
PUBLIC = {"tiny": "vit_tiny_patch16_224", "small": "vit_small_patch16_384"}
PUBLIC["base"] = "vit_base_patch16_384"
MASK_RATIO = {"tiny": 0.6, "small": 0.8, "base": 0.8}  # what train_student.py takes by itself


@dataclass
class Config:
    tables: list = flag(
        (), "of: teacher prompt target mask decoder loss transfer", None, "positional"
    )
    data: str = flag("synthetic", "'synthetic' or the path of a labelled data set")
    weights: list = flag(
        (), "none, random, NAMEs, PATHs: the arms of the table teacher; the others"
    )
    transfer: list = flag((), "further labelled data sets, for fine-tuning")
    seeds: int = flag(3, "runs of each arm")
    jobs: int = flag(1, "runs side by side, which share the cores")
    teacher_epochs: int = flag(None, "of stage I (default: those of the size)", None, int)
    student_epochs: int = flag(None, "of stage II (default: those of the size)", None, int)
    size: str = flag("tiny", "of teachers and students", choices=tuple(PUBLIC))
    out: str = flag("runs/study", "folder of all runs and tables")


# -- tables ---------------------------------------------------------------------------------------
class Arm(NamedTuple):
    """A row of a table: flags of the commands that differ from what they do by themselves."""

    name: str
    teacher: tuple = ()
    student: tuple = ()
    finetune: tuple = ()  # of the table transfer
    stages: tuple = ("teacher", "student")  # what is trained before the read-outs


def arms_of(table: str, config: Config) -> list[Arm]:
    """The arms of a table. The first is what the others are compared with."""
    if table == "teacher":
        names = config.weights or ["none", "random", PUBLIC[config.size]]
        return [Arm(weights_name(name), teacher=("--weights", name)) for name in names]
    if table == "mask":
        arms = []
        for kind, ratio in MASKS:
            flags = ()
            if (kind, ratio) != ("random", MASK_RATIO[config.size]):
                flags = ("--mask", kind, "--mask-ratio", str(ratio))
            arms.append(Arm(f"{kind} {ratio}", student=flags))
        return arms
    return TABLES[table]


def weights_name(name: str) -> str:
    """A short name of --weights; of a file that is called model, the name of its folder."""
    path = Path(name)
    if not path.is_file():
        return name
    return path.parent.name if path.stem == "model" else path.stem


MASKS = [("random", 0.4), ("random", 0.6), ("random", 0.8), ("random", 0.9)]
MASKS += [("block", 0.6), ("block", 0.8)]
TABLES = {
    "teacher": None,  # see arms_of
    "prompt": [
        Arm("deep"),
        Arm("shallow", teacher=("--prompt", "shallow")),
        Arm("none", teacher=("--prompt", "none")),
        Arm("backbone trained", teacher=("--tune", "full")),
    ],
    "target": [
        Arm("features"),
        Arm("backbone's tokens", student=("--target", "backbone")),
        Arm("codes", student=("--target", "codes")),
        Arm("coordinates", student=("--target", "coordinates"), stages=("student",)),
    ],
    "mask": None,  # see arms_of
    "decoder": [
        Arm("1 block", student=("--set", "decoder_depth=1")),
        Arm("2 blocks"),
        Arm("4 blocks", student=("--set", "decoder_depth=4")),
    ],
    "loss": [
        Arm("cosine"),
        Arm("smooth L1", student=("--loss", "smooth_l1")),
        Arm("L2", student=("--loss", "l2")),
    ],
    "transfer": [
        Arm("scratch", finetune=("--checkpoint", "none"), stages=()),
        Arm("full", finetune=("--protocol", "full")),
        Arm("MLP-3", finetune=("--protocol", "mlp3")),
        Arm("linear", finetune=("--protocol", "linear")),
    ],
}
READ_OUTS = {"linear SVM": "svm_trained", "kNN": "knn_trained"}  # of a student's last row


# -- runs -----------------------------------------------------------------------------------------
@dataclass
class Run:
    """A run of one command. `words` says all that its result depends on: two with the same words
    are one run."""

    words: list
    command: list  # as it is typed, without --resume
    folder: Path
    needs: "Run | None" = None
    state: str = "open"  # then running, finished or failed
    process: subprocess.Popen | None = None
    began: float = 0.0

    def note(self) -> Path:
        return self.folder / "study.json"

    def read_note(self) -> dict:
        """What an earlier start has noted in the folder: the words, and whether it was finished."""
        try:
            note = json.loads(self.note().read_text())
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def write_note(self, finished: bool) -> None:
        self.note().write_text(json.dumps(dict(words=self.words, finished=finished)))

    def start(self, threads: int) -> None:
        """Starts the process, which resumes an interrupted run of the same words."""
        command = list(self.command)
        if self.read_note().get("words") == self.words:
            command.append("--resume")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write_note(finished=False)
        environment = os.environ | dict(OMP_NUM_THREADS=str(threads))
        options = dict(stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        with open(self.folder / "output.txt", "a") as output:
            self.process = subprocess.Popen(command, stdout=output, **options)
        self.state = "running"
        self.began = time.monotonic()

    def poll(self) -> bool:
        """Whether a running process has ended; then the state says how."""
        code = self.process.poll()
        if code is None:
            return False
        self.state = "failed"
        if code == 0:
            self.state = "finished"
            self.write_note(finished=True)
        return True

    def rows(self) -> list[dict]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@dataclass
class Plan:
    """All runs, in the order in which they are made, and where a table finds its values."""

    runs: dict = field(default_factory=dict)  # words as JSON -> Run
    values: dict = field(default_factory=dict)  # table -> arm -> metric -> seed -> (Run, key)
    known: dict = field(default_factory=dict)  # words as JSON -> folder of an earlier start

    def add(self, script: str, flags: list, folder: Path, needs: Run | None = None) -> Run:
        """The run of a script with these flags, after the run whose last.pt it takes."""
        words = [script, flags, needs.words if needs else None]
        key = json.dumps(words)
        if key not in self.runs:
            folder = self.known.get(key, folder)
            command = [sys.executable, str(ROOT / script), *flags, "--out", str(folder)]
            if needs is not None:
                kind = "--teacher" if script == "train_student.py" else "--checkpoint"
                command += [kind, str(needs.folder / "last.pt")]
            self.runs[key] = Run(words, command, folder, needs)
        return self.runs[key]


def stage_flags(config: Config, arm: Arm, seed: int, stage: str) -> list[str]:
    """The flags of a run of train_teacher.py or train_student.py."""
    flags = ["--data", config.data, "--size", config.size, "--seed", str(seed)]
    own = arm.student
    epochs = config.student_epochs
    if stage == "teacher":
        own = arm.teacher
        epochs = config.teacher_epochs
        if config.weights and "--weights" not in own:
            flags += ["--weights", config.weights[0]]
    if epochs is not None:
        flags += ["--epochs", str(epochs)]
    return flags + list(own)


def plan_arm(plan: Plan, config: Config, table: str, arm: Arm, seed: int) -> dict:
    """Adds the runs of an arm with a seed: metric -> (Run, name in its last row)."""
    folder = Path(config.out, table, slug(arm.name), f"seed{seed}")
    last = None
    for stage in arm.stages:
        flags = stage_flags(config, arm, seed, stage)
        last = plan.add(f"train_{stage}.py", flags, folder / stage, last)
    found = {}
    if table != "transfer":
        found = {metric: (last, key) for metric, key in READ_OUTS.items()}
    sets = list(config.transfer)
    protocols = {", full": (), ", linear": ("--protocol", "linear")}
    if table == "transfer":
        sets = sets or [config.data]
        protocols = {"": arm.finetune}
    for data in sets:
        for name, own in protocols.items():
            metric = f"{Path(data).stem}{name}"
            flags = ["--data", data, "--size", config.size, "--seed", str(seed), *own]
            tuned = plan.add("finetune.py", flags, folder / slug(metric), last)
            found[metric] = (tuned, "accuracy")
    return found


def make_plan(config: Config) -> Plan:
    """The runs of all tables, seed by seed, so that an interrupted study has equal arms."""
    plan = Plan()
    for note in Path(config.out).glob("*/*/seed*/*/study.json"):
        words = Run([], [], note.parent).read_note().get("words")
        plan.known[json.dumps(words)] = note.parent
    for seed in range(config.seeds):
        for table in config.tables:
            for arm in arms_of(table, config):
                metrics = plan.values.setdefault(table, {}).setdefault(arm.name, {})
                for metric, source in plan_arm(plan, config, table, arm, seed).items():
                    metrics.setdefault(metric, {})[seed] = source
    for each in plan.runs.values():
        note = each.read_note()
        if note.get("words") == each.words and note.get("finished"):
            each.state = "finished"
    return plan


def slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def make_runs(runs: list[Run], jobs: int) -> None:
    """Makes the open runs, `jobs` at a time, each after the one it needs."""
    threads = max(1, torch.get_num_threads() // jobs)
    durations = {}  # script -> seconds of its finished runs
    try:
        while any(each.state in ("open", "running") for each in runs):
            running = [each for each in runs if each.state == "running"]
            for each in running:
                if each.poll():
                    report(each, runs, durations, jobs)
            for each in runs:
                if each.needs is not None and each.needs.state == "failed" and each.state == "open":
                    each.state = "failed"
                ready = each.needs is None or each.needs.state == "finished"
                busy = sum(other.state == "running" for other in runs)
                if each.state == "open" and ready and busy < jobs:
                    each.start(threads)
            time.sleep(0.1)
    finally:  # after Ctrl-C: each process ends after its own last full epoch
        for each in runs:
            if each.state == "running":
                each.process.send_signal(signal.SIGINT)
                each.process.wait()


def report(ended: Run, runs: list[Run], durations: dict, jobs: int) -> None:
    """A line on a run that has ended, with the time that the open ones will take."""
    seconds = time.monotonic() - ended.began
    durations.setdefault(ended.words[0], []).append(seconds)
    everything = np.mean([np.mean(each) for each in durations.values()])
    left = 0.0
    for each in runs:
        if each.state in ("open", "running"):
            left += np.mean(durations.get(each.words[0], everything)) / jobs
    done = sum(each.state == "finished" for each in runs)
    text = f"{done} of {len(runs)} runs, {left / 60:.0f} min left: {ended.folder} {ended.state}"
    if ended.state == "failed":
        lines = (ended.folder / "output.txt").read_text(errors="replace").split("\n")
        text += f": {[line for line in lines if line.strip()][-1]}"
    print(f"{text}, {seconds:.0f} s", flush=True)


# -- statistics -----------------------------------------------------------------------------------
def t_quantile(df: int) -> float:
    """The 97.5 % quantile of Student's t with `df` degrees of freedom."""
    # With t = sqrt(df) tan(angle), the density of the angle is proportional to cos^(df - 1).
    angle = np.linspace(-np.pi / 2, np.pi / 2, 1_000_001)
    density = np.cos(angle) ** (df - 1)
    cumulative = np.cumsum((density[1:] + density[:-1]) / 2)
    return math.sqrt(df) * math.tan(np.interp(0.975, cumulative / cumulative[-1], angle[1:]))


class Spread(NamedTuple):
    """What n values say of their mean; None where n = 1."""

    n: int
    mean: float
    error: float | None  # the standard error of the mean
    reach: float | None  # half the 95 % interval of the mean


def spread(values: list[float]) -> Spread:
    n = len(values)
    mean = float(np.mean(values))
    if n == 1:
        return Spread(n, mean, None, None)
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    return Spread(n, mean, error, t_quantile(n - 1) * error)


def paired(values: dict, reference: dict) -> Spread | None:
    """The spread of values less reference, seed by seed; None without a common seed."""
    seeds = [seed for seed in values if seed in reference]
    if not seeds:
        return None
    return spread([values[seed] - reference[seed] for seed in seeds])


# -- results --------------------------------------------------------------------------------------
def collect(arms: dict) -> tuple[dict, dict]:
    """arm -> metric -> seed -> value of the last epoch, and arm -> metric -> the best of all epochs
    and seeds, from the runs that are finished."""
    values = {}
    best = {}
    for arm, metrics in arms.items():
        values[arm] = {}
        best[arm] = {}
        for metric, sources in metrics.items():
            of_seed = {}
            highest = []
            for seed, (source, key) in sources.items():
                last = source.rows()[-1] if source.state == "finished" else {}
                if last.get(key) is not None:  # a student of unlabelled clouds has no SVM
                    of_seed[seed] = last[key]
                    highest.append(last.get(f"best_{key}", last[key]))
            if of_seed:
                values[arm][metric] = of_seed
                best[arm][metric] = max(highest)
    return values, best


def format_row(arm: str, values: dict, reference: dict, best: float) -> str:
    """A row of the table of a metric; `reference` has the values of the first arm."""
    own = spread(list(values.values()))
    cells = [arm, str(own.n), f"{own.mean:.2f}", "", "", "", f"{best:.2f}"]
    if own.error is not None:
        cells[2] += f" ± {own.error:.2f}"
    difference = paired(values, reference) if values is not reference else None
    if difference is not None:
        cells[3] = f"{difference.mean:+.2f}"
        if difference.reach is not None:
            low = difference.mean - difference.reach
            cells[4] = f"{low:+.2f} to {difference.mean + difference.reach:+.2f}"
            cells[5] = f"{difference.reach:.2f}"
    return f"| {' | '.join(cells)} |"


def write_table(config: Config, table: str, arms: dict) -> None:
    """Writes <table>.json, .md and .svg, of the runs that are finished."""
    values, best = collect(arms)
    folder = Path(config.out)
    (folder / f"{table}.json").write_text(json.dumps(values, indent=1))
    first = next(iter(arms))
    lines = [f"# {table}", ""]
    lines.append(f"`python study.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, ")
    lines.append(
        f"torch {torch.__version__}. Percent; mean ± standard error over n seeds. Beside it"
    )
    lines.append(
        f"the difference to the arm `{first}`, paired by seed, its 95 % t-interval, and the"
    )
    lines.append(
        "smallest difference that is beyond it. Last, what the best epoch on the test set of"
    )
    lines.append("the best seed would have reported; for the SVM and kNN, the best seed.")
    panels = {}
    for metric in dict.fromkeys(metric for of_arm in values.values() for metric in of_arm):
        lines += ["", f"## {metric}", ""]
        lines.append(
            f"| arm | n | mean | minus {first} | 95 % interval | least seen | best of all |"
        )
        lines.append("| --- | --- | --- | --- | --- | --- | --- |")
        panels[metric] = []
        for arm, metrics in values.items():
            if metric in metrics:
                reference = values[first].get(metric, {})
                lines.append(format_row(arm, metrics[metric], reference, best[arm][metric]))
                points = list(metrics[metric].values())
                panels[metric].append((arm, points, spread(points).reach))
    text = "\n".join(lines) + "\n"
    (folder / f"{table}.md").write_text(text)
    pictures.write_dots(folder / f"{table}.svg", panels)
    print(text)


def main(config):
    for table in config.tables:
        if table not in TABLES:
            raise act.UserError(f"expected tables of {', '.join(TABLES)}, got {table}")
    if config.seeds < 1 or config.jobs < 1:
        raise act.UserError(
            f"--seeds, --jobs: expected 1 or more, got {config.seeds}, {config.jobs}"
        )
    run.open_folder(config.out)
    plan = make_plan(config)
    runs = list(plan.runs.values())
    done = sum(each.state == "finished" for each in runs)
    print(f"{len(runs)} runs, of which {done} are finished", flush=True)
    try:
        make_runs(runs, config.jobs)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
    for table, arms in plan.values.items():
        write_table(config, table, arms)
    failed = [str(each.folder) for each in runs if each.state == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    if any(each.state != "finished" for each in runs):
        sys.exit(1)


if __name__ == "__main__":
    run.run_command(main, Config, __doc__)
