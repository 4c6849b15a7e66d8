from .annotators import Reliability as Reliability, fit_reliability as fit_reliability
from .calibration import Calibration as Calibration
from .calibrator import (
    CalibrationData as CalibrationData,
    Calibrator as Calibrator,
    Curve as Curve,
    register as register,
)
from .methods.temperature import (
    TemperatureFit as TemperatureFit,
    fit_temperature as fit_temperature,
)
from .normaliser import Normaliser as Normaliser, fit_normaliser as fit_normaliser
from .scored_pairs import ScoredPairs as ScoredPairs
from .ties import TieModel as TieModel, fit_ties as fit_ties
