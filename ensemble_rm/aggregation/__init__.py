"""Aggregators: members' scores (n_samples, n_members) to one reward (n_samples,)."""

import lazy_loader as lazy

import ensemble_rm.aggregation.rules  # noqa: F401  registers the library's own rules

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
