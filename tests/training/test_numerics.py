"""The guard against compilers that add up wrongly."""

import pytest

from dptrain.training import numerics


@pytest.mark.parametrize("contraction", [False, True])
def test_sums_are_right_at_the_shape_that_once_was_not(contraction):
  assert numerics._SHAPE == (8, 8, 32128)
  assert numerics.max_error_of_clipped_sum(contraction) < 1e-5


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_refuses_a_machine_that_adds_up_wrongly(monkeypatch, wrong, error):
  monkeypatch.setattr(
    numerics,
    "max_error_of_clipped_sum",
    lambda contraction=False: error if contraction == wrong else 1e-6,
  )
  with pytest.raises(RuntimeError, match=r"jaxlib .* wrongly .*0\.10\.1"):
    numerics.check_sums()


def test_accepts_this_machine():
  numerics.check_sums()
