"""train.py on a user's machine: signals, streams, disks, locales, switches of Python, terminals, and another CPU.
Whatever comes in between, what was saved is whole, the run can go on from there, and an error is one line."""

import contextlib
import functools
import os
import re
import shutil
import signal
import struct
import sys
import time

import helpers
import numpy as np
import pytest
from helpers import PYTHON, ROOT, TRAIN, assert_same_run, family, in_steps, log_of, result, run, saved, slow, start

import data
import test_fpnl

# As users start it: what is told waits in a buffer.
PLAIN = {"program": [sys.executable, "train.py"], "env": os.environ | {"PYTHONUNBUFFERED": ""}}
posix = pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
both_signals = pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=slow)])


def assert_goes_on(call, folder, path, expected):
    """The state is one from which the run can go on, to the weights that it would have had."""
    assert call("--data", folder, "--resume", path, "--save", path, "--quiet")[::2] == (0, "")
    assert_same_run(path, expected)


# --- Signals --------------------------------------------------------------------------------------------

# As the first process of a container, to which the system's own ways with signals do not apply.
APART = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
HAS_PROCESS_1 = shutil.which("unshare") and run(program=[*APART, "true"], check=False).returncode == 0
needs_process_1 = pytest.mark.skipif(not HAS_PROCESS_1, reason="needs Linux, and root, to begin with a process 1")
also_as_process_1 = pytest.mark.parametrize(
    "program", [TRAIN, pytest.param([*APART, *TRAIN], marks=[needs_process_1, slow])]
)


@also_as_process_1
@both_signals
def test_ctrl_c_and_sigterm_keep_the_last_step(small, tmp_path, number, program):
    """Also where a shell or batch system has Ctrl-C ignored, and sends SIGTERM to all processes of the run."""
    path = tmp_path / "w.npz"
    how = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), "start_new_session": True, "lines": 4}
    child = start(*small, *"--epochs 1000 --reports 300 --workers 2 --save".split(), path, program=program, **how)
    os.killpg(child.pid, number)
    _, errors = child.communicate(timeout=60)
    step = int(saved(path)["step"])
    assert child.returncode == 128 + number and 0 < step < 30000
    assert errors == f"train.py: interrupted after step {step} of 30000; go on with --resume {path}\n"


def test_kill_9_leaves_the_last_report(small, tmp_path, whole, call):
    """Complete: the run goes on from there, to the same weights."""
    child = start(*small, "--save", tmp_path / "w.npz", lines=9)
    child.kill()
    child.communicate()
    assert 0 < saved(tmp_path / "w.npz")["step"] < 300
    assert_goes_on(call, small[1], tmp_path / "w.npz", whole)


