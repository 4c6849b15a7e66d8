from .curves import (
    CurveFit as CurveFit,
    best_of_n_curve as best_of_n_curve,
    best_of_n_kl as best_of_n_kl,
    best_of_n_weights as best_of_n_weights,
    fit_curve as fit_curve,
)
from .sampling import (
    Best as Best,
    MadePair as MadePair,
    best_of_n as best_of_n,
    make_pairs as make_pairs,
)
