"""train.py: the options of a run, its steps, its reports, what computes it, and what the command refuses.

What becomes of files is in test_data.py; signals, streams, terminals and disks are in test_users.py.
"""

import errno
import functools
import json
import logging
import os
import pathlib
import platform
import re
import select
import signal
import sys
import time

import helpers
import numpy as np
import pytest
from helpers import RNG, accuracy, assert_same_bits, assert_same_run, needs_mpi, result, run, saved, slow

import data
import fpnl
import train


@pytest.fixture(scope="session")
def digits(mnist, tmp_path_factory):
    """2,000 training and 500 test images of MNIST, as files."""
    return helpers.write_slice(mnist, tmp_path_factory.mktemp("digits"), 2000, 500)


def assert_refused(called, says):
    """The command has ended in one line, given as a regular expression, and has printed nothing else."""
    status, out, errors = called
    assert (status, out) == (2, "") and re.fullmatch(f"train.py: error: {says}\n", errors), errors


@slow
def test_the_command_learns_what_no_linear_model_does(slice_of_mnist, tmp_path):
    """The same run without the flush is one, and so are the same weights: it is the underflow."""
    path, held, labels = tmp_path / "w.npz", *data.load(slice_of_mnist)[2:]
    options = ["--data", slice_of_mnist, *"--epochs 6 --batch 256 --lr 3e-3 --block 8 --reports 1 --save".split(), path]
    linear, (trained, tested) = (result(run(*options, "--flush", how)) for how in ("off", "emulated"))
    assert linear[1] > 0.87 and trained > linear[0] + 0.01 and tested > linear[1] + 0.01
    params, _ = data.load_weights(path)
    assert [W.shape for W, _ in params] == [(784, 512), (512, 512), (512, 10)]
    assert [b.any() for _, b in params] == [True, False, False]
    of_flush, of_none = (accuracy(fpnl.forward(params, data.pixels(held), ftz), labels) for ftz in (True, False))
    assert of_flush == pytest.approx(tested, abs=5e-5) and of_none < linear[1]


# --- The loop ------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_run(digits):
    """A run that has not begun, of a network whose probabilities are large and small; its weights stay as they are."""
    options = "--hidden 24 16 --batch 200 --importance 0.3 --epochs 15 --lr 3e-3 --weight-decay 0.5"
    run = train.begin(train.parse_args(["--data", str(digits), *options.split()]))
    for W, _ in run.params:
        W *= np.float32(2)
    run.update = lambda *_, **__: None
    return run


def test_an_image_is_measured_with_a_probability_and_counts_the_more(tiny_run):
    """min(1, max(least, N (1 - p))), here in float64; its weight is 1 / (q batch), and none is measured twice."""
    images, labels, *_ = tiny_run.sets
    p = np.exp(fpnl.forward(tiny_run.params, data.pixels(images)).astype(float))
    p, least, given = p[np.arange(len(labels)), labels] / p.sum(axis=1), tiny_run.settings.least, []
    q = np.clip(0.3 * (1 - p), least, 1)
    assert np.mean(q == least) > 0.03 and np.mean(q > 0.25) > 0.3

    def gradient(params, x, y, rng, weights, return_losses):
        given.append((x, y, weights))
        return train.zeros(params), np.zeros(len(y))

    tiny_run.gradient, counts = gradient, np.zeros(len(labels))
    rows = {row.tobytes(): i for i, row in enumerate(data.pixels(images))}
    for step, loss in enumerate(train.steps(tiny_run)):
        epoch, place = divmod(step, 10)
        batch = RNG((0, train.ORDER, epoch)).permutation(len(labels))[200 * place :][:200]
        assert loss == pytest.approx(-np.log(p[batch]).mean(), rel=1e-4)
        x, y, weights = given.pop()
        drawn = np.array([rows[row.tobytes()] for row in x])
        assert len({*drawn}) == len(drawn) and {*drawn} <= {*batch} and weights.dtype == np.float32
        np.testing.assert_array_equal(y, labels[drawn])
        np.testing.assert_allclose(weights, 1 / (200 * q[drawn]), rtol=1e-4)
        counts[drawn] += step < 150
    assert (step, tiny_run.step) == (150, 150)
    assert abs(counts.sum() - 15 * q.sum()) < 5 * np.sqrt(15 * np.sum(q * (1 - q)))
    often = q > np.median(q)
    assert counts[often].sum() / counts.sum() == pytest.approx(q[often].sum() / q.sum(), abs=0.03)


