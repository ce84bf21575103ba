"""Labels at the ends of lines keep apart."""

import numpy as np
import pytest

from cifar10_resnet.figures.lines import marked, spread


def test_labels_keep_their_order_and_a_gap_and_move_no_further_than_they_must():
    rng = np.random.default_rng(0)
    for _ in range(100):
        values = list(rng.uniform(0, 1, rng.integers(1, 6)))
        places = np.array(spread(values, 0.1))
        assert (np.diff(places[np.argsort(values)]) >= 0.1 - 1e-9).all()
        assert places.min() >= -1e-9
        assert places.max() <= 1 + 1e-9
    assert spread([0.5, 0.1, 0.9], 0.1) == pytest.approx([0.5, 0.1, 0.9])
    assert spread([0.5, 0.55], 0.1) == pytest.approx([0.475, 0.575])
    assert spread([1, 1], 0.1) == pytest.approx([0.9, 1])  # no room above


def test_more_labels_than_there_is_room_for_share_the_room():
    assert spread([0.5] * 5, 0.4) == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("count", [1, 2, 8, 41, 1000])
def test_a_line_has_about_eight_markers_and_one_at_its_end(count):
    places = marked(count)
    assert places[-1] == count - 1
    assert len(places) == len(set(places)) <= 17
