from .kl import (
    AdaptiveKL as AdaptiveKL,
    FixedKL as FixedKL,
    sequence_kl as sequence_kl,
    shape_rewards as shape_rewards,
)
from .monitor.alarms import Alarm as Alarm, AlarmRule as AlarmRule, StepRecord as StepRecord
from .monitor.monitor import OverOptimisationMonitor as OverOptimisationMonitor
from .openrlhf import openrlhf_reward as openrlhf_reward
from .trl import trl_reward as trl_reward
from .verl import verl_reward as verl_reward
