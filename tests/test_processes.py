"""Several processes, as torchrun starts them: two do what one does with the whole batch."""

import functools
import importlib.util
import shutil
import sys
import time
import zlib
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector

import act
import common
import detect
import finetune
import segment
import train_student
import train_teacher
from common import assert_close, checkpoint, randn, refused, rows_of, same
from util import datasets, processes, run, synthetic
from util.datasets import Dataset

RUNS = {  # name -> command, flags; the stages go on from the runs of conftest.py, for a step
    "teacher": (train_teacher, common.TEACHER, "--data {0[0]} --resume --steps 5"),
    "student": (train_student, common.STUDENT, "--data {0[0]} --teacher {0[1]} --resume --steps 3"),
    "classify": (finetune, common.SHORT, "--data {0[0]} --checkpoint {0[2]} --steps 1"),
    "parts": (segment, common.SHORT, "--task parts --checkpoint {0[2]} --steps 1"),
    "scene": (segment, common.SHORT, "--task scene --checkpoint {0[2]} --steps 1"),
    "detect": (detect, common.SHORT, "--points 256 --checkpoint {0[2]} --steps 1"),
}
if importlib.util.find_spec("scipy") is None:
    del RUNS["detect"]
PARTS = synthetic.compositions(synthetic.synthetic_clouds(2, num_points=64)).select(range(6))
ROOMS = [synthetic.synthetic_room(1, i, 50) for i in range(5)]
SCANS = datasets.synthetic_scenes(1, 5, 2000)
DATA = {
    "open_parts": lambda *_: Dataset("parts", PARTS, PARTS.select([0])),
    "open_rooms": lambda *_: Dataset("rooms", ROOMS[:4], ROOMS[4:], synthetic.ROOM_CLASSES),
    "open_scans": lambda *_: Dataset("scans", SCANS[:4], SCANS[4:], synthetic.ROOM_CLASSES[3:]),
}


def train(name, folder, sources, *more):
    """The gradient of a run's last step, without noise, after which all have the same weights."""
    command, flags, words = RUNS[name]
    words = flags + words.format(sources).split() + list(more)
    with (
        mock.patch.multiple(datasets, **DATA),
        mock.patch.object(F, "dropout", lambda x, *options: x),
        mock.patch.object(F, "gumbel_softmax", lambda x, tau, hard, dim: (x / tau).softmax(dim)),
        mock.patch.object(act.Block, "drop_path", lambda block, x: x),
        mock.patch.object(processes, "parallel", wraps=processes.parallel) as parallel,
    ):
        common.run_command(command, *words, "--out", folder / name)
    trained = [p for p in parallel.call_args.args[0].parameters() if p.requires_grad]
    processes.agree(zlib.crc32(parameters_to_vector(trained).detach().numpy()), "weights")
    return parameters_to_vector([p.grad for p in trained])


def share_work(folder):
    center = randn(6, 20, 3)
    mask = act.block_mask(processes.share(center), 0.6, common.seeded(), processes.SHARE)
    assert same(mask, processes.share(act.block_mask(center, 0.6, common.seeded())))
    assert processes.gather([10 * i for i in processes.share(range(5))]) == [0, 10, 20, 30, 40]
    with refused("a failed download"), processes.first_process():  # both are let in all the same
        assert (folder / "mark").exists() == (processes.RANK == 1)
        time.sleep(0.5)
        (folder / "mark").touch()
        raise act.UserError("a failed download")


def compile_blocks():
    """Six drop rates, in blocks too wide for DDP's first bucket, in no more than four graphs."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = 4
    sizes = act.StudentConfig(8, 8, width=192, depth=6, num_heads=3, encoder_dims=32, drop_path=0.2)
    compile = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    with mock.patch.object(act.Block, "compile", compile):
        net = processes.parallel(act.Student(sizes), run.RunConfig(compile=True))
    for step in range(3):
        neighborhood, center = act.group_points(randn(2, 64, 3, seed=step), 8, 8)
        net(neighborhood, center, act.random_mask(center, 0.5)).square().mean().backward()


def test_two_processes_do_the_work_of_one(tmp_path, shapes, teacher_run, student_run):
    sources = [str(shapes), f"{teacher_run}/last.pt", f"{student_run}/last.pt"]
    for folder, launch in [("one", []), ("two", common.LAUNCH)]:
        shutil.copytree(teacher_run, tmp_path / folder / "teacher")
        shutil.copytree(student_run, tmp_path / folder / "student")
        done = common.python(*launch, __file__, str(tmp_path / folder), *sources)
        assert done.returncode == 0, done.stderr
    for name in RUNS:
        one, two = [torch.load(tmp_path / f"{folder}/{name}-0") for folder in ("one", "two")]
        assert (one - two).norm() < 1e-9 * one.norm(), name
        expected, found = [checkpoint(tmp_path / folder / name) for folder in ("one", "two")]
        for key, value in expected["model"].items():
            if "running" in key or "tracked" in key:
                assert_close(found["model"][key], value)
    for name in ("teacher", "student"):
        train(name, tmp_path / "two", sources, "--steps", "6")
        assert rows_of(tmp_path / "two" / name)[-1]["step"] == 6


def test_the_variables_of_torchrun_count_together_or_not_at_all():
    full = dict(RANK="1", WORLD_SIZE="3", LOCAL_RANK="0", MASTER_ADDR="host", MASTER_PORT="1")
    assert processes.read_variables(full) == (1, 3)
    assert processes.read_variables(full | dict(RANK="", WORLD_SIZE="")) == (0, 1)
    for name, value in [("RANK", "3"), ("RANK", ""), ("WORLD_SIZE", "a"), ("MASTER_ADDR", "")]:
        with refused("MASTER_ADDR", f"{name}={value}"):
            processes.read_variables(full | {name: value})


if __name__ == "__main__":
    processes.join(torch.device("cpu"))
    share_work(Path(sys.argv[1]))
    compile_blocks()
    # In float32 the nearest of two points may be another one with the order of the batch.
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    for name in RUNS:
        gradient = train(name, Path(sys.argv[1]), sys.argv[2:])
        torch.save(gradient, Path(sys.argv[1], f"{name}-{processes.RANK}"))
