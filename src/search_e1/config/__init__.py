"""The configuration: one frozen section per stage, from TOML and dotted flags; unknown keys are refused.

What the engines know how to configure is not declared again: ``[grpo.trainer]`` goes to ``trl.GRPOConfig`` and
``[distill.trainer]``, ``[warmstart.trainer]`` to ``transformers.TrainingArguments`` as they are.
"""

from search_e1.config.files import bound_now, default_of, describe, laid_over, load, parse_overrides, read_toml
from search_e1.config.sections import (
    WHOLE,
    CheckpointsConfig,
    ClassWeights,
    Config,
    DataConfig,
    DistillConfig,
    EvaluationConfig,
    GrpoConfig,
    LaunchConfig,
    LeadConfig,
    LoraConfig,
    PairsConfig,
    PolicyConfig,
    PoolConfig,
    ReferenceConfig,
    ReplayConfig,
    RetrievalConfig,
    RolloutConfig,
    Section,
    TrackingConfig,
    VllmConfig,
    WarmstartConfig,
)

__all__ = [
    "WHOLE",
    "CheckpointsConfig",
    "ClassWeights",
    "Config",
    "DataConfig",
    "DistillConfig",
    "EvaluationConfig",
    "GrpoConfig",
    "LaunchConfig",
    "LeadConfig",
    "LoraConfig",
    "PairsConfig",
    "PolicyConfig",
    "PoolConfig",
    "ReferenceConfig",
    "ReplayConfig",
    "RetrievalConfig",
    "RolloutConfig",
    "Section",
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
