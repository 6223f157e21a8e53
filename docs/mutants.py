#!/usr/bin/env python3
"""Mutants: each operator, number, comparison and decorator of a function changed, by cosmic-ray; does a test notice?

    pip install cosmic-ray
    python docs/mutants.py                      # all that is listed below, on all cores: hours
    python docs/mutants.py es_slopes adamw      # of these functions

For each function: how many mutants there are, how many of them a test has killed, and the changes of those that live.
"""

import argparse
import collections
import concurrent.futures
import functools
import pathlib
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data

ARITHMETIC = "flush add subtract multiply divide _flushed"
NETWORK = "forward activations cross_entropy init"
ES = "es_gradient_plain mutation_signs _dead_zone _blocks _member_losses es_slopes es_gradient"
ES += " mapped _work _of_layers _in_order"
STEP = "zeros fresh steps losses_of es thinned thinned_gradient score look"
OF_ES = "members or slopes or losses or layer or variate or signs or maps or cut or input_of_zero or dead_zone"
OF_ES += " or of_its_thread or fast_path or memory_stays or passes or refused or bad_argument or unknown_platform"
OF_STEP = "dropout_is or measured_with or adamw or loss_of_the or reports or option_reaches or untrained"
OF_STEP += " or same_seed or falls_apart"
FPNL = "test_fpnl.py tests/test_arguments.py -k"
GROUPS = [  # module, functions, and the tests that concern them, the quickest first
    ("fpnl.py", ARITHMETIC, f"{FPNL} 'golden or flush or bits or gpu'"),
    ("fpnl.py", NETWORK, f"{FPNL} 'forward or entropy or logits or transfer or init or analytic or bad_argument'"),
    ("fpnl.py", ES, f"{FPNL} '{OF_ES}'"),
    ("fpnl.py", "adamw leaves", f"{FPNL} 'adamw'"),
    ("train.py", STEP, f"examples/test_controls.py tests/test_train.py -k '{OF_STEP}'"),
]
CONFIG = """
[cosmic-ray]
module-path = "{module}"
timeout = 600.0
excluded-modules = []
test-command = "{python} -m pytest -x -q -p no:cacheprovider {tests}"
[cosmic-ray.distributor]
name = "local"
"""


def outcomes(module, functions, tests, share, shares):
    """Of every so-manieth mutant of the functions: (function, outcome, change)."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(ROOT, pathlib.Path(folder) / "copy", ignore=shutil.ignore_patterns(".*", "runs"))
        config, session = pathlib.Path(folder) / "config.toml", pathlib.Path(folder) / "session.sqlite"
        config.write_text(CONFIG.format(module=module, python=sys.executable, tests=tests), "utf-8")
        cosmic_ray = functools.partial(subprocess.run, cwd=copy, check=True, stdout=subprocess.DEVNULL)
        cosmic_ray(["cosmic-ray", "init", config, session])
        with sqlite3.connect(session) as database:
            specs = database.execute("SELECT job_id, definition_name FROM mutation_specs ORDER BY rowid").fetchall()
            mine = [job for job, name in specs if name in functions]
            others = {job for job, _ in specs} - {*mine[share::shares]}
            for table in ("mutation_specs", "work_items"):
                database.executemany(f"DELETE FROM {table} WHERE job_id = ?", [(job,) for job in others])
        cosmic_ray(["cosmic-ray", "exec", config, session])
        with sqlite3.connect(session) as database:
            columns = "definition_name, test_outcome, diff"
            return database.execute(f"SELECT {columns} FROM mutation_specs JOIN work_results USING (job_id)").fetchall()


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("functions", nargs="*", help="of these alone")
    args, shares = parser.parse_args(), data.cores()
    with concurrent.futures.ThreadPoolExecutor(shares) as pool:
        for module, listed, tests in GROUPS:
            functions = [name for name in listed.split() if name in (args.functions or listed.split())]
            if not functions:
                continue
            count, killed, living = collections.Counter(), collections.Counter(), collections.defaultdict(list)
            tasks = [pool.submit(outcomes, module, functions, tests, share, shares) for share in range(shares)]
            for function, outcome, change in (row for task in tasks for row in task.result()):
                count[function] += 1
                killed[function] += outcome == "KILLED"
                if outcome != "KILLED":
                    living[function] += re.findall(r"^[+-](?![+-]).*", change, re.MULTILINE)
            for function in functions:
                print(f"{module} {function}: {count[function]} mutants, {killed[function]} killed", flush=True)
                print(*living[function], sep="\n", end="\n" * bool(living[function]))


if __name__ == "__main__":
    main()
