"""Samples, preference pairs and their weights; reading them from files and data sets."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
