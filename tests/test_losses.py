"""Auxiliary losses, by hand."""

import math

import pytest
import torch

from training.losses import Counted, alignment_loss, character_loss, sampled_tokens, token_losses


def test_character_loss_of_even_odds_is_the_logarithm_of_the_classes():
    # 2 patches, 2 slots, 4 classes, no preference: every slot costs ln 4, whatever it weighs
    loss, _ = character_loss(torch.zeros(1, 2, 8), torch.tensor([[[1, 0], [0, 3]]]))
    assert float(loss.mean) == pytest.approx(math.log(4))


def test_empty_slots_weigh_a_tenth():
    # slot 1 shows class 1 and gives it 3/4; slot 2 is empty and gives "no character" 1/4
    logits = torch.tensor([[[0.0, math.log(3), 0.0, math.log(3)]]])  # (1 patch, 2 slots x 2 classes)
    loss, right = character_loss(logits, torch.tensor([[[1, 0]]]))
    assert float(loss.mean) == pytest.approx((math.log(4 / 3) + 0.1 * math.log(4)) / 1.1)
    assert float(right.mean) == 1.0


def test_accuracy_counts_filled_slots_only():
    logits = torch.tensor([[[9.0, 0, 0, 0, 9, 0], [0.0, 0, 9, 9, 0, 0]]])  # names 0, 1 and then 2, 0
    classes = torch.tensor([[[0, 1], [1, 0]]])
    _, right = character_loss(logits, classes)
    assert float(right.mean) == pytest.approx(1 / 2)  # of the two filled slots one is named right


def test_no_character_at_all_is_no_division_by_zero():
    loss, right = character_loss(torch.zeros(1, 2, 4), torch.zeros(1, 2, 2, dtype=torch.long))
    assert float(loss.mean) == pytest.approx(math.log(2))
    assert float(right.mean) == 0.0


def attention(*rows: list[float]) -> torch.Tensor:
    """`(1, 1, T, T)`"""
    return torch.tensor([[list(rows)]])


def test_position_t_is_taught_to_look_where_label_t_plus_1_stands():
    weights = attention([1, 0, 0, 0], [0.25, 0.75, 0, 0], [0.5, 0.25, 0.25, 0], [0.1, 0.2, 0.3, 0.4])
    places = torch.tensor([[-1, -1, 1, 0]])
    # the label at 2 shows visual token 1: position 1 must look there (3/4); that at 3 shows 0: position 2 looks (1/2)
    loss, peaks = alignment_loss((attention(*[[9.0] * 4] * 4), weights), places)
    assert float(loss.mean) == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    assert float(peaks.mean) == 1.0


def test_layers_are_averaged_and_the_last_one_counts_for_accuracy():
    half, tenth = attention([0.5, 0.5], [0, 1]), attention([0.1, 0.9], [0, 1])
    loss, peaks = alignment_loss((half, half, tenth), torch.tensor([[-1, 0]]))
    assert float(loss.mean) == pytest.approx((math.log(2) + math.log(10)) / 2)
    assert float(peaks.mean) == 0.0


def test_only_the_first_head_is_taught():
    weights = torch.cat([attention([0.5, 0.5], [0, 1]), attention([0.0, 1.0], [0, 1])], dim=1)
    loss, _ = alignment_loss((weights, weights), torch.tensor([[-1, 0]]))
    assert float(loss.mean) == pytest.approx(math.log(2))
    other, _ = alignment_loss((weights, weights), torch.tensor([[-1, 1]]), head=1)
    assert float(other.mean) == pytest.approx(0.0)


def test_labels_that_show_nothing_are_left_out():
    weights = attention([0.5, 0.5], [0, 1])
    loss, peaks = alignment_loss((weights, weights), torch.tensor([[-1, -1]]))
    assert (float(loss.mean), float(peaks.mean)) == (0.0, 0.0)


def test_a_decoder_of_one_layer_cannot_be_aligned():
    with pytest.raises(ValueError, match="at least 2 layers"):
        alignment_loss((attention([1.0, 0.0], [0, 1]),), torch.tensor([[-1, 0]]))


def test_attention_of_zero_gives_a_finite_loss():
    weights = attention([0.0, 1.0], [0, 1])
    loss, _ = alignment_loss((weights, weights), torch.tensor([[-1, 0]]))
    assert float(loss.mean) == pytest.approx(math.log(1e6), rel=1e-3)


# -- tokens, and the random subset C ---------------------------------------------------------------

# SplitMix64's first numbers from the state 1234567, from the literature
SPLITMIX = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.4, 0.6, 0.9])
def test_tokens_are_sampled_by_the_splitmix_numbers_of_their_row(ratio):
    given = sampled_tokens(torch.tensor([[1234567]]), torch.arange(5), ratio)
    assert given.tolist() == [[number / 2**64 < ratio for number in SPLITMIX]]


def test_of_every_row_and_every_token_the_ratio_is_sampled():
    seeds = torch.randint(0, 2**63 - 1, (400, 1), generator=torch.Generator().manual_seed(0))
    for rows in (seeds, torch.arange(400)[:, None]):  # seeds that are neighbours are as good
        mask = sampled_tokens(rows, torch.arange(400), 0.3).float()
        assert float(mask.mean()) == pytest.approx(0.3, abs=0.006)  # 5 deviations
        assert float(mask.mean(dim=0).std()) == pytest.approx((0.3 * 0.7 / 400) ** 0.5, rel=0.2)
        assert float(mask.mean(dim=1).std()) == pytest.approx((0.3 * 0.7 / 400) ** 0.5, rel=0.2)
    assert sampled_tokens(seeds, torch.arange(9), 1.0).all()


def test_token_losses_by_hand():
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0], [5.0, 1.0]]])
    given = token_losses(logits, torch.tensor([[1, 0, -100]]))
    torch.testing.assert_close(given, torch.tensor([[math.log(4 / 3), math.log(2), 0.0]]))


def test_the_mean_of_nothing_is_zero():
    assert float(Counted(torch.tensor(0.0), torch.tensor(0)).mean) == 0.0
