"""train.py: the options of a run, its steps, its reports, what computes it, and what the command refuses. What becomes
of files is in test_data.py; signals, streams, terminals and disks are in test_users.py."""

import concurrent.futures
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

import helpers
import numpy as np
import pytest
from helpers import RNG, assert_same_bits, assert_same_run, in_steps, log_of, needs_mpi, result, run, saved, slow

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
    given, path = ["--data", slice_of_mnist, "--flush"], tmp_path / "w.npz"
    options = [*"--epochs 6 --batch 256 --lr 3e-3 --block 8 --reports 1 --save".split(), path]
    linear, (trained, tested) = (result(run(*given, how, *options)) for how in ("off", "emulated"))
    assert linear[1] > 0.87 and trained > linear[0] + 0.01 and tested > linear[1] + 0.01
    of_flush, of_none = (run(*given, how, "--evaluate", path).stdout.split()[-1] for how in ("emulated", "off"))
    assert float(of_flush) == tested and float(of_none) < linear[1]


# --- The loop ------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_run(digits):
    """A run that has not begun, of a network whose probabilities are large and small."""
    options = "--hidden 24 16 --batch 100 --importance 0.3 --epochs 15.05 --lr 3e-3 --weight-decay 0.5 --beta2 0.75"
    run = train.begin(train.parse_args(["--data", str(digits), *options.split()]))
    for W, _ in run.params:
        W *= np.float32(2)
    return run


