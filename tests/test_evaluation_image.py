"""Claims about the image evaluation, with vectors small enough to do by hand."""

import numpy as np
import pytest

from training.evaluation.image import (
    bootstrap_interval,
    knn_correct,
    linear_cka,
    zero_shot_ranks,
)

EAST, NORTH, NORTH_EAST = [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]


def test_neighbours_of_the_same_style_do_not_count():
    # Each picture's twin has its own style and its own label; across styles the labels are swapped.
    features = [EAST, EAST, NORTH, NORTH]
    styles = ["ink", "ink", "oil", "oil"]
    assert knn_correct(features, ["a", "a", "b", "b"], styles, k=1).mean() == 0.0
    assert knn_correct(features, ["a", "a", "b", "b"], ["ink", "oil", "ink", "oil"], k=1).mean() == 1.0


def test_the_majority_of_k_neighbours_wins():
    # The query points east. Nearest is one "b", then two "a": with one vote it is wrong, with three it is right.
    features = [EAST, [1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [-1.0, 0.0], [-1.0, 0.1], [-1.0, 0.2]]
    labels = ["a", "b", "a", "a", "c", "c", "c"]
    styles = ["query", "x", "x", "x", "y", "y", "y"]
    assert not knn_correct(features, labels, styles, k=1)[0]
    assert knn_correct(features, labels, styles, k=3)[0]


def test_equal_votes_go_to_the_nearer_kind():
    features = [EAST, [1.0, 0.1], [1.0, 0.5]]
    assert knn_correct(features, ["a", "a", "b"], ["q", "x", "y"], k=2)[0]
    assert not knn_correct(features, ["a", "b", "a"], ["q", "x", "y"], k=2)[0]


def test_neighbours_ignore_the_length_of_features():
    features = [EAST, [100.0, 0.0], [0.0, 0.001], [0.0, 7.0]]
    assert knn_correct(features, ["a", "a", "b", "b"], ["p", "q", "p", "q"], k=1).mean() == 1.0


@pytest.mark.parametrize(
    ("labels", "styles", "k", "message"),
    [
        (["a"], ["p", "q"], 1, "1 labels"),
        (["a", "b"], ["p", "p"], 1, "fewer than k"),
        (["a", "b"], ["p", "q"], 0, "at least 1"),
    ],
)
def test_knn_refuses_what_it_cannot_score(labels, styles, k, message):
    with pytest.raises(ValueError, match=message):
        knn_correct([EAST, NORTH], labels, styles, k)


def test_knn_refuses_features_that_are_not_finite():
    with pytest.raises(ValueError, match="not finite"):
        knn_correct([EAST, [np.nan, 0.0]], ["a", "b"], ["p", "q"], 1)


def test_zero_shot_top1_and_top5_by_hand():
    classes = np.eye(6)
    images = [
        [9, 1, 0, 0, 0, 0],  # right at once: class 0
        [9, 1, 0.5, 0.4, 0.3, 0.2],  # class 4 is fifth
        [9, 1, 0.5, 0.4, 0.3, 0.2],  # class 5 is sixth
        [0, 0, 0, 2, 0, 0],  # right at once: class 3
    ]
    labels = [0, 4, 5, 3]
    assert zero_shot_ranks(images, classes, labels).tolist() == [0, 4, 5, 0]
    ranks = zero_shot_ranks(images, classes, labels)
    assert ((ranks < 1).mean(), (ranks < 5).mean()) == (0.5, 0.75)


def test_equal_embeddings_score_nothing():
    assert (zero_shot_ranks(np.ones((3, 2)), np.ones((4, 2)), [0, 1, 2]) > 0).all()


def test_a_label_beyond_the_classes_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 2\)"):
        zero_shot_ranks([EAST], [EAST, NORTH], [2])


def test_cka_is_one_up_to_rotation_shift_and_scale():
    x = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    rotated = x @ np.array([[0.0, 1.0], [-1.0, 0.0]]) * 5 + 7
    assert linear_cka(x, rotated) == pytest.approx(1.0)


def test_cka_of_uncorrelated_columns_is_zero():
    assert linear_cka([[1.0], [1.0], [-1.0], [-1.0]], [[1.0], [-1.0], [1.0], [-1.0]]) == pytest.approx(0.0)


def test_cka_by_hand_where_one_of_two_equal_columns_is_shared():
    # x has two orthogonal columns of one length, y is the first: |x'y|^2 / (|x'x| |y'y|) = 16 / (4 sqrt(2) * 4).
    x = [[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]
    assert linear_cka(x, [[1.0], [1.0], [-1.0], [-1.0]]) == pytest.approx(1 / np.sqrt(2))


def test_cka_of_constant_features_is_refused():
    with pytest.raises(ValueError, match="constant"):
        linear_cka([[1.0], [1.0]], [[1.0], [2.0]])


def test_interval_of_equal_values_has_no_width():
    assert bootstrap_interval([1.0] * 9) == (1.0, 1.0)


def test_interval_matches_the_normal_approximation():
    # 400 coin throws, half heads: 0.5 +- 1.96 * sqrt(0.25 / 400) = 0.451 to 0.549.
    low, high = bootstrap_interval([0, 1] * 200)
    assert low == pytest.approx(0.451, abs=0.006)
    assert high == pytest.approx(0.549, abs=0.006)


def test_interval_is_the_same_for_the_same_seed_and_wider_for_groups_that_agree():
    values = [0] * 50 + [1] * 50
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    groups = [i // 10 for i in range(100)]  # ten groups of ten equal values: sqrt(10) times the width
    low, high = bootstrap_interval(values)
    group_low, group_high = bootstrap_interval(values, groups)
    assert 2.5 < (group_high - group_low) / (high - low) < 4.0


def test_interval_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])
