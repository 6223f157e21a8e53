"""Files: data sets as arrays, `train_x, train_y, test_x, test_y = load("mnist")`, weights of networks, logs.

A data set is raw IDX files, the format of MNIST: a magic number (0, 0, type, number of dimensions), the
dimensions as big-endian uint32, and the values, gzipped or not: http://yann.lecun.com/exdb/mnist/
(archived). Every defect of a file is a ValueError that names the file, what was expected and what was
found; nothing is ever downloaded.
"""

import contextlib
import functools
import gzip
import io
import json
import math
import os
import pathlib
import platform
import secrets
import stat
import struct
import tempfile
import time
import zlib

import numpy as np

MNIST = pathlib.Path(__file__).resolve().parent / "mnist"
_TYPES = {0x08: np.dtype(">u1"), 0x0D: np.dtype(">f4")}


def load(folder=MNIST, validation=0):
    """The four files of a data set in MNIST's format (Fashion-MNIST, KMNIST, your own).

    Parameters
    ----------
    folder : holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
        t10k-labels-idx1-ubyte; each also as `train-images.idx3-ubyte`, and with or without `.gz`.
    validation : hold so many of the last training images out, as they lie, and give them in the place of the test set.

    Returns
    -------
    train_x, train_y, test_x, test_y : images [n, rows * columns], uint8 0..255 or float32 in [0, 1] as
        they are stored (see `pixels`); labels [n] uint8, of two classes at least; the test set has no others.

    Raises
    ------
    FileNotFoundError : no such folder, or a file is missing. ValueError : a file is damaged, is not
    what its name says, or does not fit the others.
    """
    sets, first = [], _find(folder, "train-images-idx3")
    for part in ("train", "t10k"):
        images, labels = (_find(folder, f"{part}-{kind}") for kind in ("images-idx3", "labels-idx1"))
        x, y = read_images(images), read_idx(labels, 1)
        if x.size == 0:
            raise ValueError(f"{images}: expected images, found shape {x.shape}")
        if len(x) != len(y):
            raise ValueError(f"{labels}: expected {len(x)} labels, one for each image of {images.name}, found {len(y)}")
        most = sets[1].max() if sets else 255
        if y.dtype != np.uint8 or y.max() > most or not (sets or y.min() < y.max()):
            says = f"expected labels 0 to {most} (unsigned bytes), of two classes at least to train on"
            raise ValueError(f"{labels}: {says}, found {y.min()} to {y.max()} ({y.dtype})")
        if sets and x.shape[1:] != (shape := sets[0].shape[1:]):
            raise ValueError(f"{images}: expected images of {shape} as in {first.name}, found {x.shape[1:]}")
        sets += [x, y]
    x, y, *test = (a.reshape(len(a), -1) if a.ndim > 1 else a for a in sets)
    left, classes = (len(np.unique(labels)) for labels in (y[: max(0, len(y) - validation)], y))
    if left < classes:
        raise ValueError(f"validation: expected all {classes} classes before the last {validation}, found {left}")
    return (x[:-validation], y[:-validation], x[-validation:], y[-validation:]) if validation else (x, y, *test)


def checksum(sets):
    """CRC-32 of all that `load` returned."""
    return functools.reduce(lambda crc, array: zlib.crc32(array, crc), sets, 0)


def read_images(path):
    """One IDX file of images, [n, rows, columns]: unsigned bytes, or float32 in [0, 1]."""
    x = read_idx(path, 3)
    if x.dtype != np.uint8 and x.size and not (x.min() >= 0 and x.max() <= 1):  # NaN fails both
        raise ValueError(f"{path}: expected float pixels in [0, 1], found {x.min()} to {x.max()}")
    return x