def test_without_importance_all_images_are_measured_and_es_tells_the_loss(tiny_run):
    tiny_run.settings.importance, tiny_run.outputs, es, weights = 0.0, None, tiny_run.gradient, []
    tiny_run.gradient = lambda *rows, **how: weights.append(how["weights"]) or es(*rows, **how)
    batch = RNG((0, train.ORDER, 0)).permutation(2000)[:200]
    logits = fpnl.forward(tiny_run.params, data.pixels(tiny_run.sets[0][batch]))
    expected = fpnl.cross_entropy(logits, tiny_run.sets[1][batch]).mean()
    assert next(train.steps(tiny_run)) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(weights, np.full((1, 200), 1 / 200), rtol=1e-6)


def test_a_step_in_which_nothing_is_drawn_is_a_step_of_adamw(tiny_run):
    """With a gradient of zeros, as to skip it would be a bias; at a rate that falls to zero as a cosine."""
    tiny_run.settings.importance, tiny_run.settings.least, tiny_run.gradient, updates = 1e-9, 0.0, None, []
    tiny_run.update = lambda *step, **_: updates.append(step)
    assert all(loss > 0 for loss in train.steps(tiny_run)) and len(updates) == 150
    for i, (params, grads, m, v, step, lr, decay) in enumerate(updates):
        assert (params, m, v, step, decay) == (tiny_run.params, tiny_run.m, tiny_run.v, i + 1, 0.5)
        assert lr == pytest.approx(3e-3 * np.cos(np.pi * i / 300) ** 2)
        assert_same_bits(grads, train.zeros(params))


def test_the_loss_of_the_weights_is_told_before_they_change(tiny_run):
    """Who stops there has the weights whose loss it was, and can go on as if there had been no stop."""
    tiny_run.update, before = fpnl.adamw, [a.copy() for a in fpnl.leaves(tiny_run.params)]
    loss, steps = next(train.steps(tiny_run)), train.steps(tiny_run)
    assert next(steps) == loss and tiny_run.step == 0
    assert_same_bits(tiny_run.params, before)
    assert next(steps) != loss and tiny_run.step == 1
    assert not np.array_equal(before[0], tiny_run.params[0][0])


# --- A run: its start, its reports ---------------------------------------------------------------------

# Of each that decides the weights, a value that it does not have by default.
OTHER = {"validation": "60", "hidden": "23 24", "epochs": "0.2", "batch": "50", "sigma": "0.03", "block": "9"}
OTHER |= {"control_variate": "", "importance": "0.6", "lr": "3e-3", "weight_decay": "0.5", "beta2": "0.9"}
OTHER |= {"dropout": "0.2", "smoothing": "0.1", "seed": "4", "flush": "off"}


@pytest.mark.parametrize("name", [*train.OPTIONS, "flush"])
def test_an_option_reaches_the_run_and_is_fixed_from_then_on(small, tmp_path, call, name):
    """It need not be given again to --resume, which refuses another by name."""
    option = f"--{name.replace('_', '-')} {OTHER[name]}".split()
    default, other, again = (tmp_path / name for name in ("default.npz", "other.npz", "again.npz"))
    three_steps, resume = [*small, "--epochs", 0.1, "--save"], ["--data", small[1], "--resume"]
    assert call(*three_steps, default)[0] == call(*three_steps, other, *option)[0] == 0
    assert not np.array_equal(saved(other)["W1"], saved(default)["W1"])
    assert call(*resume, other, "--save", again)[0] == 0
    assert_same_run(again, other)
    expected = re.escape(str(json.loads(str(saved(default)["settings"]))[name]))
    says = f"{option[0]}: expected {expected} as in {default}, found .*: it is fixed"
    assert_refused(call(*resume, default, *option), says)
    assert call(*resume, default, "--flush", "emulated", "--workers", 1)[0] == 0  # which decide nothing


