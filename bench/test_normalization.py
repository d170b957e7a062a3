"""Every normalization, pass, layout, type and shape, by every implementation.

``python -m bench`` runs it; ``pytest bench -k 'layer_norm and torch'`` runs a part of the quick
cases with the table of pytest-benchmark.
"""

import pytest

from .oracle import wrong
from .results import plain
from .suite import CLOCK, is_ours


# First, since a run that is short of time leaves out the end of what is timed.
def test_accuracy(task, name, suite):
    """Errors far from zero are kept, whatever they are; ours are small."""
    if reason := suite.why_absent(task, name):
        pytest.skip(reason)
    error = suite.result(task).errors[name]
    if is_ours(name) and wrong(error, task.case.dtype):
        pytest.fail(f"off by {error:.2g}", pytrace=False)


@pytest.mark.benchmark(timer=CLOCK)
def test_speed(task, name, suite, benchmark):
    """What computes rightly is measured; nobody else's mistakes fail the run."""
    result = suite.result(task)
    benchmark.group = str(task.case)
    if reason := suite.why_absent(task, name):
        if is_ours(name) and "wrong" in reason:
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    benchmark.extra_info.update(plain(suite.row(task, name)))
    blocks = iter(result.blocks[name])
    CLOCK.now = 0.0
    benchmark.pedantic(lambda: CLOCK.pass_by(next(blocks)), rounds=len(result.blocks[name]))
