from .evaluation import Evaluation as Evaluation, evaluate as evaluate
from .precision import PrecisionReport as PrecisionReport, precision_report as precision_report