def test_beta2_is_that_of_adamw(small, tmp_path, call):
    """After one step, m is a tenth of the gradient, and v a share of 1 - beta2 of its square."""
    call(*small, "--epochs", 1 / 30, "--beta2", 0.75, "--save", tmp_path / "w.npz")
    arrays = saved(tmp_path / "w.npz")
    assert arrays["step"] == 1 and arrays["mW2"].any()
    np.testing.assert_allclose(arrays["vW2"], 0.25 * (10 * arrays["mW2"]) ** 2, rtol=1e-5)


def test_resume_refuses_other_data_versions_and_networks_by_name(small, tmp_path, call):
    path, resume = tmp_path / "w.npz", ["--data", small[1], "--resume", tmp_path / "w.npz"]
    call(*small, "--epochs", 1, "--save", path)
    good, refused = saved(path), f"as in {path}, found .*: it is fixed"
    assert_refused(call(*resume, "--data", data.MNIST), rf"--data: expected \d+ {refused}")
    assert_refused(call(*resume, "--preset", "best"), f"--epochs: expected 1.0 {refused}")
    for name, value in {**dict.fromkeys(train.FIXED, 0.5), "method": "backprop", "network": "tanh"}.items():
        np.savez(path, **good | {"settings": json.dumps(json.loads(str(good["settings"])) | {name: value})})
        assert_refused(call(*resume), f"{name}: expected {value} {refused}")
    run = train.begin(train.parse_args([*map(str, resume)]), transfer=np.tanh)
    assert run.settings.network == "tanh" and run.step == 30
    says = f"{path}: expected weights of fpnl's network, found one with tanh"
    assert_refused(call("--data", small[1], "--evaluate", path), says)


def test_reports_and_validation(digits):
    options = ["--data", digits, *"--validation 500 --epochs 0.2 --batch 50 --reports 3".split()]
    done, quiet = run(*options), run(*options, "--quiet")
    title, header, *rows, last = done.stdout.splitlines()
    assert "784-512-512-10" in title and "669,706 weights" in title and "1,500 images" in title
    assert header.split() == ["epoch", "seconds", "loss", "train", "validation", "live", "units", "left"]
    assert [row.split()[0] for row in rows] == ["0.00", "0.07", "0.13", "0.20"]
    columns = r" *\d+\.\d\d +\d+\.\d +\d+\.\d{4}  0\.\d{4} +0\.\d{4}   0\.\d\d 0\.\d\d 0\.\d\d +(\d+ s|\?)"
    assert all(re.fullmatch(columns, row) for row in rows)
    assert last.startswith("result: train ") and " validation " in last
    assert quiet.stdout.count("\n") == 1 and result(quiet) == result(done)


def test_until_test_stops_at_the_first_report_over_the_mark(digits, tmp_path, call):
    log = tmp_path / "w.csv"
    command = ["--data", digits, *"--hidden 24 24 --batch 100 --epochs 2 --reports 5 --log".split(), log]
    call(*command)
    scores = [row[4] for row in helpers.log_of(log)[1]]
    first = next(i for i, score in enumerate(scores) if score >= scores[3])
    done = run(*command, "--until-test", scores[3], "--quiet")
    assert [row[4] for row in helpers.log_of(log)[1]] == scores[: first + 1] and first > 0
    assert result(done)[1] == pytest.approx(scores[first], abs=5e-5)
    done = run(*command, "--epochs", 1.5, "--reports", 1, "--until-test", 1, check=False)
    assert len(helpers.log_of(log)[1]) == 4  # twice an epoch, and to the end
    assert done.returncode == 1 and re.fullmatch(r"train.py: the accuracy ended at 0\.\d{4}, below 1\.0\n", done.stderr)


@pytest.mark.filterwarnings("error")  # NumPy warns of nothing
@pytest.mark.parametrize("lr", [0.3, 1, 1e9, 1e38])
@pytest.mark.parametrize("importance", [2, 0])
def test_a_run_that_falls_apart_says_so_and_keeps_the_last_good_state(small, tmp_path, call, lr, importance):
    options = ["--lr", lr, "--importance", importance, "--reports", 600, "--save", tmp_path / "w.npz"]
    status, _, errors = call(*small, *options)
    says = r"train.py: error: diverged: the loss is ([\d.]+(?:e\+\d+)?|inf|nan) after (\d+) steps: try a smaller --lr\n"
    assert status == 2 and (found := re.fullmatch(says, errors)), errors
    params, others = data.load_weights(tmp_path / "w.npz")
    x, labels, *_ = data.load(small[1])
    assert others["step"] == int(found[2]) - 1 == (lr == 0.3)
    assert fpnl.cross_entropy(fpnl.forward(params, data.pixels(x)), labels).mean() < 10 * np.log(10)


