"""How many judgments a calibration needs by default."""

# Effective ones: with fewer, the interval of a temperature is too wide to be of use.
MIN_JUDGMENTS = 50
