"""data.py: data sets, logs and weights as files. What is damaged is refused by name; what is saved is complete or not
there at all."""

import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import zipfile

import numpy as np
import pytest
from helpers import IMAGES, LABELS, RNG, assert_same_bits, idx, in_steps, log_of, saved, write_set

import data
import fpnl


def mutated(rng, content, start=0):
    """From `start` on, a bit flipped; at times a cut."""
    at = rng.integers(start, len(content))
    flipped = content[:at] + bytes([content[at] ^ 1 << rng.integers(8)]) + content[at + 1 :]
    return flipped if rng.integers(20) else content[:at]


def test_embedded_mnist_is_the_published_one():
    assert {p.name: hashlib.sha256(gzip.decompress(p.read_bytes())).hexdigest() for p in data.MNIST.glob("*.gz")} == {
        "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    }


@pytest.mark.parametrize("spelling", ["{}-idx{}-ubyte", "{}.idx{}-ubyte"])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_load_takes_either_spelling_gzipped_or_plain(tmp_path, spelling, end):
    expected = write_set(tmp_path, spelling=spelling, end=end)
    np.testing.assert_equal([*data.load(str(tmp_path))], expected)


@pytest.mark.parametrize("classes", [2, 62])
def test_the_number_of_classes_comes_from_the_labels(tmp_path, call, classes):
    """As of EMNIST; the command takes it over, and what it saves has it."""
    path, source = tmp_path / "w.npz", ["--data", tmp_path / "set"]
    write_set(tmp_path / "set", train=300, test=100, classes=classes)
    assert f"20-8-{classes} network" in call(*source, *"--hidden 8 --batch 50 --epochs 1 --save".split(), path)[1]
    _, *table, _ = call(*source, "--evaluate", path)[1].splitlines()
    assert len(table) == classes and sum(int(cell) for row in table for cell in row.split("\t")[1:-1]) == 100


def test_held_out_images_leave_some_of_each_class(tmp_path):
    """They are the last as they lie: in a file that is ordered by class, those of a class may be all among them."""
    write_set(tmp_path, classes=3)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.repeat(np.arange(3), 20)))
    assert [len(a) for a in data.load(tmp_path, 19)] == [41, 41, 19, 19]
    for n, left in ((20, 2), (45, 1), (60, 0), (1000, 0)):
        with pytest.raises(ValueError, match=f"validation: expected all 3 classes before the last {n}, found {left}"):
            data.load(tmp_path, n)


def test_a_missing_file_or_folder(tmp_path):
    """The last is a folder of the file's name, as some programs unpack it."""
    folder, labels = tmp_path / "set", tmp_path / "set" / LABELS
    for change, says in [
        (folder.mkdir, "expected an IDX file, one of train-images.*, found nothing$"),
        (lambda: (write_set(folder), labels.unlink()), f"{LABELS}, .*idx1-ubyte.gz, found t10k-images-idx3-ubyte, tra"),
        (labels.mkdir, f"{LABELS}: expected a file, found a folder: move the file that is in it to {folder}"),
    ]:
        change()
        with pytest.raises(FileNotFoundError, match=says):
            data.load(folder)


BROKEN = [
    (IMAGES, b"", "starts with 00000803 or 00000d03 .hex., found nothing"),
    (IMAGES, b"<!DOCTYPE html>", "starts with 00000803 .*, found 3c21444f: copy it again$"),  # a saved error page
    (IMAGES, idx(np.zeros((60, 4, 5)), 0x0B), "of unsigned bytes or float32, .* found 00000b03$"),  # sound, int16
    (IMAGES, idx(np.zeros((60, 4, 6))), "t10k-images.*expected images of .4, 6. as in train-images.*found .4, 5."),
    (IMAGES, idx(np.zeros((0, 4, 5))), "expected images, found shape .0, 4, 5."),
    (IMAGES, idx(np.full((60, 4, 5), 1.5), 0x0D), r"expected float pixels in \[0, 1\], found 1.5 to 1.5"),
    (LABELS, idx(np.arange(20)), "expected labels 0 to 9 .unsigned bytes., .* found 0 to 19 .uint8."),
    (IMAGES, idx(np.zeros((59, 4, 5))), "train-labels.*expected 59 labels.*found 60"),
    (LABELS, idx(np.zeros(19)), "expected 20 labels, one for each image of t10k-images-idx3-ubyte, found 19"),
    (LABELS, idx(np.zeros(20), 0x0D), "expected labels 0 to 9 .unsigned bytes., .* found 0.0 to 0.0 .float32."),
    ("train-labels-idx1-ubyte", idx(np.full(60, 3)), "of two classes at least to train on, found 3 to 3 .uint8."),
]


