from .decision import GateOptions as GateOptions
from .job import recalibrate as recalibrate
from .outcome import Recalibration as Recalibration
