"""One update followed from the draw to the ledger, inside the real loop."""

import jax
import pytest
import small_run

from dptrain.privacy import accounting
from dptrain.privacy import sampling
from dptrain.training import loop


@pytest.fixture
def draws(monkeypatch):
  """(sampling_prob, size) of every draw that the loop makes."""
  seen, draw = [], sampling.poisson

  def spy(key, num_examples, sampling_prob):
    sample = draw(key, num_examples, sampling_prob)
    seen.append((sampling_prob, sample.size))
    return sample

  monkeypatch.setattr(sampling, "poisson", spy)
  return seen


def test_the_sampler_draws_with_the_probability_that_is_priced(tmp_path, draws):
  small_run.train(tmp_path)
  told = small_run.ledger_lines(tmp_path, "release")
  assert [prob for prob, _ in draws] == [r["sampling_prob"] for r in told]
  result = accounting.epsilon(
    [accounting.Releases(1, prob, 4.0) for prob, _ in draws], 1e-5
  )
  assert small_run.train(tmp_path).epsilon == result.value


@pytest.fixture
def finishing(monkeypatch):
  """Sees, and may stop, what the loop hands to `PrivateStep.finish`."""
  seen, init = [], loop._Loop.__init__

  def spied_init(self, *args):
    init(self, *args)
    finish = self.finish

    def spy(*args, **named):
      seen.append(named)
      return finish(*args, **named)

    self.finish = spy

  monkeypatch.setattr(loop._Loop, "__init__", spied_init)
  return seen


def test_the_sum_is_divided_by_the_public_size_in_the_loop(
  tmp_path, draws, finishing
):
  small_run.train(tmp_path, steps=4)
  divisors = [named["expected_batch_size"] for named in finishing]
  assert divisors == [20, 20, 40, 40]
  assert [size for _, size in draws] != divisors


def test_every_record_that_is_drawn_takes_part(tmp_path, draws, monkeypatch):
  init, taken = loop._Loop.__init__, []

  def spied_init(self, *args):
    init(self, *args)
    accumulate, finish = self.accumulate, self.finish

    def counted(params, accumulator, batch, key):
      taken[-1] += int((~batch["is_padding"]).sum())
      return accumulate(params, accumulator, batch, key)

    def finished(*args, **named):
      taken.append(0)
      return finish(*args, **named)

    self.accumulate, self.finish = counted, finished

  monkeypatch.setattr(loop._Loop, "__init__", spied_init)
  taken.append(0)
  small_run.train(tmp_path)
  assert taken == [size for _, size in draws] + [0]


def test_the_ledger_is_written_before_the_parameters_move(
  tmp_path, monkeypatch
):
  init = loop._Loop.__init__

  def killed(*args, **named):
    raise RuntimeError("killed here")

  def spied_init(self, *args):
    init(self, *args)
    self.finish = killed

  monkeypatch.setattr(loop._Loop, "__init__", spied_init)
  with pytest.raises(RuntimeError, match="killed here"):
    small_run.train(tmp_path)
  lines = small_run.ledger_lines(tmp_path, "release")
  assert [line["step"] for line in lines] == [0]


def test_each_update_has_a_noise_of_its_own(tmp_path, finishing):
  small_run.train(tmp_path, steps=4)
  keys = [jax.random.key_data(named["noise_key"]) for named in finishing]
  assert len({tuple(map(int, key)) for key in keys}) == 4