@pytest.mark.parametrize(("name", "content", "says"), BROKEN)
def test_load_names_the_file_what_was_expected_and_what_was_found(tmp_path, name, content, says):
    write_set(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}.*{says}.*\Z"):  # in one line
        data.load(tmp_path)


def test_1000_mutated_files_load_exactly_or_not_at_all(tmp_path):
    """Of bytes and of floats, plain and gzipped: what a plain reader reads, or ValueError."""
    rng, path, loaded = RNG(10), tmp_path / "mutated", 0
    for i in range(1000):
        sound = idx(rng.integers(0, 256, (6, 4, 3)), rng.choice([0x08, 0x0D]))
        plain = mutated(rng, sound, start=4 * (i % 3 > 0))  # two in three have a good magic number
        content = gzip.compress(plain) if i % 2 else plain
        path.write_bytes(mutated(rng, content) if i % 14 == 7 else content)
        magic, *shape = np.frombuffer(plain[:16].ljust(16), ">u4").tolist()
        good = len(plain) == 16 + math.prod(shape) * {0x803: 1, 0xD03: 4}.get(magic, math.nan)
        try:
            found = data.read_idx(path, 3)
            assert good and found.shape == tuple(shape) and found.dtype.isnative
            assert found.astype(found.dtype.newbyteorder(">")).tobytes() == plain[16:]
            loaded += 1
        except ValueError as error:
            assert (i % 14 == 7 or not good) and str(error).startswith(f"{path}: expected ")
    assert 200 < loaded < 800


# --- Where a file is to be written, and logs ------------------------------------------------------------

NO_FILE = {
    "link to a pipe": lambda path: (os.mkfifo(f"{path}.pipe"), path.symlink_to(f"{path}.pipe")),
    "folder": os.mkdir,
    "link to where nobody may write": lambda path: path.symlink_to("/proc/w.npz"),
    "write-protected": lambda path: path.touch(),  # by what os.access says: no mode stops root
}
NO_LOG = ["folder", "write-protected"]


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@pytest.mark.parametrize(("option", "kind"), [*(("--save", k) for k in NO_FILE), *(("--log", k) for k in NO_LOG)])
def test_what_is_no_file_to_write_to_is_refused_before_the_run(small, tmp_path, call, monkeypatch, option, kind):
    path = tmp_path / "w.npz"
    NO_FILE[kind](path)
    monkeypatch.setattr(os, "access", lambda path, how: how != os.W_OK or kind != "write-protected")
    says = f"{path}: expected a {'regular ' * (option == '--save')}file in a folder to write to, found none"
    assert call(*small, "--epochs", 0, option, path) == (2, "", f"train.py: error: {says}\n")


def test_the_log_repeats_the_rows(small, tmp_path, call):
    log, path = tmp_path / "log", tmp_path / "w.npz"
    _, out, _ = call(*small, "--epochs", 1, "--reports", 2, "--log", log, "--save", path)
    (settings, comment, header), rows = log_of(log)
    assert settings == f"# {saved(path)['settings']}" and '"sizes": [20, 24, 24, 10]' in settings
    assert comment.startswith("# Python ") and "NumPy" in comment
    assert header == "epoch,seconds,loss,train,test,live1,live2,live3"
    printed = [[float(value) for value in line.split()[:8]] for line in out.splitlines()[2:-1]]
    assert len(rows) == 3 and rows == [pytest.approx(line, abs=0.051) for line in printed]


