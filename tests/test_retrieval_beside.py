"""While a retriever answers, an engine with long steps samples a whole one."""

import threading
from contextlib import nullcontext

from chat import chat_tokenizer
from conftest import PASSAGES, TinyRetriever
from search_e1.rollout.engines.base import Generation
from search_e1.rollout.loop import rollout
from search_e1.rollout.starts import starts
from test_engine import LIMITS, PROMPTS, QUESTIONS


class _Stepping:
    """A session whose steps take long: the first row searches in the first, the second goes on until the fourth."""

    admission_interval, answers_wait, steps = 1, True, 0

    def __init__(self, tokenizer, gone_on: threading.Event) -> None:
        said = {(0, 1): "<search>Arda</search>", (1, 4): "<answer>x</answer>", (0, 4): "<answer>Bel</answer>"}
        self.said = {at: Generation(tuple(tokenizer.encode(text))) for at, text in said.items()}
        self.gone_on, self.joined, self.waiting = gone_on, [], set()

    def submit(self, request) -> None:
        self.waiting.add(request.key)
        self.joined.append((request.key, self.steps))

    def release(self, key) -> None:
        pass

    def step(self):
        self.steps += 1
        if self.steps == 2:
            self.gone_on.set()
        done = [(key, self.said[key, self.steps]) for key in sorted(self.waiting) if (key, self.steps) in self.said]
        self.waiting -= {key for key, _ in done}
        return done


def test_a_retriever_has_a_whole_step_to_work_beside() -> None:
    tokenizer, gone_on = chat_tokenizer(), threading.Event()
    session = _Stepping(tokenizer, gone_on)

    class Steps:
        context_length = 1000

        def __init__(self) -> None:
            self.tokenizer = tokenizer

        def session(self, **_):
            return nullcontext(session)

    class Slow(TinyRetriever):
        def search(self, queries, topk):
            assert gone_on.wait(30), "nobody went on"
            return super().search(queries, topk)

    begun = starts(tokenizer, PROMPTS, QUESTIONS[:2])
    done = rollout(Steps(), Slow(PASSAGES), begun, LIMITS, temperature=1.0, seed=0, prompts=PROMPTS)
    assert [t.answer for t in done] == ["Bel", "x"]
    assert session.joined == [(0, 0), (1, 0), (0, 2)]
