"""Evidence: GRPO whose advantages are weighed, token by token, by the lead of the policy that sees a group's reference.

The bounded correction that EviSD (arXiv:2608.01359) is described by, with the weights of RLSD (Self-Distilled RLVR,
arXiv:2604.03128).
"""

import math
from collections.abc import Sequence

from search_e1.config import GrpoConfig
from search_e1.training.objectives.grpo import Grpo
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Sample


def reweight_advantages(advantages: Sequence[float], lead: Sequence[float], strength: float, bound: float) -> tuple[float, ...]:
    """Advantages A of tokens, corrected by the teacher's lead, ``log p(token | privileged) - log p(token | plain)``.

    ``A * (1 + strength * (clip(exp(sign(A) * lead), 1 - bound, 1 + bound) - 1))``: what speaks for a right trajectory or
    against a wrong one counts for more, the rest for less. With ``strength`` at most 1 and ``bound`` below 1 no sign changes;
    where the lead is 0 nothing does.
    """
    limit = math.log(1 + bound) + 1  # beyond it the clip holds, and exp could overflow
    ratios = (math.exp(min(limit, math.copysign(1, a) * gap)) for a, gap in zip(advantages, lead, strict=True))
    clipped = (min(max(ratio, 1 - bound), 1 + bound) for ratio in ratios)
    return tuple(a * (1 + strength * (ratio - 1)) for a, ratio in zip(advantages, clipped, strict=True))


class Evidence(Grpo):
    """GRPO on corrected advantages. Samples without a teacher's prompt are left as they are."""

    def __init__(self, config: GrpoConfig, max_tokens: int) -> None:
        super().__init__(config, max_tokens)
        self.settings = config.evidence

    def prepare(self, policy: TrainedPolicy, samples: Sequence[Sample]) -> Sequence[Sample]:
        taught = [s for s in samples if s.teacher_prompt_ids is not None]
        plain = [s.model_copy(update={"teacher_prompt_ids": None}) for s in taught]
        teacher, student = policy.logprobs(taught, teacher="current"), policy.logprobs(plain)
        corrected = {}
        for sample, with_reference, without in zip(taught, teacher, student, strict=True):
            lead = [a - b for a, b in zip(with_reference, without, strict=True)]
            assert sample.advantages is not None
            corrected[id(sample)] = reweight_advantages(sample.advantages, lead, self.settings.strength, self.settings.bound)
        samples = [
            s.model_copy(update={"advantages": corrected.get(id(s), s.advantages), "teacher_prompt_ids": None}) for s in samples
        ]
        return super().prepare(policy, samples)