@needs_process_1
def test_process_1_hears_sigterm_from_its_first_lines_on(tmp_path):
    """While NumPy is imported: a container is to stop at once, not when it is killed."""
    (tmp_path / "numpy.py").write_text("import time; print('numpy', flush=True); time.sleep(60)")
    child = start(program=[*APART, *TRAIN], lines=1, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    os.kill([*family(child.pid)][1], signal.SIGTERM)
    assert child.communicate(timeout=30) == ("", "") and child.returncode == 128 + signal.SIGTERM


@also_as_process_1
@both_signals
def test_a_second_signal_ends_at_once(tmp_path, slice_of_mnist, number, program):
    """In a step, which nobody has to complete: nothing is reported or saved any more."""
    path = tmp_path / "w.npz"
    path.write_bytes(b"older")
    slow_steps = "--batch 10000 --block 1 --importance 0 --save".split()
    child = start("--data", slice_of_mnist, *slow_steps, path, program=program, lines=2)
    pid = child.pid if program is TRAIN else [*family(child.pid)][1]
    for _ in range(2):
        time.sleep(0.3)  # nothing tells that it has noted the first one
        assert child.poll() is None
        os.kill(pid, number)
    assert child.communicate(timeout=60) == ("", "") and child.returncode == 128 + number
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == b"older"


@pytest.mark.parametrize(("bad", "number"), [(np.nan, 0), (np.nan, signal.SIGINT), (1e20, signal.SIGINT)])
def test_a_state_that_cannot_go_on_never_replaces_one_that_can(small, tmp_path, call, monkeypatch, bad, number):
    """After a gradient that is not finite, or whose square is not; with a signal in the next step, and without."""
    path, expected = tmp_path / "w.npz", tmp_path / "expected.npz"
    small = [*small, *"--epochs 2 --reports 3 --importance 0 --save".split()]
    call(*small, expected)

    def act(step, grads):
        if step == 25:
            grads[0][0][:] = bad
        elif step == 26:
            os.kill(os.getpid(), number)

    in_steps(monkeypatch, act)
    status, _, errors = call(*small, path)
    says = r"train.py: error: diverged: the loss is (nan|inf|\d.\d+) after 25 steps: try a smaller --lr\n"
    assert status == 2 and re.fullmatch(says, errors) and saved(path)["step"] == 20
    assert_goes_on(call, small[1], path, expected)


# --- Streams --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["report", pytest.param("log", marks=slow)])
def test_a_reader_that_goes_away_ends_the_run_quietly(small, tmp_path, whole, call, what):
    """As `| head -3` and `less` do. What it would have read next is saved."""
    log, path = tmp_path / "log", tmp_path / "w.npz"
    os.mkfifo(log)
    small = [*small, *(["--quiet", "--log", log] if what == "log" else [])]
    child = start(*small, "--workers", 2, "--save", path, **PLAIN)
    with open(log, encoding="utf-8") if what == "log" else child.stdout as stream:
        for _ in range(4):
            stream.readline()
    assert child.communicate(timeout=60) == ("", "") and child.returncode == 141
    assert 0 < int(saved(path)["step"]) < 300
    assert_goes_on(call, small[1], path, whole)


@posix
@pytest.mark.parametrize("closed", [*(pytest.param(c, marks=slow) for c in (">&-", "<&- 2>&-")), "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(small, tmp_path, whole, closed):
    """As cron and pythonw start programs. Nothing else gets their place, and an error is no traceback."""
    log, path = tmp_path / "log", tmp_path / "w.npz"
    shell = ["sh", "-c", f'exec "$0" "$@" {closed}', *PYTHON, "train.py"]
    run(*small, "--log", log, "--save", path, program=shell)
    assert_same_run(path, whole)
    assert len(log_of(log)[1]) == 31
    done = run("--frobnicate", program=shell, check=False)
    says = "" if "2>&-" in closed else "train.py: error: unrecognized arguments: --frobnicate\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", says)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
@pytest.mark.parametrize(("out", "log"), [("/dev/full", os.devnull), (os.devnull, "/dev/full")])
def test_output_that_finds_no_space_ends_in_one_line(small, out, log):
    with open(out, "w", encoding="utf-8") as stdout:
        done = run(*small, "--log", log, stdout=stdout, check=False, **PLAIN)
    assert (done.returncode, done.stderr) == (2, "train.py: error: [Errno 28] No space left on device\n")


def test_the_weights_of_a_report_are_saved_before_it_is_told(small, tmp_path, call, monkeypatch):
    """Whatever becomes of who reads the log and the report."""
    monkeypatch.setattr(data, "save_weights", lambda *args, **how: print("saved"))
    monkeypatch.setattr(data, "open_log", lambda *args, **how: contextlib.nullcontext(lambda *row: print("logged")))
    _, out, _ = call(*small, *"--epochs 1 --reports 2 --save".split(), tmp_path / "w.npz")
    words = [line.split()[0] for line in out.splitlines()]
    assert words[2:] == ["saved", "logged", "0.00", "saved", "logged", "0.50", "saved", "logged", "1.00", "result:"]


@posix
def test_the_log_may_be_a_pipe(small, whole):
    """Also of a run that goes on, and reads what its log has."""
    done = run("--data", small[1], "--resume", whole, "--quiet", "--log", "/dev/stdout", timeout=60)
    assert re.findall("^..", done.stdout, re.MULTILINE) == ["# ", "# ", "ep", "10", "re"]


LIMITS = [
    ("RLIMIT_FSIZE", 16384, [], 2, "[Errno 27] File too large"),
    ("RLIMIT_AS", 4 << 30, ["--hidden", 10**4, 10**6], 0, "expected more memory: try smaller layers or batches"),
]


@pytest.mark.parametrize(("limit", "most", "options", "lines", "says"), LIMITS)
def test_a_full_disk_or_memory_loses_nothing(small, tmp_path, call, limit, most, options, lines, says):
    """The first save, or what comes before it, ends the run; the older file stays, and nothing else is left."""
    resource = pytest.importorskip("resource", reason="POSIX limits")
    path = tmp_path / "w.npz"
    call(*small, "--epochs", 1, "--save", path)
    limited = functools.partial(resource.setrlimit, getattr(resource, limit), (most, most))
    done = run(*small, *options, "--save", path, check=False, preexec_fn=limited)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (2, f"train.py: error: {says}\n", lines)
    assert {*tmp_path.iterdir()} == {small[1], path} and saved(path)["step"] == 30 and path.stat().st_size > 16384


NAME = os.fsdecode(b"caf\xc3\xa9 \xff\n") if sys.platform == "linux" else "café \n"
WAYS = [
    ("-I -OO -bb -W error -X dev -X warn_default_encoding", {}),
    ("-X utf8=0", {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "TMPDIR": "/nowhere", "OPENBLAS_NUM_THREADS": "x"}),
    ("", {"LC_ALL": "en_US.ISO-8859-1", "PYTHONIOENCODING": "ascii:strict", "PYTHONSAFEPATH": "1"}),
]


@slow
@pytest.mark.parametrize(("switches", "change"), WAYS)
def test_any_name_locale_environment_and_switch_of_python(tmp_path, switches, change):
    """The clone, the data, the log and the weights have a newline, an umlaut and a byte that is none in UTF-8."""
    folder = tmp_path / NAME
    path, log = folder / f"w{NAME}.npz", folder / f"{NAME}.csv"
    helpers.write_set(folder)
    for name in ("train.py", "data.py", "fpnl.py"):
        shutil.copy(ROOT / name, folder)
    program = [sys.executable, *switches.split(), folder / "train.py", "--workers", 2, "--data", folder, "--log", log]
    environment = {k: v for k, v in os.environ.items() if k[:3] != "LC_"} | change
    trained = functools.partial(run, program=program, check=False, text=False, env=environment)
    for options in (["--hidden", 8, "--batch", 20, "--epochs", 1], ["--resume", path]):
        done = trained(*options, "--save", path)
        assert (done.returncode, done.stderr) == (0, b"") and b"result: train " in done.stdout
        assert log.read_bytes().startswith(b'# {"version": ') and saved(path)["step"] == 3
    wrong = trained("--save", folder / "none" / path.name)
    assert wrong.returncode == 2 and re.fullmatch(b"train.py: error: .*expected a regular file.*\n", wrong.stderr)


BENCHMARK = ["-c", "import runpy; runpy.run_path('docs/benchmark.py', run_name='benchmark')"]
PROGRAMS = [[f"examples/{name}.py", "-h"] for name in ("controls", "gates", "linearized")]


@slow
@pytest.mark.parametrize("program", [*PROGRAMS, BENCHMARK], ids=lambda program: program[0])
def test_packages_of_other_names_do_not_shadow_the_projects_folders(tmp_path, program):
    """Nor does it matter that there are no docstrings, or that Python leaves the script's folder out."""
    for name in ("docs", "examples", "mnist"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('another package of that name')")
    for environment in ({"PYTHONPATH": str(tmp_path), "PYTHONOPTIMIZE": "2"}, {"PYTHONSAFEPATH": "1"}):
        out = run(*program, program=PYTHON, env=os.environ | environment).stdout
        assert "--seeds" in out if "-h" in program else out == ""


@slow
@pytest.mark.parametrize(("columns", "kind"), [(0, "xterm"), (40, "xterm"), (40, "dumb")])  # 0: it does not know
def test_the_live_line_never_garbles_the_reports(small, call, columns, kind):
    """With the live line taken out, what is left is what a pipe shows. Not all terminals can go back in a line."""
    pty, fcntl, termios = (pytest.importorskip(name, reason="POSIX terminals") for name in ("pty", "fcntl", "termios"))
    small = [*small, "--epochs", 30, "--reports", 2]
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    child = start(*small, stdout=theirs, stderr=None, env=os.environ | {"TERM": kind})
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while chunk := os.read(ours, 65536):
            shown += chunk
    os.close(ours)
    assert child.wait() == 0
    text = shown.decode().replace("\r\n", "\n")
    live = re.findall("\r\x1b\\[K([^\r\n]*)(?=\r)", text)
    if kind == "dumb":
        assert "\r" not in text and "\x1b" not in text
    else:
        assert re.fullmatch(r" +[\d.]+ +[\d.]+ +[\d.]+" + (" +" if columns else r" +\d+ s"), live[0])
        assert not columns or len(live[0]) == columns - 1
    rows = re.sub("\r\x1b\\[K", "", re.sub("\r\x1b\\[K[^\r\n]*(?=\r)", "", text)).splitlines()
    piped = call(*small)[1].splitlines()
    assert "\r" not in "".join(piped) and len(piped) == 6
    timeless = [[re.sub(r" +\d+\.\d |seconds \d+$| +(\d+ s|\?)$", "", row) for row in lines] for lines in (rows, piped)]
    assert timeless[0] == timeless[1]


# --- AArch64, under QEMU's emulation -------------------------------------------------------------------

ARM = ROOT / ".aarch64" / "python"
needs_arm = pytest.mark.skipif(not ARM.exists(), reason="needs an Arm Python under QEMU: .ci/aarch64 .aarch64")
on_aarch64 = functools.partial(run, program=[ARM], timeout=900)


@slow
@needs_arm
def test_aarch64_has_the_same_arithmetic():
    """These tests there, on FPCR.FZ: what the CPU computes, both rules, and the modes, of which it has two."""
    chosen = "bits_of or vectors_are or golden or gpu or posts_examples or enters_a_mode"
    done = on_aarch64("-m", "pytest", "-p", "no:cacheprovider", "-rs", test_fpnl.__file__, "-k", chosen, check=False)
    assert done.returncode == 0, done.stdout
    assert {*re.findall(r"^SKIPPED .*?: (.*)$", done.stdout, re.MULTILINE)} == {test_fpnl.ONE_FLAG}
    passed = int(re.search(r"(\d+) passed, ", done.stdout)[1])
    assert passed > 3 * len(test_fpnl.OPS) * len(test_fpnl.THIS_CPUS_MODES)
    assert "aarch64" in on_aarch64("-m", "platform").stdout


@slow
@needs_arm
def test_aarch64_trains_emulated_and_by_its_flags_to_the_same_bits(mnist, tmp_path):
    """And as well as here, where sums are taken in another order."""
    command = ["train.py", "--data", helpers.write_slice(mnist, tmp_path, 2000, 1000), "--workers", 1]
    command += "--hidden 32 32 --batch 100 --epochs 2 --lr 1e-2 --block 4 --reports 1 --flush".split()
    emulated, flags = (on_aarch64(*command, how, "--save", tmp_path / how) for how in ("emulated", "hardware"))
    assert_same_run(tmp_path / "hardware", tmp_path / "emulated")
    here = result(run(*command, "emulated", program=PYTHON))[0]
    assert result(emulated)[0] == result(flags)[0] == pytest.approx(here, abs=0.05) and here > 0.8
