"""The calibrators that the library brings: one file each, and one row here."""

from ensemble_rm.calibration.calibrator import register
from ensemble_rm.calibration.methods import bbq, histogram, isotonic, power, temperature

for calibrator in (
    temperature.CALIBRATOR,
    power.CALIBRATOR,
    isotonic.CALIBRATOR,
    histogram.CALIBRATOR,
    bbq.CALIBRATOR,
):
    register(calibrator)
