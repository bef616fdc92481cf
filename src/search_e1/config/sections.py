"""The sections: one frozen model a stage; unknown keys are refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from search_e1.config.presets import Preset, under
from search_e1.prompts import Prompts
from search_e1.retrieval.convention import EncoderSettings

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str | Path) else v)]
"""One path, or a list of them."""
Sharding = Literal["none", "fsdp2", "zero3"]


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PolicyConfig(Section):
    model: str
    """Directory of a Hugging Face causal language model, a Hub id, or `small`: the policy that comes with the package."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights while they are sampled from and trained."""
    device: str = "auto"
    """`auto` (an accelerator if there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    trust_remote_code: bool = False
    """Run Python code that the model directory or the Hub brings along."""


class DataConfig(Section):
    corpus: Path | None = None
    """Passages: JSON lines (plain, .gz, .zst) or Parquet with `id` and `contents`, or `id`, `title` and `text`. Needed unless
    `retrieval.index` or `.url` is given."""
    train: Annotated[Paths, Field(min_length=1)]
    """Question file or files, JSON lines (plain or .gz) with `id`, `question`, `golden_answers`, perhaps `metadata`."""
    demonstrations: Path | None = None
    """What an expert did for training questions, for `pairs.references_by = "gold"`: JSON lines of `id` and `text`, or `id`
    and `turns`. `docs/distillation.md` tells more."""
    eval: dict[str, Path] = Field(min_length=1)
    """Benchmark name -> question file."""
    max_train: Positive | None = None
    """Use a random subset of this many training questions (the same for a seed)."""
    max_eval: Positive | None = None
    """Use a random subset of this many questions of each benchmark."""


class RetrievalConfig(Section):
    index: Paths = ()
    """Directory of an index made by `search-e1 index build`, or a list of several whose rankings are fused. Without it one is
    built of `data.corpus` in the run directory."""
    kind: Literal["bm25", "dense", "hybrid"] = "bm25"
    """Of the index that is built of `data.corpus`; `hybrid` builds both of the others and fuses their rankings."""
    encoder: EncoderSettings | None = None
    """Needed for `dense` and `hybrid`. For an `index` that is given: where its encoder is now, and its device."""
    faiss: str = "exact"
    """Of a dense index that is built: `exact`, `graph`, `compressed`, or a factory string of FAISS."""
    parameters: str | None = None
    """How a dense index is searched, e.g. `nprobe=128,k_factor_rf=40`. Without it as its preset, or its build, says."""
    url: str | None = None
    """A server that speaks Search-R1's `/retrieve`, e.g. `http://127.0.0.1:8000`. Used instead of an index."""
    timeout: Annotated[float, Field(gt=0)] = 30.0
    """Seconds for one request to `url`, from connecting to the last byte of the answer."""
    attempts: Positive | None = None
    """Tries of one request to `url` before the stage stops. Without it as many as `time_limit` allows."""
    time_limit: Annotated[float, Field(gt=0)] = 180.0
    """Seconds for all tries of one request to `url` and the waits between them; then the stage stops. How long a server may
    be down without harm."""
    cache: bool | Path = True
    """File that keeps answers for later rounds and other runs; several processes may share it. `true`: for `url`, in the run
    directory; `false`: none."""
    cache_key: str | None = None
    """A name of what `url` serves, for answers in `cache`. Only for a server that does not tell its index's checksum; without
    a name its answers are not kept."""

    @model_validator(mode="after")
    def _one_source(self) -> "RetrievalConfig":
        if self.index and self.url:
            raise ValueError("give index or url, not both")
        if self.kind != "bm25" and not (self.encoder or self.index or self.url):
            raise ValueError(f"kind = {self.kind!r} needs an encoder; give encoder.model")
        if self.cache_key and not self.url:
            raise ValueError("cache_key is only for a url; an index has its own checksum")
        return self


