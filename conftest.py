"""Fixtures that the tests of several folders share."""

import sys

import pytest

pytest.register_assert_rewrite("helpers")

import helpers  # noqa: E402

import data  # noqa: E402


@pytest.fixture(scope="session")
def mnist():
    return data.load()


@pytest.fixture(scope="session")
def slice_of_mnist(mnist, tmp_path_factory):
    """10,000 training and 5,000 test images, as files."""
    return helpers.write_slice(mnist, tmp_path_factory.mktemp("slice"), 10000, 5000)


@pytest.fixture
def call(monkeypatch, capsys):
    """train.py in this process, which is quicker -> exit status, standard output, errors."""
    import train

    def called(*arguments):
        status = 0
        try:
            train.main([*map(str, arguments)])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    monkeypatch.chdir(helpers.ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return called


# A run of 300 quick steps.
SMALL = "--hidden 24 24 --batch 10 --epochs 10 --reports 30 --seed 2".split()


@pytest.fixture
def small(tmp_path):
    """The options of that run, on a tiny set in a folder of its own."""
    helpers.write_set(tmp_path / "set", train=300)
    return ["--data", tmp_path / "set", *SMALL]


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The file after all of its steps."""
    folder = tmp_path_factory.mktemp("whole")
    helpers.write_set(folder, train=300)
    helpers.run("--data", folder, *SMALL, "--workers", 1, "--quiet", "--save", folder / "w.npz")
    return folder / "w.npz"
