"""A client that no one here wrote: SkyRL's search environment asks our server."""

import json

import pytest

pytest.importorskip("skyrl_gym")
pytest.importorskip("fastapi")

import skyrl_gym
from skyrl_gym.envs.search.env import SearchEnv, SearchEnvConfig

from serving import FakeIndex, serving


def test_skyrl_s_search_environment_gets_its_passages_from_our_server() -> None:
    index = FakeIndex()
    with serving(index) as url:
        config = SearchEnvConfig(search_url=f"{url}/retrieve", topk=2, timeout=10)
        extras = {"reward_spec": {"ground_truth": {"target": ["Oslo"]}}, "max_turns": 3}
        environment = skyrl_gym.make("search", env_config=config, extras=extras)
        assert isinstance(environment, SearchEnv)
        environment.init([{"role": "user", "content": "What is the capital of Norway?"}])
        step = environment.step("<think>hm</think><search> capital of Norway </search>")
        assert not step["done"]
        [message] = step["observations"]
        passages = json.loads(message["content"].removeprefix("\n<information>").removesuffix("</information>\n"))
        assert passages == {"result": ('Doc 1: "t capital of Norway"\ntext 0\nDoc 2: "t capital of Norway"\ntext 1\n')}
        last = environment.step("<answer>Oslo</answer>")
        assert (last["done"], last["reward"]) == (True, 1.0)
    assert index.calls == [(["capital of Norway"], 2)]