class RolloutConfig(Section):
    """The Search-R1 protocol's limits. They hold in training and in evaluation."""

    max_searches: NonNegative = 4
    """Turns that are answered; then follows one last generation in which a search is no longer served."""
    topk: Positive = 3
    """Passages for a query."""
    max_action_tokens: Positive = 500
    """Most tokens of one generation."""
    max_observation_tokens: Positive = 500
    """Most tokens of one observation; passages are cut, the closing tag never."""
    max_tokens: Positive = 4096
    """Most tokens of prompt and response together; a policy with a shorter context lowers it."""
    batch_size: Positive = 256
    """Most trajectories that are sampled together; fewer where memory does not hold their cache."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples: the policy itself, on any device, or vLLM (an extra), whose settings are `[vllm]`."""


class VllmConfig(Section):
    """Of `rollout.engine = "vllm"`."""

    url: str | None = None
    """A server to sample from, started by `vllm serve` with the policy in question, instead of an engine in this process. Not
    for GRPO, whose policy changes with every step."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds for one request to `url`, to the last byte of its answer."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the device's memory for weights and cache."""
    shared_gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.3
    """The same where the policy is in memory too: in GRPO, and when the lead is measured."""
    tensor_parallel_size: Positive = 1
    """Devices that the weights are spread over. More than 1 in GRPO needs as many processes."""
    engine: dict[str, Any] = {}
    """Further arguments of `vllm.EngineArgs` (`enforce_eager`, `kv_cache_dtype`, ...)."""


class LoraConfig(Section):
    """Low-rank adapters on all linear layers but the head."""

    rank: Positive = 16
    alpha: Positive = 32
    dropout: Share = 0.0


class ReplayConfig(Section):
    """Examples of following a reference, trained on in every GRPO step so that the teacher's lead outlives GRPO.

    They are made of the step's own groups: the privileged prompt that shows a question's reference, and the reference's
    own ids, with cross-entropy on what was sampled. Off by default; the published method has no such thing.
    """

    examples_per_step: NonNegative = 0
    """Most examples in one optimiser step, at most one for each question that has a correct trajectory. 0 turns it off."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Of their mean cross-entropy a token, beside the GRPO loss. 0 turns it off."""
    detours: Share = 0.5
    """Share of the examples that begin with a search of a sibling that the reference did without (it carries no loss), so
    that the reference is followed from off its track too."""


class HindsightConfig(Section):
    """The policy that sees a group's reference teaches the plain one, at the siblings' search queries, beside the GRPO loss.

    After SD-Search. The teacher is the policy as it is now, without gradient; `[reference]` says what it sees.
    """

    weight: NonNegativeFloat = 0.0
    """Of the mean divergence a token, beside the GRPO loss. 0 turns it off."""
    classes: Annotated[tuple[Literal["thought", "search", "answer", "tag"], ...], Field(min_length=1)] = ("search",)
    """Which sampled tokens are taught, by what they are part of."""
    divergence: Literal["forward_kl", "reverse_kl", "js"] = "js"
    """As in `[distill]`; `js` with equal shares."""
    teacher_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Below 1 sharpens the teacher."""


class EvidenceConfig(Section):
    """Each token's advantage weighed by what the policy that sees a group's reference thinks of it, its lead.

    A token's factor is exp(lead) in a trajectory above its group's mean and exp(-lead) in one below, kept within 1 - `bound`
    and 1 + `bound`. No advantage changes its sign.
    """

    strength: Share = 0.0
    """Share of the correction: 0 turns it off, 1 takes all of it."""
    bound: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Farthest that a factor may be from 1."""


