"""The aggregators that the library brings: one file each, and one row here."""

from ensemble_rm.aggregation.rule import register
from ensemble_rm.aggregation.rules import (
    cvar,
    entropic,
    lcb,
    mean,
    median,
    minimum,
    quantile,
    uwo,
)

for rule in (
    mean.RULE,
    minimum.RULE,
    uwo.RULE,
    lcb.RULE,
    entropic.RULE,
    median.RULE,
    quantile.RULE,
    cvar.RULE,
):
    register(rule)
