"""bench.py: every part runs, and says so where results differ."""

import pytest

import act
import bench
from common import randn, run_command


def test_every_part_runs_and_one_whose_results_differ_ends_alone(monkeypatch, capsys):
    run_command(bench, "--quick", "--part", "geometry")
    wrong = act.knn(randn(2, 16, 3), randn(2, 256, 3, seed=1), 1)
    monkeypatch.setattr(bench.plain, "stable_knn", lambda query, xyz, k: wrong)
    with pytest.raises(SystemExit, match="failed: geometry$"):
        run_command(bench, "--quick")
    rows = capsys.readouterr().out
    for words in ("gradients ±", "kNN (2, 16 of 256)", "cuboid in 5318", "stage-II step", "eager"):
        assert words in rows
    monkeypatch.setattr(bench, "COMMANDS", ["train_teacher.py --steps none"])
    with pytest.raises(SystemExit, match="failed: commands$"):
        run_command(bench, "--part", "commands")