class GrpoConfig(Section):
    steps: NonNegative = 200
    """Optimiser steps a round. 0 leaves GRPO out."""
    questions_per_step: Positive = 64
    """Questions of an optimiser step; their trajectories are sampled afresh from the current policy."""
    group_size: Annotated[int, Field(ge=2)] = 5
    """Trajectories sampled for a question."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    temperature: Annotated[float, Field(gt=0)] = 1.0
    lora: LoraConfig | None = None
    """Train adapters and merge them at the end of the stage; without it all weights are trained."""
    length_penalty: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Most that a correct trajectory's reward loses by its length, compared to the other correct ones of its question: GRPO
    then asks for fewer sampled tokens. 0: reward is exact match alone (as published)."""
    replay: ReplayConfig = ReplayConfig()
    keep_groups: bool = False
    """Keep the newest group of each question beside the policy, for `pool.source = "grpo"`."""
    hindsight: HindsightConfig = HindsightConfig()
    evidence: EvidenceConfig = EvidenceConfig()
    trainer: dict[str, Any] = {}
    """Further arguments of `trl.GRPOConfig` (`beta`, `epsilon`, `per_device_train_batch_size`, ...)."""

    @property
    def shows_references(self) -> bool:
        """Whether anything in this stage depends on what a reference shows."""
        replayed = self.replay.examples_per_step and self.replay.weight
        return bool(replayed or self.hindsight.weight or self.evidence.strength)


class PoolConfig(Section):
    """Trajectories that pairs are mined from, sampled from the policy after GRPO."""

    source: Literal["fresh", "grpo"] = "fresh"
    """Sample them, or take those that GRPO sampled last: the newest groups, one a question, at GRPO's own group size and
    temperature. `grpo` needs `grpo.keep_groups`."""
    questions: Positive | None = None
    """For this many training questions (all, if not given)."""
    group_size: Annotated[int, Field(ge=2)] = 8
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Also of the trajectories that the lead is measured with."""


class ReferenceConfig(Section):
    """What the teacher sees of a reference: the same in GRPO's replay, when the lead is measured and in distillation."""

    shows: Literal["whole", "searches", "searches_and_answer", "answer", "none"] = "whole"
    """The whole trajectory (as published), or its searches, its searches and its answer, its answer alone, each in its tags;
    `none` is the null test of the method: the teacher's prompt is the plain one."""
    max_tokens: Positive | None = None
    """Most tokens of the teacher's prompt and the response together. Without it as many as the policy's context holds."""
    shorten: Literal["passages", "evenly", "never"] = "passages"
    """How a whole reference that does not fit is shortened: the last `passages` of its observations are left out, or all are
    cut `evenly`, to as many of their first words. Its actions never are; what still does not fit is left out and counted."""


WHOLE = ReferenceConfig()
"""As published."""


class PairsConfig(Section):
    """Who is shown to the teacher, and who learns from it. `docs/distillation.md` tells more."""

    students: Positive = 1
    """Most students of one reference; each makes a pair."""
    students_by: Literal["wrong_first", "all_wrong", "longest", "random", "any"] = "wrong_first"
    """Which siblings come first: wrong ones, then correct but less efficient ones, the most divergent first; every wrong one,
    however many; of the wrong and the less efficient ones those with most sampled tokens, or any; or `any` of the
    group, so that students are what the policy does, not only what it does wrong."""
    references: Positive = 1
    """Most references of one question; each makes pairs of its own, and none of them is a student."""
    references_by: Literal["fewest_searches", "random", "gold"] = "fewest_searches"
    """Which correct trajectory is shown: that with the fewest searches (ties: fewest sampled tokens), or any of them; or the
    question's demonstration in `data.demonstrations`. Further references by `fewest_searches` are as efficient as the first."""
    mismatched: Share = 0.0
    """Share of the questions whose references are another question's, of pairs to distil on and of held-out ones alike: a
    control of what noisy references do."""


