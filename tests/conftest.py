"""The backends a test runs on: every one this machine has, and the default choice."""

import os

import pytest

import cpunorm
from cpunorm.backends import BACKENDS

from .support import AVAILABLE


@pytest.fixture(params=AVAILABLE)
def backend(request) -> str:
    """Each backend that is available here."""
    return request.param


@pytest.fixture(params=(*AVAILABLE, "auto"))
def backend_or_auto(request) -> str:
    """Each backend, and the default: it may take shorter ways of its own."""
    return request.param


@pytest.fixture
def restore_threads():
    """Put the thread count back after the test."""
    before = cpunorm.get_num_threads()
    yield
    cpunorm.set_num_threads(before)


def pytest_sessionstart(session):
    if os.environ.get("CPUNORM_REQUIRE_COMPILED") == "1" and "cython" not in AVAILABLE:
        pytest.exit("CPUNORM_REQUIRE_COMPILED=1, but the cython backend is missing", returncode=1)


def pytest_report_header(config):
    missing = [name for name in BACKENDS if name not in AVAILABLE]
    return f"cpunorm backends: {', '.join(AVAILABLE)}; missing: {', '.join(missing) or 'none'}"