def read_idx(path, ndim):
    """One IDX file, gzipped or plain, of unsigned bytes or float32, with `ndim` dimensions."""
    content = pathlib.Path(path).read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: expected a gzip file, found a damaged one ({error}): copy it again") from error
    start, types = 4 + 4 * ndim, " or ".join(f"0000{code:02x}{ndim:02x}" for code in _TYPES)
    if len(content) < start or content[:2] != b"\0\0" or content[2] not in _TYPES or content[3] != ndim:
        sound = len(content) > 4 and content[:2] == b"\0\0" and 0x08 <= content[2] <= 0x0E  # of another kind
        expected = f"an IDX file of {ndim} dimensions, of unsigned bytes or float32, which starts with {types} (hex)"
        found = (content[:4].hex() or "nothing") + ("" if sound else ": copy it again")
        raise ValueError(f"{path}: expected {expected}, found {found}")
    shape, dtype = struct.unpack_from(f">{ndim}I", content, 4), _TYPES[content[2]]
    expected, found = math.prod(shape) * dtype.itemsize, len(content) - start
    if expected != found:
        raise ValueError(f"{path}: expected {expected} bytes for shape {shape}, found {found}: copy it again")
    return np.frombuffer(content, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def pixels(x):
    """Images as the network takes them: float32 in [0, 1]."""
    return x.astype(np.float32) / np.float32(255) if x.dtype == np.uint8 else x


def check_new_file(path, stream=False):
    """Raise ValueError or OSError if `save_weights`, or, to a stream, `open_log`, cannot write there."""
    mode = None
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(path).st_mode  # of what a link names
    good = not mode or os.access(path, os.W_OK) and (stat.S_ISREG(mode) or stream and not stat.S_ISDIR(mode))
    try:
        if good and not (mode and stream):
            tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))).close()
    except OSError:
        good = False
    if not good:
        kind = "a file" if stream else "a regular file"
        raise ValueError(f"{path}: expected {kind} in a folder to write to, found none")


@contextlib.contextmanager
def open_log(path, settings, columns, goes_on=False):
    """A CSV file, which begins with what it takes to repeat its numbers -> a function that writes a row of them.

    A log that goes on gets no row twice, and what a kill has cut is ended first. Raises ValueError if it is another's.
    """
    text = pathlib.Path(path).read_text("utf-8", "replace") if goes_on and os.path.isfile(path) else ""
    head = f"# {json.dumps(settings)}"
    if text and text.partition("\n")[0] != head:
        raise ValueError(f"{path}: expected the log of this run, to go on with it, found another's")
    known = {row.partition(",")[0] for row in text.splitlines(keepends=True) if row.endswith("\n")}

    def write(*values):
        row = [f"{value:.6g}" for value in values]
        if row[0] not in known:
            print(*row, sep=",", file=log, flush=True)

    with open(path, "a" if goes_on else "w", encoding="utf-8", errors="replace") as log:
        if not text:
            print(head, f"# {provenance()}", ",".join(columns), sep="\n", file=log, flush=True)
        elif not text.endswith("\n"):
            print(file=log)
        yield write


def provenance():
    """What a number depends on beside the settings: versions, machine, date."""
    info = pathlib.Path("/proc/cpuinfo")  # Linux has no better way
    text = info.read_text("utf-8", "replace") if info.exists() else ""
    cpu = text.partition("model name\t: ")[2].partition("\n")[0] or platform.processor() or platform.machine()
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}"
    return f"{versions}; {platform.platform()}, {cpu}; {time.strftime('%Y-%m-%d')}"


