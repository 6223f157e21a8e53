"""Fixtures that the tests of several folders share."""

import pytest

import data


@pytest.fixture(scope="session")
def mnist():
    return data.load()


@pytest.fixture(scope="session")
def slice_of_mnist(mnist, tmp_path_factory):
    """10,000 training and 5,000 test images, as files."""
    from test_fpnl import write_slice

    return write_slice(mnist, tmp_path_factory.mktemp("slice"), 10000, 5000)
