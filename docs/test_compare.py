"""The tests of compare.py."""

import re

import compare
import pytest

import train
from test_fpnl import needs_hardware, write_slice


@pytest.mark.slow
@needs_hardware
def test_compare_prints_every_row_and_keeps_its_runs(mnist, tmp_path, monkeypatch, capsys):
    shortened = {name: (row, f"{options} --epochs 1 --reports 1") for name, (row, options) in compare.RUNS.items()}
    monkeypatch.setattr(compare, "RUNS", shortened)
    monkeypatch.setattr(compare, "SEEDS", 2)
    monkeypatch.setattr(compare, "EXPONENTS", (0, 125))
    folder = write_slice(mnist, tmp_path, 1000, 500)
    compare.compare(train.parse_args(["--data", str(folder), "--workers", "1", "--compare", str(tmp_path / "runs")]))
    printed = capsys.readouterr().out
    assert printed.count("test logits that differ between the emulation and the CPU's own flags: 0 of 5000") == 2
    rows = printed[printed.index("accuracy in percent") :].splitlines()[1:]
    assert len(rows) == len(compare.RUNS) + 3
    assert all(re.search(r"\d+\.\d\d ± +\d+\.\d\d +\d+\.\d\d ± +\d+\.\d\d", row) for row in rows)
    files = {path.name for path in (tmp_path / "runs").iterdir()}
    ends = [f"-{seed}.{end}" for seed in (0, 1) for end in ("csv", "npz")]
    assert files == {name + end for name in shortened for end in ends} | {"scale-0.csv", "scale-1.csv"}