def cores(groups=pathlib.Path("/sys/fs/cgroup"), own=pathlib.Path("/proc/self/cgroup")):
    """How many this process may use: its affinity (taskset) and the CPU quota of its container (cgroup 2 and 1)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    lines = own.read_text("utf-8", "replace").splitlines() if own.exists() else []
    for group in (top / line.split(":", 2)[2].strip("/") for line in lines for top in (groups, groups / "cpu")):
        for folder in (group, *group.parents):
            files = (folder / name for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"))
            words = " ".join(file.read_text("ascii") for file in files if file.exists()).split()  # microseconds
            if len(words) == 2 and words[0].isdecimal():  # "max" and -1: no limit
                count = min(count, math.ceil(int(words[0]) / int(words[1])))
    return count


def save_weights(path, params, settings, **others):
    """[(W, b), ...] as W1, b1, ... in an .npz file, settings as JSON, and others: numbers, or lists like params, whose
    arrays have their name before these. The file is complete or not there at all."""
    path = pathlib.Path(os.path.realpath(path))  # through a link
    arrays = {"settings": json.dumps(settings)}
    for prefix, found in {"": params, **others}.items():
        layers = enumerate(found, 1) if isinstance(found, list) else ()
        arrays |= {f"{prefix}{name}{i}": a for i, layer in layers for name, a in zip("Wb", layer)} or {prefix: found}
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # another run may write, too
    try:
        with open(temporary, "xb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_weights(path):
    """The inverse -> params, others, among them `settings` as a dict, empty if there are none.

    Raises ValueError, which names the file, if anything in it is damaged, missing or left over: it has layers of the
    sizes in its settings, of finite float32; and for a run that goes on m and v alike, step and seconds.
    """
    raw = io.BytesIO(pathlib.Path(path).read_bytes())
    try:
        with np.load(raw, allow_pickle=False) as file:
            # None is there twice or hidden: they are as many as the end of the archive says.
            if (bad := file.zip.testzip()) or len({*file.files}) != struct.unpack_from("<H", raw.getvalue(), -12)[0]:
                raise ValueError(f"{bad or file.files} damaged, missing or more than once")
            arrays = {name: file[name] for name in file.files}
        settings = dict(json.loads(str(arrays.pop("settings", "{}"))))
        trees, count = ["", "m", "v"] if "step" in arrays else [""], sum(name[:1] == "W" for name in arrays)
        bs = (arrays.get(f"b{i + 1}", ()) for i in range(count or 1))
        sizes = settings.get("sizes") or [*map(len, (arrays.get("W1", ()), *bs))]
        layers = range(1, len(sizes))
        shapes = {f"{t}{n}{i}": (sizes[i - 1], sizes[i])[n == "b" :] for t in trees for i in layers for n in "Wb"}
        if wrong := arrays.keys() ^ shapes.keys() ^ ({"step", "seconds"} if trees[1:] else set()):
            raise ValueError(f"{', '.join(sorted(wrong))} missing or left over in a network of {sizes}")
        for name, shape in shapes.items():
            if not ((a := arrays[name]).dtype == np.float32 and a.size and a.shape == shape and np.isfinite(a).all()):
                raise ValueError(f"{name} {a.dtype} {a.shape}, not finite float32 {shape}")
    except Exception as error:  # whatever NumPy and zipfile raise
        raise ValueError(f"{path}: expected whole weights as --save writes them, found {error or 'others'}") from error
    params, *moments = ([(arrays.pop(f"{tree}W{i}"), arrays.pop(f"{tree}b{i}")) for i in layers] for tree in trees)
    return params, {"settings": settings, **dict(zip("mv", moments)), **arrays}


def load_run(path):
    """A run that train.py has saved -> what it needs to go on (params, m, v, step, seconds), and its settings."""
    params, others = load_weights(path)
    with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
        step, seconds, settings = int(others["step"]), float(others["seconds"]), others.pop("settings")
        good = settings["hidden"] == settings["sizes"][1:-1] and settings["control_variate"] in (True, False)
        if good and 0 <= step <= settings["steps"] and 0 <= seconds < math.inf:
            return others | {"params": params, "step": step, "seconds": seconds}, settings
    raise ValueError(f"{path}: expected a run of train.py, found what is of use for --evaluate")


def _find(folder, name):
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder with the four files of MNIST, found none")
    spellings = [f"{stem}-ubyte{end}" for stem in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
    for path in (folder / spelling for spelling in spellings):
        if path.is_file():
            return path
        if path.is_dir():
            raise FileNotFoundError(f"{path}: expected a file, found a folder: move the file that is in it to {folder}")
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(f"{folder}: expected an IDX file, one of {', '.join(spellings)}, found {found}")
