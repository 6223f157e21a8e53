"""The tests of underflow.py."""

import re

from helpers import HARDWARE, PYTHON, run


def test_the_posts_examples_in_a_table():
    """The post's examples: the numbers of test_the_posts_examples."""
    lines = run("examples/underflow.py", program=PYTHON).stdout
    rows = [re.split(r"  +", line) for line in lines.splitlines() if re.search("none|DAZ|FTZ", line)]
    expected = {  # without flags, DAZ, FTZ, both
        "(2.5 TINY + -1.6 TINY) + TINY": ("1.9 TINY", "1 TINY", "1 TINY", "1 TINY"),
        "(-1.6 TINY + TINY) + 2.5 TINY": ("1.9 TINY", "2.5 TINY", "2.5 TINY", "2.5 TINY"),
        "(0.4 TINY + 0.5 TINY) * 1/TINY": ("0.9", "0", "0", "0"),
        "0.4 TINY * 1/TINY + 0.5 TINY * 1/TINY": ("0.9", "0", "0.9", "0"),
    }
    found = [(row[0].strip(), row[-2], row[-1]) for row in rows]
    assert found == [(text, v, v if HARDWARE else "unknown") for text, values in expected.items() for v in values]