def test_a_log_that_goes_on_has_each_row_once(small, tmp_path, call, monkeypatch):
    """After Ctrl-C, after a row was cut by a kill, and after a row whose weights were not saved any more."""
    log, path, another = (tmp_path / name for name in ("log", "w.npz", "another"))
    in_steps(monkeypatch, lambda step, _: step == 26 and signal.raise_signal(signal.SIGINT))
    call(*small, "--epochs", 2, "--reports", 6, "--save", path, "--log", log)
    log.write_text(log.read_text("utf-8") + "1,1.0,2.0,3.0,4.0,5.0,6.0,7.0\n2,1")
    resume = ["--data", small[1], "--resume", path, "--reports", 6, "--log"]
    call(*resume, log, "--save", path)
    text = log.read_text("utf-8")
    epochs = [line.partition(",")[0] for line in text.splitlines()[3:]]
    assert epochs == ["0", "0.333333", "0.666667", "0.833333", "1", "2", "1.33333", "1.66667", "2"]
    call(*resume, log)
    assert log.read_text("utf-8") == text  # a finished run has nothing to add
    call(*resume, another)
    assert [row[0] for row in log_of(another)[1]] == [2]


def test_a_run_does_not_go_on_in_the_log_of_another_or_in_its_own_weights(small, tmp_path, whole, call):
    log, resume, head = tmp_path / "log", ["--data", small[1], "--resume", whole, "--log"], saved(whole)["settings"]
    says = f"{log}: expected the log of this run, to go on with it, found another's"
    for text in (f"# {head}\n".replace('"seed": 2', '"seed": 3'), "a, table\n1,2\n", '# {"data": 217'):
        log.write_text(text)
        assert call(*resume, log) == (2, "", f"train.py: error: {says}\n") and log.read_text("utf-8") == text
    says = f"expected another file to --log than to --save and --resume, found {whole}"
    assert call(*resume, whole) == (2, "", f"train.py: error: {says}\n") and saved(whole)["step"] == 300


