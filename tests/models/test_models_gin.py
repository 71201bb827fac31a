import pathlib
import re

import jax
import pytest

from dptrain import configuration
from dptrain.models import bert
from dptrain.models import losses
from dptrain.models import masked_lm
from dptrain.models import ngrammer
import gin

GIN = pathlib.Path(__file__).parents[2] / "gin" / "models"
SHAPES = {  # layers, width, heads: arXiv 2501.18914
  "tiny": (2, 128, 2),
  "mini": (4, 256, 4),
  "small": (4, 512, 8),
  "base": (12, 768, 12),
  "large": (24, 1024, 16),
}
AUGMENTED = ("tiny", "mini", "small", "base")
FILES = [
  *(f"bert_{name}" for name in SHAPES),
  *(f"ngrammer_{name}" for name in AUGMENTED),
]


@pytest.fixture(autouse=True)
def _clean_gin():
  gin.clear_config()
  # Where, and how, dptrain looks for what a file includes.
  with configuration._searching([str(GIN.parent)]):
    yield
  gin.clear_config()


def load(name, vocabulary=30522, bindings=()):
  gin.parse_config_files_and_bindings(
    [str(GIN / f"{name}.gin")],
    [
      f"VOCABULARY_SIZE = {vocabulary}",
      *bindings,
    ],
  )
  return gin.get_configurable(masked_lm.MaskedLanguageModel)()


def test_every_file_is_tested():
  assert {f.name for f in GIN.glob("*.gin")} == {f"{f}.gin" for f in FILES}


@pytest.mark.parametrize("file", FILES)
def test_builds_the_stated_model_with_the_stated_count(file):
  model = load(file)
  _, name = file.split("_")
  assert type(model) is masked_lm.MaskedLanguageModel
  assert isinstance(model.bert, bert.Bert)
  layers, width, heads = SHAPES[name]
  encoder = model.bert
  assert (encoder.num_layers, encoder.width) == (layers, width)
  assert (encoder.num_heads, encoder.head_size) == (heads, 64)
  model.check(512, 30522)

  text = (GIN / f"{file}.gin").read_text()
  stated, per_entry = (
    int(x.replace(",", ""))
    for x in re.search(
      r"# ([\d,]+) parameters at VOCABULARY_SIZE = 30522;.*"
      r"\n.* counts ([\d,]+)\.",
      text,
    ).groups()
  )
  key = jax.random.key(0, impl="threefry2x32")
  params = jax.eval_shape(model.init, key)
  assert masked_lm.num_parameters(params) == stated
  assert per_entry == width + 1
  if file.startswith("bert_"):
    assert encoder.ngrammer is None
    return
  assert isinstance(encoder.ngrammer, ngrammer.NGrammerSettings)
  own = re.search(r"\. Of these, ([\d,]+) are the N-Grammer's\.", text)[1]
  found = masked_lm.num_parameters(params["ngrammer"])
  assert found == int(own.replace(",", ""))
  # The BERT of that name, and nothing else.
  gin.clear_config()
  plain = load(f"bert_{name}")
  assert plain.bert == encoder.clone(ngrammer=None)


def test_the_model_macro_is_the_model():
  load("bert_tiny", vocabulary=100)
  assert "MaskedLanguageModel" in repr(gin.query_parameter("%MODEL"))


def test_the_tiny_model_trains_one_step():
  model = load("bert_tiny", vocabulary=100)
  key = jax.random.key(0, impl="threefry2x32")
  params = jax.jit(model.init)(key)
  ones = jax.numpy.ones((2, 4), "int32")
  batch = {"inputs": ones, "positions": ones, "labels": ones, "weights": ones}
  grads = jax.jit(jax.grad(lambda p: model.losses(p, batch)[0].sum()))(params)
  assert grads["output_bias"]["bias"].shape == (100,)


def test_a_loss_is_bound_as_the_documentation_says():
  assert load("bert_tiny").loss == losses.CrossEntropy()
  gin.clear_config()
  told = (GIN.parents[1] / "docs" / "losses.md").read_text()
  (bindings,) = re.findall(r"```\n(from __gin__ .*?)```", told, re.DOTALL)
  lines = [line for line in bindings.splitlines() if "include" not in line]
  model = load("bert_tiny", bindings=[line for line in lines if line])
  assert model.loss == losses.MinimumEntropy(
    losses.BiTempered(t1=0.8, t2=1.2), weight=0.1
  )
