from .routing import (
    Routed as Routed,
    Saving as Saving,
    choose_threshold as choose_threshold,
    pair_uncertainty as pair_uncertainty,
    route as route,
    threshold_for_share as threshold_for_share,
)
from .selection import (
    SelectedPair as SelectedPair,
    SelectedPairs as SelectedPairs,
    select_pairs as select_pairs,
)
from .tasks import to_tasks as to_tasks
