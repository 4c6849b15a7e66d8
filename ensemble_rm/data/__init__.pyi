from .loading import load_preferences as load_preferences
from .samples import (
    Message as Message,
    Preference as Preference,
    Preferences as Preferences,
    Sample as Sample,
)
from .weights import (
    SampleWeights as SampleWeights,
    effective_sample_size as effective_sample_size,
    inclusion_weights as inclusion_weights,
    thin_to_equal as thin_to_equal,
)
