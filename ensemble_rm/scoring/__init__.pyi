from .score_cache import ScoreCache as ScoreCache