CORES = [
    (3, "0::/a/b", {"cpu.max": "900000 100000", "a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}),
    (1, "0::/gone", {"cpu.max": "1000 100000"}),  # a container sees its own group as the top
    (3, "4:cpu,x:/d/1\n2:memory:/", {"cpu/d/1/cpu.cfs_quota_us": "250000", "cpu/d/1/cpu.cfs_period_us": "100000"}),
    (8, "4:cpu,x:/d/1", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}),
]


@pytest.mark.parametrize(("count", "own", "files"), CORES)
def test_the_workers_are_the_cores_that_it_may_use(tmp_path, monkeypatch, count, own, files):
    """By taskset, 8, and by the quota of a container, in either version of cgroups and of any parent."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    for name, text in {"own": own, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert data.cores(tmp_path, tmp_path / "own") == count


# --- Weights --------------------------------------------------------------------------------------------


def test_saving_replaces_what_a_link_names(small, tmp_path, call):
    """Or makes it; the link stays. Who has the older file open goes on reading that."""
    folder, link = tmp_path / "elsewhere", tmp_path / "link"
    folder.mkdir()
    link.symlink_to("elsewhere/w.npz")
    call(*small, "--epochs", 0, "--save", link)
    with open(link, "rb") as older:
        call(*small, "--epochs", 1, "--save", link)
        assert np.load(older)["step"] == 0 and saved(folder / "w.npz")["step"] == 30
    assert link.is_symlink() and [*folder.iterdir()] == [folder / "w.npz"]


def test_two_runs_that_save_to_one_name_do_not_meet(tmp_path, monkeypatch):
    """One saves after the other has written its file, and before that gets the name, of which none is too long."""
    path, (first, second) = tmp_path / ("n" * 250), (fpnl.init(RNG(seed), (4, 3, 2)) for seed in range(2))

    def replace(source, target):
        monkeypatch.undo()
        data.save_weights(path, second, {})
        os.replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    data.save_weights(path, first, {})
    assert_same_bits(data.load_weights(path)[0], first)
    assert [*tmp_path.iterdir()] == [path]


NO_RUN = "expected a run of train.py, found what is of use for --evaluate"
WHOLE = "expected whole weights as --save writes them, found "
DAMAGED = [
    ({"mW1": None}, WHOLE + "mW1 missing or left over in a network of [20, 24, 24, 10]"),
    ({"step": None}, WHOLE + "mW1, mW2, mW3, mb1, mb2, mb3, seconds, vW1"),
    ({"W1": np.zeros((20, 24))}, WHOLE + "W1 float64 (20, 24), not finite float32 (20, 24)"),
    ({"b3": np.full(10, np.nan, "f")}, WHOLE + "b3 float32 (10,), not finite"),
    ({"W1": np.array([{}], object)}, WHOLE + "Object arrays cannot be loaded"),
    ({"W3": np.zeros((24, 0), "f"), "b3": np.zeros(0, "f"), "settings": None}, WHOLE + "W3 float32 (24, 0), not"),
    ({"mb3": np.zeros(3, "f")}, WHOLE + "mb3 float32 (3,), not finite float32 (10,)"),
    *((change, NO_RUN) for change in ({"seconds": np.nan}, {"step": -1}, {"step": 301}, {"step": np.inf})),
]


@pytest.mark.parametrize(("change", "says"), DAMAGED)
def test_damaged_weights_end_in_one_line(small, tmp_path, whole, call, change, says):
    path = tmp_path / "w.npz"
    np.savez(path, **{name: a for name, a in (saved(whole) | change).items() if a is not None})
    status, out, errors = call("--data", small[1], "--resume", path)
    assert (status, out, errors.count("\n")) == (2, "", 1) and errors.startswith(f"train.py: error: {path}: {says}")


def test_what_is_no_archive_or_has_arrays_twice_or_hidden_or_too_large_is_refused(tmp_path, whole):
    """W1 and W1.npy are one name to NumPy, which would take either; an end that counts fewer arrays hides others."""
    path, sound = tmp_path / "w.npz", whole.read_bytes()
    with zipfile.ZipFile(shutil.copy(whole, path), "a") as file:
        file.writestr("W1", file.read("W1.npy"))
    twice, one_counted = path.read_bytes(), sound[:-12] + b"\1\0" + sound[-10:]
    with zipfile.ZipFile(whole) as file, zipfile.ZipFile(promises := io.BytesIO(), "w") as new:
        new.writestr("W1.npy", file.read("W1.npy").replace(b"(20, 24), }" + 10 * b" ", b"(1000000, 1000000), }"))
    for content in (twice, one_counted, promises.getvalue(), b"", b"PK\3\4 and no more", b"\x93NUMPY\1\0"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path}: {WHOLE}"):
            data.load_weights(path)


def test_settings_that_this_version_does_not_write_end_in_one_line(small, tmp_path, whole, call):
    """Those of another version, and other JSON or none; to resume, and to evaluate, if that is refused, too."""
    path, good = tmp_path / "w.npz", saved(whole)
    assert call("--data", small[1], "--resume", whole)[0] == 0
    settings = json.loads(str(good["settings"]))
    changes = [{"jitter": 0}, {"epochs": math.nan}, {"batch": 7.5}, {"steps": 301}, {"flush": "maybe"}, {"hidden": 24}]
    changes += [{"sizes": 4}, {"control_variate": "off"}, *({name: [value]} for name, value in settings.items())]
    texts = ["[]", "3", "[[1, 2]]", "{", "[" * 10**5, *(json.dumps(settings | change) for change in changes)]
    texts += [json.dumps({name: value for name, value in settings.items() if name != left}) for left in settings]
    for text in texts:
        np.savez(path, **good | {"settings": text})
        for option in ("--resume", "--evaluate"):
            status, _, errors = call("--data", small[1], option, path)
            refused = status == 2 and re.fullmatch(f"train.py: error: .*{path}.*\n", errors)
            assert refused or (status, option) == (0, "--evaluate"), (text[:400], errors)


@pytest.mark.parametrize("count", [250, pytest.param(2500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_mutated_archives_load_exactly_or_not_at_all(tmp_path, method, count):
    """Anywhere and, two in three, in the directory at the end."""
    rng, path, loaded = RNG(count), tmp_path / "w.npz", 0
    params, settings = fpnl.init(rng, (4, 3, 2)), {"sizes": [4, 3, 2], "steps": 9}
    data.save_weights(path, params, settings, m=params, v=params, step=3, seconds=1.5)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(file := io.BytesIO(), "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    sound = file.getvalue()
    for i in range(count):
        path.write_bytes(mutated(rng, sound, start=sound.index(b"PK\1\2") if i % 3 else 0))
        try:
            found, run = data.load_weights(path)
            assert_same_bits([found, run["m"], run["v"]], [params] * 3)
            assert (run["settings"], run["step"], run["seconds"]) == (settings, 3, 1.5)
            loaded += 1
        except ValueError as error:
            assert str(error).startswith(f"{path}: expected whole weights")
    assert 0.1 * count < loaded < 0.9 * count