class LeadConfig(Section):
    """How much better the policy is when it sees the reference: measured before every distillation, and its gate."""

    pairs: Positive = 64
    """Pairs that are held out from distillation and measured on."""
    max_share: Share = 0.25
    """At most this share of all pairs is held out."""
    samples: Positive = 2
    """Trajectories sampled for each pair, each prompt and each kind of start."""
    minimum: float = 0.02
    """Lead in EM (privileged minus plain, from the question on) below which distillation is refused."""
    gate: Literal["mean", "low"] = "mean"
    """What must reach `minimum`: the measured lead, or the lower end of its 95% interval."""
    saving: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Or the share of the sampled tokens that the reference saves: a teacher that is no better but shorter by it passes
    too, unless the interval of its lead lies below 0. 1: only EM counts."""
    enforce: bool = True
    """Refuse to distil without a lead. Turned off, the lead is measured and reported only. It does not concern `sft`."""


class ClassWeights(Section):
    """Weights in the loss of the sampled tokens by what they are part of; the loss is the weighted mean."""

    thought: NonNegativeFloat = 1.0
    search: NonNegativeFloat = 1.0
    answer: NonNegativeFloat = 1.0
    tag: NonNegativeFloat = 1.0
    """Protocol tags and end tokens."""

    @model_validator(mode="after")
    def _some(self) -> "ClassWeights":
        if not any((self.thought, self.search, self.answer, self.tag)):
            raise ValueError("all weights are 0, so nothing would be distilled")
        return self


class DistillConfig(Section):
    objective: Literal["ofsd", "sft"] = "ofsd"
    """Self-distillation (as published), or supervised fine-tuning on the same references: each once an epoch, under the plain
    prompt, with cross-entropy on its sampled tokens. `sft` has no teacher: no lead is measured, and what concerns teacher,
    divergence and temperatures here does nothing."""
    epochs: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    batch_size: Positive = 16
    """Pairs an optimiser step."""
    weights: Literal["lora", "all"] = "lora"
    """What is trained: adapters, which are merged at the end (as published), or all weights."""
    lora: LoraConfig = LoraConfig()
    """With `weights = "lora"`."""
    teacher: Literal["auto", "live", "cached"] = "auto"
    """Where the teacher's hidden states come from: computed in every step (`live`; with `weights = "all"` by a frozen copy of
    the policy), or once for each pair and kept on disk (`cached`). `auto`: cached for several epochs or all weights."""
    packing: Literal["auto", "always", "never"] = "auto"
    """Sequences of a batch end to end, without padding. `auto`: on accelerators, for policies that keep them apart."""
    divergence: Literal["forward_kl", "reverse_kl", "js"] = "forward_kl"
    """KL(teacher || student) (as published), KL(student || teacher), or the generalised Jensen-Shannon divergence."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of `js`: the teacher's share of the mixture; towards 0 it acts like `forward_kl`, towards 1 like `reverse_kl`."""
    tau: Annotated[float, Field(gt=0)] = 10.0
    """Where the divergence is clipped, in nats."""
    clip: Literal["entry", "token", "none"] = "entry"
    """Clip each vocabulary entry's term before the sum (as published), each token's sum, or nothing."""
    teacher_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Below 1 sharpens the teacher."""
    student_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the student in the divergence; other than 1, the policy is to match the teacher when sampled at it."""
    tokens: Literal["sampled", "acting"] = "sampled"
    """Tokens in the loss: all `sampled` ones (as published), or those of tags, queries and answers, not of thoughts."""
    class_weights: ClassWeights = ClassWeights()
    logits_mib: Positive | None = None
    """MiB for the logits in memory together, of as many positions as fit. Without it 64 on a CPU and 1024 elsewhere."""
    trainer: dict[str, Any] = {}
    """Further arguments of `transformers.TrainingArguments`."""

    @model_validator(mode="after")
    def _beta_is_used(self) -> "DistillConfig":
        if self.beta != 0.5 and self.divergence != "js":
            raise ValueError(
                f'beta = {self.beta:g} belongs to divergence = "js", not to "{self.divergence}"; take it out'
            )
        return self


