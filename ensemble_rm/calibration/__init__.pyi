from .annotators import Reliability as Reliability, fit_reliability as fit_reliability
from .calibration import Calibration as Calibration
from .normaliser import Normaliser as Normaliser, fit_normaliser as fit_normaliser
from .scored_pairs import ScoredPairs as ScoredPairs
from .temperature import TemperatureFit as TemperatureFit, fit_temperature as fit_temperature
from .ties import TieModel as TieModel, fit_ties as fit_ties
