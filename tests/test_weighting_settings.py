"""The weighter as an object: the bounds of its settings, its state, and what it gives out."""

import pytest
import torch

from comet_meta import SoftConfidentWeighter


def test_the_bounds_of_the_settings():
    for options in ({"kappa": 0.0}, {"contamination": 0.0}, {"momentum": 0.0}, {"num_samples": 1}):
        SoftConfidentWeighter(**options)
    for options, message in (
        ({"kappa": -0.1}, "kappa is -0.1; expected >= 0"),
        ({"kappa": float("nan")}, "kappa is nan"),
        ({"contamination": 0.5}, "contamination is 0.5; expected a share in"),
        ({"contamination": -0.1}, "contamination is -0.1"),
        ({"contamination": float("nan")}, "contamination is nan"),
        ({"contamination": "some"}, "contamination is 'some'"),
        ({"precaution": 0.6}, "precaution is 0.6; expected a fraction in"),
        ({"precaution": -0.1}, "precaution is -0.1"),
        ({"precaution": float("nan")}, "precaution is nan"),
        ({"precaution": "auto"}, "precaution is 'auto'"),
        ({"precaution": 0.1, "rule": "hard"}, "precaution goes with rule='trimmed'"),
        ({"momentum": 1.0}, "momentum is 1.0; expected a share in"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"num_samples": 0}, "num_samples is 0; expected"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            SoftConfidentWeighter(**options)


def test_the_settings_show():
    def tame(scores):
        return torch.ones_like(scores)

    shown = repr(SoftConfidentWeighter(3, rule="hard", momentum=0.5))
    assert shown == "SoftConfidentWeighter(num_samples=3, rule='hard', momentum=0.5)"
    assert "rule='tame'" in repr(SoftConfidentWeighter(rule=tame))


def test_state_survives_saving_also_into_a_weighter_of_unknown_size():
    saved = SoftConfidentWeighter(30)
    saved.fit(torch.randn(30))
    saved.update(torch.tensor([3, 4]), torch.tensor([0.1, 0.2]))
    for restored in (SoftConfidentWeighter(30), SoftConfidentWeighter()):
        restored.load_state_dict(saved.state_dict())
        assert torch.equal(restored.scores, saved.scores)
        assert torch.equal(restored(), saved())
        assert torch.equal(restored.threshold, saved.threshold)
        assert restored._updates == 2


def test_asking_for_a_sample_makes_room_for_it():
    weighter = SoftConfidentWeighter()
    assert weighter([3, 5]).tolist() == [1, 1]
    assert len(weighter()) == len(weighter.scores) == 6
    assert weighter([0]).tolist() == [1]
    assert len(weighter()) == 6  # and never takes it back
    with pytest.raises(IndexError, match="out of range for 5 samples"):
        SoftConfidentWeighter(5)([5])


def test_all_weights_are_given_as_a_copy():
    weighter = SoftConfidentWeighter(5)
    weighter().zero_()
    assert weighter().tolist() == [1] * 5
