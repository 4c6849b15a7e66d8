from .repository import Versions as Versions
from .version import Version as Version
