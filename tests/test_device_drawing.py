"""Ids that are drawn without a look from the host are those that the host would draw."""

import random

import pytest
import torch

from search_e1.rollout.engines.sampling import Numbers, draw, draw_on_device


@pytest.mark.parametrize("vocabulary", [1, 127, 128, 1000])
def test_ids_are_drawn_as_on_the_host(vocabulary: int) -> None:
    logits = 3 * torch.randn(500, vocabulary, generator=torch.Generator().manual_seed(0))
    logits[:, ::3] = -torch.inf if vocabulary > 1 else 0.0
    for temperature in (0.0, 0.7, 1.0):
        expected = draw(logits, temperature, [random.Random(seed) for seed in range(500)])
        numbers = torch.tensor([random.Random(seed).random() for seed in range(500)], dtype=torch.float64)
        mode = "sampled" if temperature else "greedy"
        drawn, logprobs = draw_on_device(logits, torch.full((500,), temperature), numbers, mode)
        assert drawn.tolist() == expected[0]
        assert logprobs.tolist() == pytest.approx(expected[1], abs=1e-6)


@pytest.mark.parametrize("number", [0.0, 0.25, 0.5, 1 - 2**-53])
def test_no_id_without_a_share_is_drawn(number: float) -> None:
    logits = torch.full((1, 700), -torch.inf)
    logits[0, [130, 131, 400, 401]] = torch.tensor([0.0, 0.0, 0.0, 0.0])
    numbers = torch.full((1,), number, dtype=torch.float64)
    drawn, logprobs = draw_on_device(logits, torch.ones(1), numbers, "sampled")
    assert drawn.tolist() == [{0.0: 130, 0.25: 131, 0.5: 400}.get(number, 401)]
    assert logprobs.tolist() == pytest.approx([-1.3862944])


def test_rounding_leads_to_no_id_without_a_share() -> None:
    """Numbers on the borders between blocks, each of which begins and ends with ids that are never drawn."""
    logits = 10 * torch.randn(2000, 512, generator=torch.Generator().manual_seed(0))  # sums of like numbers are exact
    logits.view(2000, 4, 128)[:, :, [0, 127]] = -torch.inf
    sums = torch.softmax(logits, -1).view(2000, 4, 128).sum(-1, dtype=torch.float64).cumsum(-1)
    border = sums[:, 1] / sums[:, -1]
    for number in (border, torch.nextafter(border, torch.zeros(())), torch.nextafter(border, torch.ones(()))):
        _, logprobs = draw_on_device(logits, torch.ones(2000), number, "sampled")
        assert logprobs.isfinite().all()


def test_rows_that_draw_and_rows_that_do_not_are_told_apart() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    drawn, _ = draw_on_device(logits, torch.tensor([0.0, 1.0]), torch.tensor([0.99, 0.99], dtype=torch.float64), "mixed")
    assert drawn.tolist() == [1, 2]


def test_numbers_that_were_looked_at_come_again() -> None:
    numbers, source = Numbers(3), random.Random(3)
    expected = [source.random() for _ in range(6)]
    assert numbers.peek(2) == expected[:2]
    assert numbers.random() == expected[0]
    assert numbers.peek(4) == expected[1:5]
    assert [numbers.random() for _ in range(5)] == expected[1:]