@pytest.mark.parametrize("importance", [0.3, 2, 0])
def test_an_image_is_measured_with_a_probability_and_counts_the_more(tiny_run, importance):
    """q = min(1, max(least, N (1 - p))), in float64; its weight is 1 / (q batch). N = 0: all, in no pass of its own."""
    tiny_run.settings.importance, (images, labels, *_) = importance, tiny_run.sets
    p = np.exp(fpnl.forward(tiny_run.params, data.pixels(images)).astype(float))
    p = p[np.arange(len(labels)), labels] / p.sum(axis=1)
    assert np.mean(p > 0.99) > 0.01 and np.mean(p > 0.94) > 0.03 and np.mean(p < 0.16) > 0.3
    q = np.clip(importance * (1 - p), tiny_run.settings.least, 1) if importance else np.ones(len(p))
    losses, given = -np.log(p), []
    numbers = {row.tobytes(): i for i, row in enumerate(data.pixels(images))}

    def gradient(params, x, y, rng, weights, return_losses):
        given.append(drawn := [numbers[row.tobytes()] for row in x])
        np.testing.assert_array_equal(y, labels[drawn])
        np.testing.assert_allclose(weights, np.float32(1 / (100 * q[drawn])), rtol=1e-4, strict=True)
        return train.zeros(params), losses[drawn]

    tiny_run.gradient, tiny_run.update = gradient, lambda *_, **__: None  # the weights stay as they are
    tiny_run.outputs = tiny_run.outputs if importance else None
    for step, loss in enumerate(train.steps(tiny_run)):
        batch = RNG((0, train.ORDER, step // 20)).permutation(len(p))[100 * (step % 20) :][:100]
        assert loss == pytest.approx(losses[batch].mean(), rel=1e-4)
        assert len({*given[step]}) == len(given[step]) and {*given[step]} <= {*batch}
    assert (step, tiny_run.step) == (301, 301)
    counts = np.bincount(np.concatenate(given[:300]), minlength=len(p))
    for some in (p < np.median(p), p >= np.median(p)):
        assert abs(counts[some].sum() - 15 * q[some].sum()) <= 3.5 * np.sqrt(15 * np.sum(q[some] * (1 - q[some])))


def test_a_step_in_which_nothing_is_drawn_is_a_step_of_adamw(tiny_run):
    """With a gradient of zeros, as to skip it would be a bias; at a rate that falls to zero as a cosine."""
    tiny_run.settings.importance, tiny_run.settings.least, tiny_run.gradient, updates = 1e-9, 0.0, None, []
    tiny_run.update = lambda *step, **_: updates.append(step)
    assert all(loss > 0 for loss in train.steps(tiny_run)) and len(updates) == 301
    for i, (params, grads, m, v, step, lr, decay) in enumerate(updates):
        assert (params, m, v, step, decay) == (tiny_run.params, tiny_run.m, tiny_run.v, i + 1, 0.5)
        assert lr == pytest.approx(3e-3 * np.cos(np.pi * i / 602) ** 2)
        assert_same_bits(grads, train.zeros(params))


def test_the_loss_of_the_weights_is_told_before_a_step_of_adamw_changes_them(tiny_run):
    """Who stops there can go on as if there had been no stop. After the step, m is a tenth of the gradient."""
    tiny_run.step, before = 257, [a.copy() for a in fpnl.leaves(tiny_run.params)]
    loss, steps = next(train.steps(tiny_run)), train.steps(tiny_run)
    assert next(steps) == loss and tiny_run.step == 257
    assert_same_bits(tiny_run.params, before)
    assert next(steps) != loss and tiny_run.step == 258
    assert not np.array_equal(before[0], tiny_run.params[0][0]) and tiny_run.m[1][0].any()
    np.testing.assert_allclose(tiny_run.v[1][0], 0.25 * (10 * tiny_run.m[1][0]) ** 2, rtol=1e-5)


# --- A run: its start, its reports ---------------------------------------------------------------------

# Of each that decides the weights, a value that it does not have by default.
OTHER = {"validation": "60", "hidden": "23 24", "epochs": "0.2", "batch": "5", "sigma": "0.03", "block": "9"}
OTHER |= {"control_variate": "", "importance": "0.6", "lr": "3e-3", "weight_decay": "0.5", "beta2": "0.9"}
OTHER |= {"dropout": "0.2", "smoothing": "0.1", "seed": "4", "flush": "off"}


@pytest.mark.parametrize("name", [*train.OPTIONS, "flush"])
def test_an_option_reaches_the_run_and_is_fixed_from_then_on(small, tmp_path, call, monkeypatch, name):
    """It need not be given again to --resume, which goes on to the same weights, and refuses another by name."""
    option = f"--{name.replace('_', '-')} {OTHER[name]}".split()
    default, other, again = (tmp_path / name for name in ("default.npz", "other.npz", "again.npz"))
    three_steps, resume = [*small, "--epochs", 0.1, "--save"], ["--data", small[1], "--resume"]
    assert call(*three_steps, default)[0] == call(*three_steps, other, *option)[0] == 0
    assert not np.array_equal(saved(other)["W1"], saved(default)["W1"])
    in_steps(monkeypatch, lambda step, _: step == 2 and signal.raise_signal(signal.SIGINT))
    assert call(*three_steps, again, *option)[0] == 130 and saved(again)["step"] == 1
    assert call(*resume, again, "--save", again)[0] == 0
    assert_same_run(again, other)
    expected = re.escape(str(json.loads(str(saved(default)["settings"]))[name]))
    says = f"{option[0]}: expected {expected} as in {default}, found .*: it is fixed"
    assert_refused(call(*resume, default, *option), says)
    assert call(*resume, default, "--flush", "emulated", "--workers", 1)[0] == 0  # which decide nothing


def test_resume_refuses_other_data_versions_and_networks_by_name(small, tmp_path, call):
    path, resume = tmp_path / "w.npz", ["--data", small[1], "--resume", tmp_path / "w.npz"]
    call(*small, "--epochs", 1, "--save", path)
    good, refused = saved(path), f"as in {path}, found .*: it is fixed"
    assert_refused(call(*resume, "--data", data.MNIST), rf"--data: expected \d+ {refused}")
    assert_refused(call(*resume, "--preset", "best"), f"--epochs: expected 1.0 {refused}")
    for name, value in {**dict.fromkeys(train.FIXED, 0.5), "method": "backprop", "network": "tanh"}.items():
        np.savez(path, **good | {"settings": json.dumps(json.loads(str(good["settings"])) | {name: value})})
        assert_refused(call(*resume), f"{name}: expected {value} {refused}")
    assert train.begin(train.parse_args([*map(str, resume)]), transfer=np.tanh).step == 30
    says = f"{path}: expected weights of fpnl's network, found one with tanh"
    assert_refused(call("--data", small[1], "--evaluate", path), says)


def test_reports_and_validation(digits, tiny_run):
    done = run("--data", digits, *"--validation 500 --epochs 0.2 --batch 50 --reports 3".split())
    title, header, *rows, last = done.stdout.splitlines()
    assert "784-512-512-10" in title and "669,706 weights" in title and "1,500 images" in title
    assert header.split() == ["epoch", "seconds", "loss", "train", "validation", "live", "units", "left"]
    assert [row.split()[0] for row in rows] == ["0.00", "0.07", "0.13", "0.20"]
    columns = r" *\d+\.\d\d +\d+\.\d +\d+\.\d{4}  0\.\d{4} +0\.\d{4}   0\.\d\d 0\.\d\d 0\.\d\d +(\d+ s|\?)"
    assert all(re.fullmatch(columns, row) for row in rows)
    assert last.startswith("result: train ") and " validation " in last
    live = [np.mean(h != 0) for h in fpnl.activations(tiny_run.params, data.pixels(tiny_run.sets[2]))]
    assert tiny_run.seconds == 0 and train.score(tiny_run, 2, map)[2:] == pytest.approx(live)


def test_until_test_stops_at_the_first_report_over_the_mark(digits, tmp_path, call):
    command = ["--data", digits, *"--hidden 24 24 --batch 100 --epochs 2 --reports 5 --log".split(), tmp_path / "log"]
    call(*command)
    scores = [row[4] for row in log_of(tmp_path / "log")[1]]
    first = next(i for i, score in enumerate(scores) if score >= scores[3])
    done = run(*command, "--until-test", scores[3], "--quiet")
    assert [row[4] for row in log_of(tmp_path / "log")[1]] == scores[: first + 1] and first > 0
    assert result(done)[1] == pytest.approx(scores[first], abs=5e-5) and done.stdout.count("\n") == 1
    done = run(*command, "--epochs", 1.5, "--reports", 1, "--until-test", 1, check=False)
    assert len(log_of(tmp_path / "log")[1]) == 4  # twice an epoch, and to the end
    assert done.returncode == 1 and re.fullmatch(r"train.py: the accuracy ended at 0\.\d{4}, below 1\.0\n", done.stderr)


@pytest.mark.filterwarnings("error")  # NumPy warns of nothing
@pytest.mark.parametrize(("lr", "importance"), [(0.3, 2), (0.3, 0), (1, 2), (1e9, 0), (1e38, 2), (1e38, 0)])
def test_a_run_that_falls_apart_says_so_and_keeps_the_last_good_state(small, tmp_path, call, lr, importance):
    options = ["--lr", lr, "--importance", importance, "--reports", 300, "--save", tmp_path / "w.npz"]
    status, _, errors = call(*small, *options)
    says = r"train.py: error: diverged: the loss is ([\d.]+(?:e\+\d+)?|inf|nan) after (\d+) steps: try a smaller --lr\n"
    assert status == 2 and (found := re.fullmatch(says, errors)), errors
    assert data.load_weights(tmp_path / "w.npz")[1]["step"] == int(found[2]) - 1 == (lr == 0.3)


# --- What computes -------------------------------------------------------------------------------------

SHORT = "--epochs 0.8 --batch 300 --seed 3 --importance 0.5 --reports 1".split()
ODD = [*SHORT, *"--hidden 33 17 11 --batch 301 --smoothing 0.1 --control-variate --importance 0".split()]
DROPOUT = [*SHORT, *"--hidden 65 33 --batch 301 --dropout 0.1".split()]
NOBODY = type("ctypes", (), {"CDLL": lambda name: None})  # a BLAS that cannot be asked


@functools.cache
def alone(folder, *options):
    """The file after a run by one worker, flushed in NumPy."""
    path = folder / f"{len([*folder.iterdir()])}.npz"
    run("--data", folder, "--workers", 1, "--flush", "emulated", *options, "--save", path)
    return path


@pytest.mark.parametrize("settings", [SHORT, ODD, DROPOUT], ids=["512-512", "33-17-11", "dropout"])
@pytest.mark.parametrize("program", [[*helpers.TRAIN, "--workers", 2], *helpers.ENGINES])
def test_same_seed_same_weights_whoever_computes_them(digits, tmp_path, settings, program):
    """At the size of the main job and at odd ones, whose tasks, pieces, masks and blocks do not come out even."""
    done = run("--data", digits, *settings, "--save", tmp_path / "w.npz", program=program)
    assert f"flush {'hardware' if helpers.HARDWARE else 'emulated'}, 2 workers" in done.stdout
    assert_same_run(tmp_path / "w.npz", alone(digits, *settings))


@pytest.mark.parametrize(("asked", "lengths"), [("NumPy", ["0.2", "0.8"]), ("threadpoolctl", ["0.8"])])
def test_blas_has_one_thread_in_runs_and_as_many_as_before_after_them(digits, tmp_path, monkeypatch, asked, lengths):
    """Other numbers of threads give other bits, silently, so the library is asked: a variable that is set after NumPy
    was imported has no effect. Also in runs at the same time, which do not meet. (threadpoolctl obeys one thread.)"""
    get, limit = train.blas()
    before, found = get(), []
    in_steps(monkeypatch, lambda *_: found.append(get()))
    if asked == "threadpoolctl":
        pytest.importorskip("threadpoolctl")
        monkeypatch.setattr(train, "ctypes", NOBODY)

    def trained(epochs):
        train.main([*map(str, ["--data", digits, *SHORT, "--epochs", epochs, "--save", tmp_path / epochs])])

    limit(3)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(trained, lengths))
    after = get()
    limit(before)
    assert {*found} == {1} and after == 3
    for epochs in lengths:
        assert_same_run(tmp_path / epochs, alone(digits, *SHORT, "--epochs", epochs))


def test_where_nobody_knows_blas_numpy_must_not_be_first(small, monkeypatch, call):
    """One line says what to do, and nothing is run; a command that came before NumPy has nothing to ask."""
    monkeypatch.setattr(train, "ctypes", NOBODY)
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    monkeypatch.setattr(train, "NUMPY_WAS_FIRST", True)
    says = "expected threadpoolctl, or train.py imported before NumPy: more BLAS threads, other bits"
    assert_refused(call(*small, "--epochs", 0), says)
    monkeypatch.setattr(train, "NUMPY_WAS_FIRST", False)
    assert call(*small, "--epochs", 0)[0] == 0


def test_a_worker_with_other_bits_is_named_once(capsys):
    """In the results of the first call of the map, and by one bit."""

    def others(work, lists):
        found = [*map(work, lists)]
        found[1][1][0][1][0].view(np.uint32)[0, 0] ^= 1  # of the slopes of its first task
        return found

    says = f"worker {platform.node()} computes other bits than this process: so will the weights be\n"
    for its_map, expected in ((train.compared(map), ""), (train.compared(others), says)):
        for _ in range(2):
            fpnl.es_gradient(*helpers.example(n=9), RNG(0), task=2, workers=3, map_tasks=its_map)
        assert capsys.readouterr().err == expected


@needs_mpi
def test_mpi_without_workers_ends_in_one_line(small):
    done = run(*small, "--engine", "mpi", check=False)
    says = "--engine mpi: expected workers: mpiexec -n 3 python -m .*"
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
def test_a_dask_that_is_there_already_and_one_that_is_there_no_more(digits, tmp_path, call):
    distributed = pytest.importorskip("distributed")
    how = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**how) as cluster, distributed.Client(cluster) as client:
        options = ["--engine", "dask", "--scheduler", cluster.scheduler_address, "--save", tmp_path / "w.npz"]
        assert "2 workers" in call("--data", digits, *SHORT, *options)[1]
        found = client.run(lambda: {*sys.modules} & {"data", "fpnl", "train"})
    assert [*found.values()] == [{"fpnl"}] * 2
    assert_same_run(tmp_path / "w.npz", alone(digits, *SHORT))
    assert_refused(call("--data", digits, *SHORT, *options), "Timed out trying to connect to tcp.*")


