"""Best-of-n: unbiased curves, sampling, and pairs for DPO."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