class EvaluationConfig(Section):
    samples: NonNegative = 1
    """Trajectories sampled for each question, beside the greedy one, for `em_sampled`. 0 leaves them out."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the sampled trajectories."""
    latency: NonNegative = 4
    """Questions of each benchmark that are asked once more, alone, for the time from question to answer. 0 leaves it out."""
    ceiling: bool = True
    """Look, once a run, for the answers in the passages that each question itself finds, and in the whole corpus."""


class TrackingConfig(Section):
    """Live tracking through transformers' integrations. It changes nothing in a run, and may change while a run goes on."""

    report_to: tuple[str, ...] = ()
    """Trackers to tell every stage's figures: `tensorboard` (into `tracking/` of the run), `wandb`, `trackio`, ..."""
    project: str = "search-e1"
    """Project of the tracker, where it has such a thing."""


class CheckpointsConfig(Section):
    """How often a stage that trains saves how far it is. It changes nothing in a run, and may change while a run goes on."""

    every_seconds: NonNegativeFloat = 60.0
    """From one checkpoint to the next, at the end of a step. The last two are kept until the stage is complete."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Of the time, at most, that checkpoints take: large ones are saved less often than `every_seconds`."""


class LaunchConfig(Section):
    """How many processes work on a stage. It changes nothing in a run but rounding, and may change while a run goes on."""

    processes: Positive = 1
    """On each machine, one for each of its GPUs. With 1 the stages run in the process that runs the loop; with more GRPO, pool,
    lead, distillation and evaluation are each started as a group of processes, which end with the stage."""
    fork: bool = True
    """Start them as copies of one process that has imported everything once, where that is safe (Linux, and sampling by
    transformers), instead of starting Python anew for each stage."""
    sharding: Sharding = "none"
    """What several processes divide among them in GRPO and distillation: nothing (DDP), or weights, gradients and optimiser
    states, by FSDP2 or DeepSpeed's ZeRO-3 (an extra)."""
    nodes: Positive | None = None
    """Machines, on each of which the same command is started. Default: as ``srun``, torchrun or ``NNODES`` say, else 1."""
    node: NonNegative | None = None
    """Which of them this is, from 0. Default: as ``srun``, torchrun or ``NODE_RANK`` say."""
    address: str | None = None
    """Where the others reach node 0. Default: ``MASTER_ADDR``, else the first of its addresses that they do."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """That node 0 listens on; 0 is any."""
    wait_seconds: Annotated[float, Field(gt=0)] = 300.0
    """How long nodes wait for each other at the start."""


class WarmstartConfig(Section):
    """A small policy from nothing, taught the protocol by demonstrations built of the questions' supporting passages."""

    hidden_size: Positive = 192
    layers: Annotated[int, Field(ge=2)] = 5
    heads: Positive = 6
    vocabulary: Positive = 8192
    """Ids of the tokenizer that is trained on corpus and questions."""
    context_length: Positive = 2048
    tokenizer_passages: Positive = 20_000
    """Passages that the tokenizer is trained on."""
    steps: Positive = 400
    """Optimiser steps."""
    drills: NonNegative = 100
    """Of the steps, the first, which teach nothing but the first search, of six times as many questions."""
    batch_size: Positive = 16
    """Demonstrations an optimiser step."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    privileged: Share = 0.4
    """Share of the demonstrations that follow a reference in the privileged prompt."""
    off_track: Share = 0.5
    """Share of those that begin with a needless search, which is read and not imitated."""
    irrelevant: Share = 0.15
    """Share of the plain demonstrations with a search that leads nowhere."""
    duplicate: Share = 0.1
    """Share of the plain demonstrations that ask the same thing twice."""
    early: Share = 0.1
    """Share of the plain demonstrations that stop after their first search and answer with the title it found."""

    @model_validator(mode="after")
    def _fits(self) -> "WarmstartConfig":
        if self.hidden_size % self.heads or self.hidden_size // self.heads % 2:
            raise ValueError(f"hidden_size {self.hidden_size} does not split into {self.heads} heads of even size")
        if self.drills > self.steps:
            raise ValueError(f"drills = {self.drills} of {self.steps} steps; give fewer")
        if self.irrelevant + self.duplicate + self.early > 1:
            raise ValueError("irrelevant, duplicate and early together exceed 1")
        return self


class Config(Section):
    """Everything a run depends on."""

    run: Path
    """Directory of the run."""
    seed: NonNegative = 0
    """Every stage draws its own seed from it."""
    preset: Preset = "search-e1"
    """What keys that are not given are: `search-e1`, as published, the defaults that stand here; `concise`, which saves
    tokens where GRPO has gained what it can (when-it-pays.md)."""
    rounds: Positive = 2
    """Rounds of GRPO and OFSD."""
    ofsd: Literal["every_round", "first_round", "last_round", "never"] = "every_round"
    """After the GRPO of which rounds to distil; the others sample no pool and measure no lead. `never`: GRPO alone."""
    policy: PolicyConfig
    prompts: Prompts | None = None
    """Templates. Without them the policy's own (`search_e1.json` in its directory), else Search-R1's."""
    data: DataConfig
    retrieval: RetrievalConfig = RetrievalConfig()
    rollout: RolloutConfig = RolloutConfig()
    vllm: VllmConfig = VllmConfig()
    grpo: GrpoConfig = GrpoConfig()
    pool: PoolConfig = PoolConfig()
    reference: ReferenceConfig = ReferenceConfig()
    pairs: PairsConfig = PairsConfig()
    lead: LeadConfig = LeadConfig()
    distill: DistillConfig = DistillConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    launch: LaunchConfig = LaunchConfig()
    warmstart: WarmstartConfig | None = None
    """Only for `search-e1 warmstart`, which makes a policy to start from."""

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, given: Any) -> Any:
        return under(given.get("preset"), given) if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _has_passages(self) -> "Config":
        if not (self.data.corpus or self.retrieval.index or self.retrieval.url):
            raise ValueError("no passages: give data.corpus, retrieval.index or retrieval.url")
        return self

    @model_validator(mode="after")
    def _has_groups(self) -> "Config":
        if self.pool.source == "grpo" and not (self.grpo.keep_groups and self.grpo.steps):
            raise ValueError(
                'pool.source = "grpo" needs grpo.keep_groups = true and grpo.steps; set them, or source = "fresh"'
            )
        return self

    @model_validator(mode="after")
    def _has_demonstrations(self) -> "Config":
        if self.pairs.references_by == "gold" and not self.data.demonstrations:
            raise ValueError('pairs.references_by = "gold" needs data.demonstrations; give the path of that file')
        return self

    @model_validator(mode="after")
    def _trains(self) -> "Config":
        if self.ofsd == "never" and not self.grpo.steps:
            raise ValueError('ofsd = "never" and grpo.steps = 0 leave nothing to do; change one of them')
        return self

    def distills(self, round: int) -> bool:
        """Whether ``round``, from 1 on, ends with distillation, if there is a lead."""
        only = {"first_round": 1, "last_round": self.rounds}
        return self.ofsd == "every_round" or only.get(self.ofsd) == round

    @property
    def distillations(self) -> int:
        """Over all rounds."""
        return sum(self.distills(round) for round in range(1, self.rounds + 1))

    def binding(self) -> dict[str, Any]:
        """What a run directory belongs to, as JSON: all but its place and what changes nothing in a run."""
        waiting = {"timeout", "attempts", "time_limit", "cache"}
        place = {"url", "timeout", "gpu_memory_utilization", "shared_gpu_memory_utilization"}
        return self.model_dump(
            mode="json",
            exclude={
                "run": True,
                "preset": True,
                "tracking": True,
                "checkpoints": True,
                "launch": True,
                "retrieval": waiting,
                "vllm": place,
            },
        )
