"""Objectives by name, one file each.

An entry is called with the run's config and returns an ``Objective``. Register your own with ``@objectives.register("name")``,
or name it as ``module:attribute`` in ``grpo.objective`` or ``distill.objective``.
"""

from collections.abc import Callable

from search_e1.config import Config
from search_e1.runs.registry import Registry
from search_e1.training.objectives.base import Objective
from search_e1.training.objectives.grpo import Grpo
from search_e1.training.objectives.self_distillation import SelfDistillation
from search_e1.training.objectives.sft import Sft

objectives: Registry[Callable[[Config], Objective]] = Registry("objective")
objectives.register("grpo")(lambda config: Grpo(config.grpo, config.rollout.max_tokens))
objectives.register("self_distillation")(lambda config: SelfDistillation(config.distill))
objectives.register("sft")(lambda config: Sft(logits_mib=config.distill.training.logits_mib))


def open_objective(name: str, key: str, config: Config) -> Objective:
    """The objective ``name`` for a run of ``config``. ``key``: the config key that names it.

    Raises:
        ConfigError: there is no such objective.
    """
    return objectives.get(name, key)(config)