# --- What computes -------------------------------------------------------------------------------------

SHORT = "--epochs 0.8 --batch 300 --seed 3 --importance 0.5 --flush emulated --reports 1".split()
ODD = [*SHORT, *"--hidden 33 17 11 --batch 301 --smoothing 0.1 --control-variate --importance 0".split()]
DROPOUT = [*SHORT, *"--hidden 65 33 --batch 301 --dropout 0.1".split()]
all_runs = pytest.mark.parametrize("settings", [SHORT, ODD, DROPOUT], ids=["512-512", "33-17-11", "dropout"])


@functools.cache
def alone(folder, *options):
    """The file after a run by one worker."""
    path = folder / f"{len([*folder.iterdir()])}.npz"
    run("--data", folder, "--workers", 1, *options, "--save", path)
    return path


@all_runs
@pytest.mark.parametrize(
    ("program", "options"),
    [
        (helpers.TRAIN, "--workers 2"),
        *(pytest.param(helpers.TRAIN, f"--workers {n}", marks=slow) for n in (3, 7)),
        pytest.param(helpers.TRAIN, "--workers 1 --flush hardware", marks=helpers.needs_hardware),
        *(pytest.param(*engine.values, "", marks=engine.marks) for engine in helpers.ENGINES),
    ],
)
def test_same_seed_same_weights_whoever_computes_them(digits, tmp_path, settings, program, options):
    """At the size of the main job and at odd ones, whose tasks, pieces, masks and blocks do not come out even."""
    done = run("--data", digits, *settings, *options.split(), "--save", tmp_path / "w.npz", program=program)
    assert program is helpers.TRAIN or "2 workers" in done.stdout
    assert_same_run(tmp_path / "w.npz", alone(digits, *settings))


@all_runs
def test_same_seed_same_weights_after_kill_9(digits, tmp_path, call, settings):
    code = """
import os, sys, data, train
save = data.save_weights
data.save_weights = lambda *args, **how: (save(*args, **how), how["step"] == 2 and os.kill(os.getpid(), 9))
train.main(sys.argv[1:])
"""
    path, options = tmp_path / "w.npz", ["--data", digits, *settings, "--reports", 5, "--save"]
    killed = helpers.run_program(tmp_path, code, *options, path, check=False)
    assert killed.returncode == -signal.SIGKILL and saved(path)["step"] == 2
    assert call("--data", digits, "--resume", path, "--save", path)[0] == 0
    assert_same_run(path, alone(digits, *settings))


def test_blas_has_one_thread_in_runs_and_as_many_as_before_after_them(digits, tmp_path):
    """Other numbers of threads give other bits, silently, so the library is asked: a variable that is set after NumPy
    was imported has no effect. Also in runs at the same time in threads, which do not meet."""
    code = """
import numpy, concurrent.futures, importlib, runpy, sys, train

def trained(seed, name, workers):
    train.main([*sys.argv[1:], name, "--seed", seed, "--workers", workers])

get, limit = train.blas()
limit(3)
with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(trained, "343", ("one", "other", "same"), "221"))
importlib.reload(train)
trained("3", "reload", "2")
sys.argv.append("run_path")
runpy.run_path(train.__file__, run_name="__main__")
print(get())
"""
    done = helpers.run_program(tmp_path, code, "--data", digits, *SHORT, "--quiet", "--save")
    assert done.stdout.splitlines()[-1] == "3"
    assert_same_run(tmp_path / "other", alone(digits, *SHORT, "--seed", 4))
    for name in ("one", "same", "reload", "run_path"):
        assert_same_run(tmp_path / name, alone(digits, *SHORT))


NOBODY = type("ctypes", (), {"CDLL": lambda name: None})  # with what is to be asked
MORE = "train.py: error: expected threadpoolctl, or train.py imported before NumPy: more BLAS threads, other bits\n"


