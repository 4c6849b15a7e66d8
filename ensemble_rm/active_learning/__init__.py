"""Which pairs to ask people about next, and which to send to a judge."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
