"""The configuration: one frozen section per stage, from TOML and dotted flags; unknown keys are refused."""

from search_e1.config.base import LoraConfig, Section
from search_e1.config.coldstart import ColdstartConfig, EndpointConfig, NewPolicyConfig
from search_e1.config.distill import (
    WHOLE,
    ClassWeights,
    DistillConfig,
    LeadConfig,
    Mask,
    PairsConfig,
    PoolConfig,
    ReferenceConfig,
)
from search_e1.config.files import (
    default_of,
    describe,
    load,
    migrate_fingerprint,
    parse_overrides,
    read_toml,
    with_overrides,
)
from search_e1.config.grpo import (
    CorrectionConfig,
    EvidenceConfig,
    GatedConfig,
    GrpoConfig,
    GuardConfig,
    HindsightConfig,
    ReplayConfig,
)
from search_e1.config.inputs import NEW, DataConfig, PolicyConfig, RetrievalConfig
from search_e1.config.prompts import Prompts
from search_e1.config.rewards import JudgeConfig, RewardsConfig
from search_e1.config.rollout import EvaluationConfig, RolloutConfig, VllmConfig
from search_e1.config.run import Config
from search_e1.config.running import CheckpointsConfig, ParallelConfig, Sharding, TrackingConfig
from search_e1.config.training import TrainingConfig

__all__ = [
    "NEW",
    "WHOLE",
    "CheckpointsConfig",
    "ClassWeights",
    "ColdstartConfig",
    "Config",
    "CorrectionConfig",
    "DataConfig",
    "DistillConfig",
    "EndpointConfig",
    "EvaluationConfig",
    "EvidenceConfig",
    "GatedConfig",
    "GrpoConfig",
    "GuardConfig",
    "HindsightConfig",
    "JudgeConfig",
    "LeadConfig",
    "LoraConfig",
    "Mask",
    "NewPolicyConfig",
    "PairsConfig",
    "ParallelConfig",
    "PolicyConfig",
    "PoolConfig",
    "Prompts",
    "ReferenceConfig",
    "ReplayConfig",
    "RetrievalConfig",
    "RewardsConfig",
    "RolloutConfig",
    "Section",
    "Sharding",
    "TrackingConfig",
    "TrainingConfig",
    "VllmConfig",
    "default_of",
    "describe",
    "load",
    "migrate_fingerprint",
    "parse_overrides",
    "read_toml",
    "with_overrides",
]