@pytest.mark.parametrize(("first", "ended"), [(True, (2, MORE, False, False)), (False, (0, "", True, True))])
def test_where_nobody_knows_blas_numpy_must_not_be_first(small, tmp_path, monkeypatch, call, first, ended):
    """One line says what to do, and nothing is run; a command that came before NumPy has nothing to ask."""
    monkeypatch.setattr(train, "ctypes", NOBODY)
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    monkeypatch.setattr(train, "NUMPY_WAS_FIRST", first)
    status, out, errors = call(*small, "--epochs", 0, "--save", tmp_path / "w.npz")
    assert (status, errors, "result: " in out, (tmp_path / "w.npz").exists()) == ended


def test_another_blas_is_asked_by_threadpoolctl(monkeypatch):
    pytest.importorskip("threadpoolctl")
    get, _ = train.blas()
    before = get()
    monkeypatch.setattr(train, "ctypes", NOBODY)
    its_get, its_limit = train.blas()
    for n in (2, 1, before):
        its_limit(n)
        assert its_get() == get() == n


def test_the_error_of_a_worker_is_told(small, call, monkeypatch):
    monkeypatch.setattr(fpnl, "es_slopes", lambda **task: int("a worker"))
    status, _, errors = call(*small, "--workers", 3)
    assert (status, errors) == (2, "train.py: error: invalid literal for int() with base 10: 'a worker'\n")


def test_a_worker_with_other_bits_is_named_once(capsys):
    """In the results of the first call of the map, and by one bit."""
    params, x, labels = helpers.example(n=9)

    def others(work, lists):
        found = [*map(work, lists)]
        found[1][1][0][1][0].view(np.uint32)[0, 0] ^= 1  # of the slopes of its first task
        return found

    says = f"worker {platform.node()} computes other bits than this process: so will the weights be\n"
    for its_map, expected in ((train.compared(map), ""), (train.compared(others), says)):
        for _ in range(2):
            fpnl.es_gradient(params, x, labels, RNG(0), task=2, workers=3, map_tasks=its_map)
        assert capsys.readouterr().err == expected


INSTALL = r"broken: pip install it \(mpi4py mpich for --engine mpi, distributed for dask\), also where workers are"
NO_DASK = "dask --scheduler tcp://127.0.0.1:9"


@pytest.mark.parametrize(
    ("broken", "engine", "says"),
    [
        ("mpi4py", "mpi", INSTALL),
        ("distributed", "dask", INSTALL),
        pytest.param("nothing", "mpi", "--engine mpi: expected workers: mpiexec -n 3 python -m .*", marks=needs_mpi),
        pytest.param("nothing", NO_DASK, "Timed out trying to connect to tcp.*", marks=[helpers.needs_dask, slow]),
    ],
)
def test_an_engine_that_is_not_there_ends_in_one_line(small, tmp_path, broken, engine, says):
    (tmp_path / f"{broken}.py").write_text("raise ImportError('broken')")
    done = run(*small, "--engine", *engine.split(), check=False, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert_refused((done.returncode, done.stdout, done.stderr), says)


@slow
@needs_mpi
def test_workers_of_mpi_need_fpnl_and_nothing_else(digits, tmp_path):
    """Of the project; as those of a dask that is there already."""
    code = """
import sys, train
args = train.parse_args(sys.argv[1:])
with train.engine(args) as (_, map_tasks, workers, lists):
    list(zip("ab", train.steps(train.begin(args), map_tasks=map_tasks, workers=lists)))
    print(*map_tasks(eval, ["{*__import__('sys').modules} & {'data', 'fpnl', 'mine', 'train'}"] * 9))
"""
    done = helpers.run_program(tmp_path, code, "--engine", "mpi", "--data", digits, program=helpers.WITH_MPI)
    assert done.stdout == " ".join(["{'fpnl'}"] * 9) + "\n"


@slow
def test_a_dask_that_is_there_already(digits, tmp_path, call):
    distributed = pytest.importorskip("distributed")
    how = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**how) as cluster, distributed.Client(cluster) as client:
        options = ["--engine", "dask", "--scheduler", cluster.scheduler_address, "--save", tmp_path / "w.npz"]
        assert "2 workers" in call("--data", digits, *SHORT, *options)[1]
        found = client.run(lambda: {*sys.modules} & {"data", "fpnl", "train"})
    assert [*found.values()] == [{"fpnl"}] * 2
    assert_same_run(tmp_path / "w.npz", alone(digits, *SHORT))


