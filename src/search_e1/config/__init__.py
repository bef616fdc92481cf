"""The configuration: one frozen section per stage, from TOML and dotted flags; unknown keys are refused.

What the engines know how to configure is not declared again: ``[grpo.trainer]`` goes to ``trl.GRPOConfig`` and
``[distill.trainer]``, ``[warmstart.trainer]`` to ``transformers.TrainingArguments`` as they are.
"""

from search_e1.config.base import LoraConfig, Section
from search_e1.config.distill import (
    WHOLE,
    ClassWeights,
    DistillConfig,
    LeadConfig,
    PairsConfig,
    PoolConfig,
    ReferenceConfig,
)
from search_e1.config.files import bound_now, default_of, describe, laid_over, load, parse_overrides, read_toml
from search_e1.config.grpo import EvidenceConfig, GrpoConfig, HindsightConfig, ReplayConfig
from search_e1.config.inputs import DataConfig, PolicyConfig, RetrievalConfig
from search_e1.config.prompts import Prompts
from search_e1.config.rollout import EvaluationConfig, RolloutConfig, VllmConfig
from search_e1.config.run import Config
from search_e1.config.running import CheckpointsConfig, LaunchConfig, Sharding, TrackingConfig
from search_e1.config.warmstart import WarmstartConfig

__all__ = [
    "WHOLE",
    "CheckpointsConfig",
    "ClassWeights",
    "Config",
    "DataConfig",
    "DistillConfig",
    "EvaluationConfig",
    "EvidenceConfig",
    "GrpoConfig",
    "HindsightConfig",
    "LaunchConfig",
    "LeadConfig",
    "LoraConfig",
    "PairsConfig",
    "PolicyConfig",
    "PoolConfig",
    "Prompts",
    "ReferenceConfig",
    "ReplayConfig",
    "RetrievalConfig",
    "RolloutConfig",
    "Section",
    "Sharding",
    "TrackingConfig",
    "VllmConfig",
    "WarmstartConfig",
    "bound_now",
    "default_of",
    "describe",
    "laid_over",
    "load",
    "parse_overrides",
    "read_toml",
]
