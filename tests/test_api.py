"""The README's Python, with paths as people write them."""

from pathlib import Path

import search_e1

QUICKSTART = str(Path(__file__).parent.parent / "configs" / "quickstart.toml")


def test_a_policy_and_an_index_answer_from_strings(tmp_path):
    config = search_e1.load_config(QUICKSTART, ["--rollout.topk", "1"])
    assert config.rollout.topk == 1
    passages = [
        search_e1.Passage(id=str(i), title=name, text=f"{name} is a film with director {director} and studio Buta Monvok.")
        for i, (name, director) in enumerate([("Talu Womgorn", "Fuki Zixtim"), ("Togi Bex", "Tira Tertim")])
    ]
    search_e1.Bm25Index.build(passages, tmp_path / "index")
    index = search_e1.Bm25Index.open(str(tmp_path / "index"))
    assert [hit.id for hit in index.search(["Togi Bex"], 1)[0]] == ["1"]
    policy = search_e1.load_policy("small", config.policy)
    with search_e1.Agent(policy, index, config.rollout) as agent:
        answer = agent.ask("What is the studio of the film Talu Womgorn?")
    assert str(answer) == "Buta Monvok"
    [source] = answer.sources
    assert source.passage.id == "0"
    assert [source.passage.text[begin:end] for begin, end in source.marks] == ["Buta Monvok"]
