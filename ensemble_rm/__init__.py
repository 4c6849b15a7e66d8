"""Robust, calibrated rewards from ensembles of reward models.

Importing it loads neither torch nor transformers: each name is imported at its first use.
"""

import lazy_loader as lazy

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
