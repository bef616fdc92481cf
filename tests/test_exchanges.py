"""What ranks exchange: values, work of unequal cost, and whether all are there."""

from hypothesis import given
from hypothesis import strategies as st

from ranked import in_ranks
from search_e1.runs import ranks


def test_values_are_exchanged_in_the_order_of_ranks(tmp_path):
    def exchanged() -> tuple[list[int], str, float]:
        ranks.barrier()
        return (
            ranks.all_gather_object(ranks.rank() * 10),
            ranks.broadcast_object(f"from {ranks.rank()}"),
            ranks.total(0.5 + ranks.rank()),
        )

    assert in_ranks(3, exchanged, tmp_path) == [([0, 10, 20], "from 0", 4.5)] * 3
    assert exchanged() == ([0], "from 0", 0.5)


def test_work_is_leveled_by_moving_what_must_move(tmp_path):
    texts = [["a" * 9, "b" * 5, "c" * 4, "d" * 2], [], ["e"]]

    def level() -> list[str]:
        own = texts[ranks.rank()]
        return ranks.leveled(own, [len(text) for text in own])

    assert in_ranks(3, level, tmp_path) == [["c" * 4, "d" * 2], ["a" * 9], ["e", "b" * 5]]


@given(costs=st.lists(st.lists(st.integers(1, 50), max_size=9), min_size=1, max_size=5))
def test_leveled_costs_differ_by_less_than_any_item_could_narrow(costs):
    moves = ranks._moves(costs)
    held = [
        [cost for origin, own in enumerate(costs) for i, cost in enumerate(own) if moves.get((origin, i), origin) == to]
        for to in range(len(costs))
    ]
    totals = [sum(own) for own in held]
    most = max(totals)
    assert sorted(cost for own in held for cost in own) == sorted(cost for own in costs for cost in own)
    assert most - min(totals) <= min(held[totals.index(most)], default=0)
    assert most <= max(map(sum, costs))
    assert all(to != origin for (origin, _), to in moves.items())


def test_a_rank_that_does_not_come_is_noticed(tmp_path):
    def come() -> bool:
        return ranks.all_come(30) and (ranks.rank() == 1 or not ranks.all_come(0.2))

    assert in_ranks(2, come, tmp_path) == [True, True]
    assert ranks.all_come(0)
