"""Marks of the tests that run whole sweeps."""

import pytest

SWEEP = [
    pytest.mark.e2e,
    # Ray and its dependencies, not ours: sockets and processes that they leave to the collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:ray"),
]