@slow
def test_workers_of_a_dask_of_its_own_say_nothing(capfd):
    """As of a heartbeat that comes when the scheduler has gone."""
    distributed = pytest.importorskip("distributed")
    with train.engine(train.parse_args("--engine dask --workers 1".split())):
        distributed.get_client().run(lambda: logging.getLogger("distributed.worker").error("heartbeat"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("program", [pytest.param(helpers.TRAIN, marks=slow), *helpers.ENGINES])
@pytest.mark.parametrize("event", ["Ctrl-C", "kill -9"])
def test_ctrl_c_and_kill_9_lose_nothing_and_leave_no_process(digits, tmp_path, call, program, event):
    """Ctrl-C in a terminal is sent to all processes; killed is the last of them, a worker if they are elsewhere: dask
    computes again what it had, mpiexec ends the run."""
    steps, path = "--batch 500 --epochs 2.75 --reports 11 --importance 0.5".split(), tmp_path / "w.npz"
    child = helpers.start("--data", digits, *steps, "--save", path, program=program, start_new_session=True, lines=6)
    commands = {pid: pathlib.Path(f"/proc/{pid}/cmdline").read_bytes() for pid in helpers.family(child.pid)}
    processes = [os.pidfd_open(pid) for pid in commands]
    if event == "Ctrl-C":
        os.killpg(child.pid, signal.SIGINT)
    else:
        worker = b"spawn_main" if program is helpers.DASK else b"train.py"
        os.kill([pid for pid, command in commands.items() if worker in command][-1], signal.SIGKILL)
    out, errors = child.communicate(timeout=120)
    if event == "Ctrl-C":
        says = f"train.py: interrupted after step {saved(path)['step']} of 11; go on with --resume {path}\n"
        assert child.returncode == 130 and says in errors and "Traceback" not in errors, errors
    elif program is helpers.DASK:
        assert child.returncode == 0 and "Restarting worker" in errors, errors
    else:
        assert child.returncode and "result: " not in out and saved(path)["step"] < 11
    for process in processes:
        assert select.select([process], [], [], 60)[0]  # it has ended
        os.close(process)
    assert call("--data", digits, "--resume", path, "--save", path)[0] == 0
    assert_same_run(path, alone(digits, *steps))


# --- Files, and what is refused ------------------------------------------------------------------------


def test_an_untrained_network_is_evaluated(digits, tmp_path, call):
    path, params = tmp_path / "w.npz", fpnl.init(RNG((7, train.INIT)), (784, 24, 24, 10))
    done = run("--data", digits, *"--epochs 0 --seed 7 --hidden 24 24 --save".split(), path)
    assert_same_bits(data.load_weights(path)[0], params)
    images, labels, held, expected = data.load(digits)
    trained, found = (fpnl.forward(params, data.pixels(x)).argmax(axis=1) for x in (images, held))
    accuracies = np.mean(trained == labels), np.mean(found == expected)
    assert result(done) == pytest.approx(accuracies, abs=5.1e-5)
    header, *table, last = call("--data", digits, "--evaluate", path)[1].splitlines()
    assert header.split("\t") == ["label", *map(str, range(10)), "recall"]
    for label, row in zip(range(10), table, strict=True):
        counts = np.bincount(found[expected == label], minlength=10)
        assert row.split("\t") == [*map(str, [label, *counts]), f"{counts[label] / counts.sum():.4f}"]
    assert last == f"result: test {accuracies[1]:.4f}"


def test_predict_takes_weights_alone_and_the_pixels_of_the_training(tmp_path, call):
    path, params = tmp_path / "w.npz", fpnl.init(RNG(0), (20, 24, 10))
    np.savez(path, W1=params[0][0], b1=params[0][1], W2=params[1][0], b2=params[1][1])

    def predicted(content, code=0x0D):
        (tmp_path / "images").write_bytes(helpers.idx(content, code))
        return call("--evaluate", path, "--predict", tmp_path / "images")

    images = RNG(0).integers(0, 256, (1500, 4, 5), np.uint8)
    labels = fpnl.forward(params, data.pixels(images.reshape(-1, 20))).argmax(axis=1)
    expected = 0, "".join(f"{label}\n" for label in labels), ""
    assert predicted(images, 0x08) == predicted(images / np.float32(255)) == expected
    assert predicted(images[:0]) == predicted(images[:0], 0x08) == (0, "", "")
    for factor, found in ((-1, "-1.0 to -?0.0"), (np.nan, "nan to nan")):
        says = rf"{tmp_path}/images: expected float pixels in \[0, 1\], found {found}"
        assert_refused(predicted(images / np.float32(255) * factor), says)
    assert_refused(predicted(np.zeros((0, 3, 3))), f"{path}: expected weights for 9 pixels, found 20")


def test_a_preset_is_a_set_of_defaults():
    chosen, every = train.PRESETS["best"], [["--preset", "best"], ["--preset", "best", "--epochs", "0.5"], []]
    preset, but_epochs, plain = ({name: vars(train.parse_args(argv))[name] for name in chosen} for argv in every)
    assert preset == chosen != plain and but_epochs == chosen | {"epochs": 0.5} and {*chosen} <= {*train.OPTIONS}


NUMBER = "argument {}: expected a number from "
REFUSED = [  # what is said, and for which arguments
    (NUMBER + "1e-09 to 1e+09, found {}", "--sigma 0", "--sigma nan", "--sigma 1e300"),
    (NUMBER + "1 to 1e+06, found {}", "--block 0", "--batch 0", "--workers 0", "--hidden 9999999", "--reports 9999999"),
    (NUMBER + "0 to 1e+06, found {}", "--epochs -1", "--epochs inf", "--epochs 1e308"),
    (NUMBER + "0 to 1e+38, found {}", "--lr -0.1", "--lr 1e300"),
    (NUMBER + "0 to 0.999999, found {}", "--beta2 1"),
    (NUMBER + "0 to 1, found {}", "--until-test 96.7"),
    (NUMBER + "0 to 4.29497e+09, found {}", "--seed -1"),
    ("argument {}: invalid float value: '{}'", "--weight-decay x"),
    ("argument {}: invalid choice: '{}'", "--engine processes"),
    ("/nowhere: expected a folder with the four files of MNIST, found none", "--data /nowhere"),
    ("File name too long", f"--save {'n' * 300}", f"--log {'n' * 300}"),
    ("--batch: expected at most the 60000 training images, found 60001", "--batch 60001"),
    ("expected another file to --log than to --save and --resume, found W", "--log W --save tests/../W"),
    ("expected no --workers beside workers that are there, found 2", "--engine mpi --workers 2"),
    ("expected --engine dask beside --scheduler, and --evaluate beside --predict", "--scheduler W", "--predict W"),
    ("pip install it (mpi4py mpich for --engine mpi, distributed for dask), also", "--engine mpi", "--engine dask"),
]


@pytest.mark.parametrize(("says", "arguments"), [(says, each) for says, *these in REFUSED for each in these])
def test_bad_input_ends_in_one_line_with_nothing_written(tmp_path, call, monkeypatch, says, arguments):
    """Where neither mpi4py nor distributed is installed."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setitem(sys.modules, "distributed", None)
    says = re.escape(says.format(*arguments.split()))
    assert_refused(call("--save", tmp_path / "w.npz", *arguments.split()), f".*{says}.*")
    assert not [*tmp_path.iterdir()]
