from .aggregator import (
    Aggregator as Aggregator,
    cvar as cvar,
    entropic as entropic,
    lcb as lcb,
    make_aggregator as make_aggregator,
    mean as mean,
    median as median,
    minimum as minimum,
    quantile as quantile,
    uwo as uwo,
)
