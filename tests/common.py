"""What several test files share; pytest finds it by `pythonpath` in pyproject.toml."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import act
from util import run

torch.set_num_threads(1)  # with tiny clouds threads would wait for one another
settings.register_profile("few", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("few")
ROOT = Path(__file__).resolve().parent.parent
SHORT = "--points 64 --batch-size 4 --precision fp32 --device cpu".split()
SIZES = "num_group=8 group_size=8 num_prompt=2 num_tokens=16 encoder_dims=16 tokens_dims=16"
LAUNCH = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
TEACHER = SHORT + f"--weights random --set decoder_dims=16 {SIZES}".split()  # a stage I of seconds
STUDENT = SHORT + "--set width=32 depth=2 num_heads=1 encoder_dims=32".split()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


@contextlib.contextmanager
def refused(*words):
    """Expects a ValueError (a UserError is one) whose one line holds the words."""
    with pytest.raises(ValueError) as caught:
        yield
    assert "\n" not in str(caught.value)
    for word in words:
        assert str(word) in str(caught.value)


def run_command(module, *words):
    """The main function of a command, in this process, with these words as its command line."""
    return module.main(run.parse_flags(module.Config, "", [str(word) for word in words]))


def python(*args):
    """Another process of Python -> CompletedProcess, with its output as text."""
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    return subprocess.run([sys.executable] + list(args), capture_output=True, text=True, env=env)


def interrupt(step):
    """A stand-in for run.Log.add, with Ctrl-C after so many steps."""
    add = run.Log.add

    def add_and_interrupt(log, **values):
        add(log, **values)
        if log.step == step:
            raise KeyboardInterrupt

    return add_and_interrupt


class Hostile(str):  # makes a folder of this name if it is unpickled as usual
    def __reduce__(self):
        return os.mkdir, (str(self),)


def rows_of(folder):
    """The rows of metrics.jsonl without the seconds."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    assert all(row.pop("seconds") >= 0 for row in rows)
    return rows


def checkpoint(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def same(a, b):
    """Whether nested dicts and lists of tensors are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a.dtype == b.dtype and torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_close(found, expected, rtol=1e-5, floor=0.0):
    """The largest difference is below rtol of the largest entry expected (or of `floor`)."""
    assert found.shape == expected.shape and found.isfinite().all()
    difference = (found - expected).abs().max().item()
    assert difference <= rtol * max(expected.abs().max().item(), floor), difference


def assert_equal(found, expected):
    assert same(found, expected)


def randomise(module, seed=0):
    """Parameters and statistics away from their start, no two alike."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.5
            p.add_(torch.randn(p.shape, generator=seeded(seed + i)) * scale)
        for i, (name, buffer) in enumerate(module.named_buffers()):
            if "running" in name:
                buffer.add_(torch.randn(buffer.shape, generator=seeded(seed + i)).abs() * 0.3)
    return module


def moved(before, after):
    """Names of the tensors that differ between two models."""
    after = after.state_dict()
    assert before.state_dict().keys() == after.keys()
    return {name for name, x in before.state_dict().items() if not torch.equal(x, after[name])}


BERT = {"norm_first": False, "eps": 1e-12}
CLIP = {"norm_pre": True, "quick_gelu": True, "eps": 1e-5}
BACKBONES = {"ViT": {}, "DINOv2": {"layer_scale": True}, "BERT": BERT, "CLIP": CLIP}
PATCHES = {"num_group": 10, "group_size": 8}
ENCODER = {"width": 12, "depth": 3, "num_heads": 3, "encoder_dims": 16, "drop_path": 0.0} | PATCHES
TEACHER_SIZES = PATCHES | {"num_prompt": 3, "prompt_dropout": 0.5, "num_tokens": 24}
TEACHER_SIZES |= {"encoder_dims": 16, "tokens_dims": 12, "decoder_dims": 20}
MINIMUM = {  # sizes of each kind of model
    "Teacher": TEACHER_SIZES,
    "Student": ENCODER | {"target_dim": 7},
    "Classifier": ENCODER | {"num_classes": 4},
    "Segmenter": ENCODER | {"num_parts": 5, "num_categories": 3},
}


def make(kind, **options):
    """A tiny model in eval mode, always the same."""
    torch.manual_seed(0)
    model_class, config_class = act.KINDS[kind]
    config = config_class(**MINIMUM[kind] | options)
    return randomise(model_class(config)).eval()


def make_teacher(kind="ViT", **options):
    sizes = {"width": 18, "depth": 3, "num_heads": 2, "mlp_hidden": 24}
    return make("Teacher", backbone=sizes | BACKBONES[kind], **options)