@slow
def test_workers_of_a_dask_of_its_own_say_nothing(capfd):
    """As of a heartbeat that comes when the scheduler has gone."""
    distributed = pytest.importorskip("distributed")
    with train.engine(train.parse_args("--engine dask --workers 1".split())):
        distributed.get_client().run(lambda: logging.getLogger("distributed.worker").error("heartbeat"))
    assert capfd.readouterr() == ("", "")


linux = pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")


@linux
@pytest.mark.parametrize("engine", helpers.ENGINES)
def test_a_worker_is_killed(digits, tmp_path, call, engine):
    """dask computes again what it had; MPI ends, and its checkpoint resumes."""
    steps, path = "--batch 500 --epochs 2.75 --reports 11".split(), tmp_path / "w.npz"
    child = helpers.start("--data", digits, *steps, "--save", path, program=engine, lines=6)
    commands = {pid: pathlib.Path(f"/proc/{pid}/cmdline").read_bytes() for pid in [*helpers.family(child.pid)][1:]}
    worker = b"spawn_main" if engine is helpers.DASK else b"mpi4py.futures"
    os.kill([pid for pid, text in commands.items() if worker in text and b"hydra" not in text][-1], signal.SIGKILL)
    out, errors = child.communicate(timeout=120)
    if engine is helpers.DASK:
        assert child.returncode == 0 and "Restarting worker" in errors, errors
    else:
        assert child.returncode and "BAD TERMINATION" in out + errors and "result: " not in out  # says mpiexec
        assert 0 <= saved(path)["step"] < 11
        assert call("--data", digits, "--resume", path, "--save", path)[0] == 0
    assert_same_run(path, alone(digits, *steps))


@linux
@pytest.mark.parametrize("engine", helpers.ENGINES)
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_the_terminal_of_workers_elsewhere(slice_of_mnist, tmp_path, engine, times):
    """It is sent to all the processes of the run, and all end: after one, as with other engines. A second is MPI's."""
    path, options = tmp_path / "w.npz", "--batch 512 --epochs 30 --reports 570 --save".split()
    how = {"program": engine, "start_new_session": True, "lines": 6 - 2 * times}
    child = helpers.start("--data", slice_of_mnist, *(options if times == 1 else helpers.ENDLESS), path, **how)
    processes = [os.pidfd_open(pid) for pid in helpers.family(child.pid)]
    for seconds in range(times):
        time.sleep(seconds)  # two signals that wait at once are one
        os.killpg(child.pid, signal.SIGINT)
    out, errors = child.communicate(timeout=60)
    assert len(processes) > 2 and "Traceback" not in errors, errors
    if times == 1:
        step = int(saved(path)["step"])
        assert child.returncode == 130 and step > 0
        assert f"train.py: interrupted after step {step} of 570; go on with --resume {path}\n" in errors
    else:
        assert child.returncode or engine is helpers.MPI  # whose mpiexec may fail at that, and say 0
        assert "result: " not in out and not path.exists()
    for process in processes:
        assert select.select([process], [], [], 60)[0]  # it has ended
        os.close(process)


# --- Files ---------------------------------------------------------------------------------------------


def test_an_untrained_network_is_evaluated_and_predicts(digits, tmp_path, call):
    """From its file, and from one that has its weights alone."""
    path, sets, params = tmp_path / "w.npz", data.load(digits), fpnl.init(RNG((7, train.INIT)), (784, 24, 24, 10))
    done = run("--data", digits, *"--epochs 0 --seed 7 --hidden 24 24 --save".split(), path)
    assert_same_bits(data.load_weights(path)[0], params)
    of_train, expected = (fpnl.forward(params, data.pixels(x)).argmax(axis=1) for x in sets[::2])
    right = expected == sets[3]
    assert result(done) == pytest.approx([np.mean(of_train == sets[1]), np.mean(right)], abs=5.1e-5)
    header, *table, last = call("--data", digits, "--evaluate", path)[1].splitlines()
    assert header.split("\t") == ["label", *map(str, range(10)), "recall"]
    assert last == f"result: test {np.mean(right):.4f}"
    for label, row in enumerate(table):
        counts = np.bincount(expected[sets[3] == label], minlength=10)
        assert row.split("\t") == [*map(str, [label, *counts]), f"{np.mean(right[sets[3] == label]):.4f}"]
    np.savez(path, **{name: a for name, a in saved(path).items() if name[0] in "Wb"})
    predicted = call("--evaluate", path, "--predict", digits / "t10k-images-idx3-ubyte")
    assert predicted == (0, "".join(f"{label}\n" for label in expected), "")


