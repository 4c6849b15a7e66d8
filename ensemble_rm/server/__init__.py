"""The reward server: an ensemble over HTTP, in its own wire format and in those of trainers."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
