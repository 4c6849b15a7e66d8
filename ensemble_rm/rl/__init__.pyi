from .kl import (
    AdaptiveKL as AdaptiveKL,
    FixedKL as FixedKL,
    sequence_kl as sequence_kl,
    shape_rewards as shape_rewards,
)
from .monitor.alarms import Alarm as Alarm, AlarmRule as AlarmRule, StepRecord as StepRecord
from .monitor.monitor import OverOptimisationMonitor as OverOptimisationMonitor
from .monitor.plot import draw_run as draw_run
from .monitor.trl_callback import MonitorCallback as MonitorCallback
from .openrlhf import openrlhf_reward as openrlhf_reward
from .pinned import PinnedEnsemble as PinnedEnsemble
from .scoring import LoopRewards as LoopRewards, score_for_loop as score_for_loop
from .trl import trl_reward as trl_reward
from .verl import verl_reward as verl_reward
