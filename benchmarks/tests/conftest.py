"""Fixtures of the main suite that the tests of the benchmarks use."""

from tests.conftest import (
    minilm_folder,
    no_network,
    pytest_collection_modifyitems,
    shared_data,
    small_folder,
    tiny_policy,
)

__all__ = [
    "minilm_folder",
    "no_network",
    "pytest_collection_modifyitems",
    "shared_data",
    "small_folder",
    "tiny_policy",
]