def test_predict_takes_the_pixels_of_the_training(small, tmp_path, call):
    call(*small, "--epochs", 0, "--save", tmp_path / "w.npz")

    def predicted(content, code=0x0D):
        (tmp_path / "images").write_bytes(helpers.idx(content, code))
        return call("--evaluate", tmp_path / "w.npz", "--predict", tmp_path / "images")

    images = RNG(0).integers(0, 256, (5, 4, 5))
    expected = predicted(images, 0x08)
    assert expected[0] == 0 and len(expected[1].split()) == 5
    assert predicted(images / np.float32(255)) == expected
    for bad, found in ((images, "0.0 to 2.*"), (-images / 255, "-1.0 to -?0.0"), (images / 255 * np.nan, "nan to nan")):
        assert_refused(predicted(bad), rf"{tmp_path}/images: expected float pixels in \[0, 1\], found {found}")
    assert predicted(images[:0]) == predicted(images[:0], 0x08) == (0, "", "")
    assert_refused(predicted(np.zeros((0, 3, 3))), f"{tmp_path}/w.npz: expected weights for 9 pixels, found 20")


# --- The command ---------------------------------------------------------------------------------------


def test_a_preset_is_a_set_of_defaults():
    chosen, every = train.PRESETS["best"], [["--preset", "best"], ["--preset", "best", "--epochs", "0.5"], []]
    preset, but_epochs, plain = ({name: vars(train.parse_args(argv))[name] for name in chosen} for argv in every)
    assert preset == chosen != plain and but_epochs == chosen | {"epochs": 0.5} and {*chosen} <= {*train.OPTIONS}


REFUSED = {
    "--weight-decay x": "argument --weight-decay: invalid float value: 'x'",
    "--engine processes": "argument --engine: invalid choice: 'processes'",
    "--batch 60001": "--batch: expected at most the 60000 training images, found 60001",
    "--validation 60000": "validation: expected all 10 classes before the last 60000, found 0",
    "--data /nowhere": "/nowhere: expected a folder with the four files of MNIST, found none",
    "--save /nowhere/w.npz": "/nowhere/w.npz: expected a regular file in a folder to write to, found none",
    "--log W --save tests/../W": "expected another file to --log than to --save and --resume, found W",
    "--engine mpi --workers 2": "expected no --workers beside workers that are there, found 2",
    "--scheduler tcp://127.0.0.1:9": "expected --engine dask beside --scheduler, and --evaluate beside --predict",
    "--predict W": "expected --engine dask beside --scheduler, and --evaluate beside --predict",
}
TOO_LONG = os.strerror(errno.ENAMETOOLONG)
REFUSED |= {f"{option} {'n' * 300}": f"{TOO_LONG}: '{'n' * 300}'" for option in ("--save", "--log")}
for says, *wrong in (
    ("1e-09 to 1e+09", "--sigma 0", "--sigma nan", "--sigma 1e300"),
    ("1 to 1e+06", "--block 0", "--batch 0", "--workers 0", f"--hidden {10**19}", f"--reports {10**9}"),
    ("0 to 1e+06", "--epochs -1", "--epochs inf", "--epochs 1e308"),
    ("0 to 1e+38", "--lr -0.1", "--lr 1e300"),
    ("0 to 0.999999", "--beta2 1"),
    ("0 to 1", "--until-test 96.7"),
    ("0 to 4.29497e+09", "--seed -1"),
):
    for option, value in map(str.split, wrong):
        REFUSED[f"{option} {value}"] = f"argument {option}: expected a number from {says}, found {value}"


@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_input_ends_in_one_line_with_nothing_written(tmp_path, call, arguments):
    assert_refused(call("--save", tmp_path / "w.npz", *arguments.split()), f".*{re.escape(REFUSED[arguments])}.*")
    assert not [*tmp_path.iterdir()]
