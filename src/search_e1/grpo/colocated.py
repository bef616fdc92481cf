"""vLLM beside training: TRL hands it the weights before each step, our rollouts sample from it."""

from dataclasses import replace
from typing import Any

from trl.generation.vllm_generation import VLLMGeneration

from search_e1.rollout.engines import vllm


class Colocated(VLLMGeneration):
    """TRL's weight sync, adapters merged, into an engine that is started like every other.

    TRL's own way to start one knows no dtype (a float32 policy would be sampled from in bfloat16) and no further arguments.
    Of several processes each has an engine of its own, and those must be told of one another, which TRL does.
    """

    def __init__(self, engine: vllm.Engine, *, model: Any, accelerator: Any, processing_class: Any) -> None:
        """
        Raises:
            SearchE1Error: the engine does not start; see ``vllm.Engine.start``.
        """
        self._engine = replace(engine, config=engine.config.model_copy(update={"tensor_parallel_size": 1}))
        super().__init__(
            model,
            accelerator,
            processing_class,
            mode="colocate",
            gpu_memory_utilization=engine.share,
            max_model_length=engine.max_tokens,
            max_num_seqs=engine.rows,
            trust_remote_code=engine.policy.trust_remote_code,
        )

    def _init_vllm(self) -> None:
        if self.accelerator.num_processes > 1:
            super()._init_vllm()
        else:
            self.llm = self._engine.start()

    def sync_weights(self) -> None:
        """Hand the policy as it is now to the engine.

        TRL writes into the engine's parameters. Where the kernels have others (packed ones, on a CPU) that fails; vLLM's own
        way to load weights anew makes them again.
        """
        if self.accelerator.num_processes > 1:
            super().sync_weights()
            return
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._iter_named_params()})
        self.llm.apply_model(_pack_head)
        self.llm.reset_prefix_cache()

    def generator(self, tokenizer: Any) -> vllm.VLLMGenerator:
        """Samples from the weights of the last sync."""
        return vllm.VLLMGenerator(self.llm, tokenizer)

    def close(self) -> None:
        """Let go of the engine."""
        llm, self.llm = self.llm, None
        vllm.stop(llm)


def _pack_head(model: Any) -> None:
    """Of ``model``, vLLM's: on a CPU the head has a packed copy of its weights, and where they are the embedding's it gets
    none to load and would keep the old."""
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)
