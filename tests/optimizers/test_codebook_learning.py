"""Codebooks by running means and tables by larger steps, held to references."""

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dptrain.optimizers import adamw
from dptrain.optimizers import codebook_learning
from dptrain.optimizers import codebook_settings
from dptrain.optimizers import ngram_parameters
from dptrain.optimizers import sgd

K, S, V, D = 6, 3, 5, 2
BOOK = ("ngrammer", "codebook_0", "embedding")


def params_like(seed=0, columns=D):
  draw = np.random.default_rng(seed)
  book = draw.normal(size=(K, S + 1))
  book[:, -1] = 0.0
  parts = {
    "codebook_0": {"embedding": book},
    "codebook_1": {"embedding": book[::-1]},
    "table_0": {"embedding": draw.normal(size=(V, columns))},
    "right_table_0": {"embedding": draw.normal(size=(V, columns))},
  }
  tree = {"ngrammer": parts, "dense": {"kernel": draw.normal(size=(3, 2))}}
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def gradients_like(params, seed):
  draw = np.random.default_rng(seed)
  return jax.tree.map(
    lambda p: jnp.asarray(draw.normal(size=p.shape), jnp.float32), params
  )


def settings(**given):
  return codebook_settings.CodebookSettings(**given)


def watched(learning_rate=1.0):
  """Plain descent, and a list of the gradients and parameters it was given."""
  seen = []

  def update(gradients, state, params=None):
    seen.append((gradients, params))
    return jax.tree.map(lambda g: -learning_rate * g, gradients), state

  return optax.GradientTransformation(
    lambda _: optax.EmptyState(), update
  ), seen


def with_book(params, book):
  """Parameters whose first codebook is this one, and all else 0."""
  zeros = jax.tree.map(jnp.zeros_like, params)
  book = jnp.asarray(book, jnp.float32)
  parts = zeros["ngrammer"] | {"codebook_0": {"embedding": book}}
  return zeros | {"ngrammer": parts}


def book_of(tree):
  return np.asarray(tree["ngrammer"]["codebook_0"]["embedding"], np.float64)


def contribution(x, centres, weight=1.0, scale=1.0, heads=1):
  """Rows (D, N) of one example: the gradient of its term by the codebook."""
  ids = np.argmin(((x[:, None] - centres) ** 2).sum(-1), axis=1)
  rows = np.zeros((len(centres), x.shape[1] + 1))
  factor = weight / (len(x) * np.sqrt(heads))
  for vector, cluster in zip(x, ids, strict=True):
    rows[cluster, :-1] += factor * (vector - centres[cluster]) / scale
    rows[cluster, -1] += factor
  return rows


def praxis(x, centres, decay):
  """The layer's own rule, in float64; here every cluster is used."""
  ids = np.argmin(((x[:, None] - centres) ** 2).sum(-1), axis=1)
  hot = np.eye(len(centres))[ids]
  assert hot.sum(0).min() > 0
  means = hot.T @ x / hot.sum(0)[:, None]
  return decay * centres + (1 - decay) * means


@pytest.mark.parametrize("mass_decay", [None, 0.0])
def test_without_noise_it_is_the_running_mean_of_praxis(mass_decay):
  draw, decay = np.random.default_rng(0), 0.9
  centres = 10 * np.eye(K)[:, :S] + 20 * np.eye(K)[:, K - S :]
  params = params_like()
  book = np.concatenate([centres, np.zeros((K, 1))], axis=1)
  params = with_book(params, book)
  optimizer = codebook_learning.learn_codebooks(
    optax.sgd(1.0),
    settings(decay=decay, mass_decay=mass_decay),
    deviation_scale=0.3,
  )
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  for _ in range(5):
    # Counts may change only where masses do not lag behind them.
    counts = 4 if mass_decay is None else draw.integers(1, 8, K)
    ids = np.repeat(np.arange(K), counts)
    x = centres[ids] + draw.normal(size=(len(ids), S))
    rows = contribution(x, book_of(params)[:, :-1], 0.7, 0.3, heads=2)
    gradients = with_book(params, rows)
    updates, state = update(gradients, state, params, noise_variance=0.0)
    params = optax.apply_updates(params, updates)
    centres = praxis(x, centres, decay)
    np.testing.assert_allclose(book_of(params)[:, :-1], centres, rtol=2e-5)


def reference(book, rows, variances, given, scale, keys):
  """The rule in float64: centres, masses, how long empty, after all rows."""
  decay, d = given.decay, given.mass_decay
  d = decay if d is None else d
  raw, weight, noise = np.zeros(len(book)), 0.0, 0.0
  centres, shift = book[:, :-1].copy(), np.zeros(len(book))
  empty = np.zeros(len(book), int)
  for gradient, variance, key in zip(rows, variances, keys, strict=True):
    raw = d * (raw + shift * weight) + (1 - d) * gradient[:, -1]
    weight, shift = d * weight + (1 - d), np.zeros(len(book))
    noise = d**2 * noise + (1 - d) ** 2 * variance
    mass = raw / weight
    floor = max(given.min_mass, given.mass_floor * np.sqrt(noise) / weight)
    live = mass >= floor
    for k in np.flatnonzero(live):
      centres[k] += (1 - decay) * scale * gradient[k, :-1] / mass[k]
    empty = np.where(live, 0, empty + 1)
    choice, draw = jax.random.split(key)
    below = np.cumsum(np.where(live, mass, 0.0))
    points = np.asarray(jax.random.uniform(choice, mass.shape)) * below[-1]
    normal = np.asarray(jax.random.normal(draw, centres.shape), np.float64)
    due = np.flatnonzero(empty >= given.restart_after) if live.any() else []
    donors = [int(np.flatnonzero(below > points[k])[0]) for k in due]
    old = centres.copy()
    for k, donor in zip(due, donors, strict=True):
      size = np.sqrt(np.mean(old[donor] ** 2))
      centres[k] = old[donor] + given.restart_spread * size * normal[k]
      shift[k] = mass[donor] / (1 + donors.count(donor)) - mass[k]
      empty[k] = 0
    mass = mass + shift
  return centres, mass, empty


@pytest.mark.parametrize("mass_decay", [None, 0.5, 0.0])
def test_under_noise_it_is_the_rule_in_float64(mass_decay):
  draw, scale, updates = np.random.default_rng(1), 0.5, 12
  given = settings(
    decay=0.8, mass_decay=mass_decay, restart_after=3, seed=5, mass_floor=1.0
  )
  params = params_like()
  begun = book_of(params)
  counts = np.array([1.0, 0.6, 0.3, 0.0, 0.0, 0.1])
  variances = draw.uniform(0.01, 0.05, updates)
  rows = (
    draw.normal(size=(updates, K, S + 1)) * np.sqrt(variances)[:, None, None]
  )
  rows[:, :, -1] += counts
  optimizer = codebook_learning.learn_codebooks(
    sgd.sgd(0.1), given, deviation_scale=scale
  )
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  for gradient, variance in zip(rows, variances, strict=True):
    updated, state = update(
      with_book(params, gradient), state, params, noise_variance=variance
    )
    params = optax.apply_updates(params, updated)
  base = jax.random.key(5, impl="threefry2x32")
  keys = [
    jax.random.fold_in(jax.random.fold_in(base, step), 0)
    for step in range(1, updates + 1)
  ]
  centres, masses, empty = reference(begun, rows, variances, given, scale, keys)
  found = book_of(params)
  np.testing.assert_allclose(found[:, :-1], centres, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found[:, -1], masses, rtol=1e-4, atol=1e-5)
  told = state.empty_for["ngrammer"]["codebook_0"]["embedding"]
  np.testing.assert_array_equal(told, empty)
  # What the comparison is for did happen: clusters were empty, and restarted.
  moved = np.abs(found[:, :-1] - begun[:, :-1]).max(axis=1)
  assert moved[3] > 0
  assert moved[4] > 0


def learnt(rows, variance=0.0, params=None, **given):
  """The first codebook after updates by these rows."""
  params = params_like() if params is None else params
  optimizer = codebook_learning.learn_codebooks(sgd.sgd(0.1), settings(**given))
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  for gradient in rows:
    updates, state = update(
      with_book(params, gradient), state, params, noise_variance=variance
    )
    params = optax.apply_updates(params, updates)
  return np.asarray(params["ngrammer"]["codebook_0"]["embedding"])


def test_empty_clusters_keep_their_centres_to_the_bit():
  rows = np.zeros((K, S + 1))
  rows[0] = 1.0
  rows[1:, :-1] = 5.0  # deviations of clusters that nothing was assigned to
  rows[1, -1] = 0.4  # below three deviations of the noise
  rows[2, -1] = -2.0
  begun = np.asarray(params_like()["ngrammer"]["codebook_0"]["embedding"])
  found = learnt([rows] * 3, 0.04, restart_after=0, mass_decay=0.0)
  np.testing.assert_array_equal(found[1:, :-1], begun[1:, :-1])
  assert (found[0, :-1] != begun[0, :-1]).all()


def test_restarts_are_of_the_state_and_the_released_alone():
  rows = np.zeros((K, S + 1))
  rows[0, -1], rows[1, -1] = 3.0, 1.0
  given = {"restart_after": 2, "mass_decay": 0.0, "restart_spread": 0.01}
  one, same = (learnt([rows] * 2, 1e-4, **given) for _ in range(2))
  np.testing.assert_array_equal(one, same)
  begun = np.asarray(params_like()["ngrammer"]["codebook_0"]["embedding"])
  for cluster in range(2, K):
    beside = np.abs(one[cluster, :-1] - begun[:2, :-1]).max(axis=1)
    assert 0 < beside.min() < 0.1
    assert one[cluster, -1] <= 3.0 / 2
  np.testing.assert_array_equal(one[:2, :-1], begun[:2, :-1])
  other = learnt([rows] * 2, 1e-4, seed=1, **given)
  assert (other[2:, :-1] != one[2:, :-1]).all()
  early = learnt([rows], 1e-4, **given)
  np.testing.assert_array_equal(early[2:, :-1], begun[2:, :-1])


def test_where_all_are_empty_nothing_restarts():
  begun = np.asarray(params_like()["ngrammer"]["codebook_0"]["embedding"])
  found = learnt([np.zeros((K, S + 1))] * 4, 1.0, restart_after=1)
  np.testing.assert_array_equal(found, begun)


@pytest.mark.parametrize("learning", ["private", "frozen", "unprotected"])
@pytest.mark.parametrize("frozen_dict", [False, True])
def test_the_optimizer_within_never_sees_codebooks(learning, frozen_dict):
  inner, seen = watched()
  optimizer = codebook_learning.learn_codebooks(inner, learning=learning)
  params = {"model": params_like(), "canaries": jnp.ones(2)}
  gradients = gradients_like(params, 1)
  if frozen_dict:
    params, gradients = map(flax.core.freeze, (params, gradients))
  updates, state = optimizer.update(
    gradients, optimizer.init(params), params, noise_variance=0.0
  )
  assert jax.tree.structure(updates) == jax.tree.structure(params)
  assert isinstance(updates, flax.core.FrozenDict) == frozen_dict
  for tree in seen[0]:
    assert set(tree) == {"model", "canaries"}
    assert set(tree["model"]["ngrammer"]) == {"table_0", "right_table_0"}
  moved = any(
    np.any(updates["model"]["ngrammer"][f"codebook_{h}"]["embedding"])
    for h in range(2)
  )
  assert moved == (learning != "frozen")
  assert state.steps == 1
  np.testing.assert_array_equal(updates["canaries"], -gradients["canaries"])


def test_centres_learn_by_gradient_and_masses_stay():
  inner, seen = watched()
  optimizer = codebook_learning.learn_codebooks(
    inner, settings(centre_rate=2.0), learning="gradient"
  )
  params = params_like()
  gradients = gradients_like(params, 1)
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  given, rows = book_of(seen[0][0]), book_of(gradients)
  np.testing.assert_array_equal(given[:, -1], 0.0)
  np.testing.assert_array_equal(given[:, :-1], rows[:, :-1])
  np.testing.assert_allclose(book_of(updates)[:, :-1], -2 * rows[:, :-1])
  np.testing.assert_array_equal(book_of(updates)[:, -1], 0.0)


@pytest.mark.parametrize("decays", [False, True])
def test_tables_have_a_rate_of_their_own(decays):
  inner = sgd.sgd(0.1, momentum=0.0, weight_decay=0.5)
  optimizer = codebook_learning.learn_codebooks(
    inner, settings(table_rate=3.0, weight_decay=decays)
  )
  params = params_like()
  gradients = gradients_like(params, 1)
  updates, _ = optimizer.update(
    gradients, optimizer.init(params), params, noise_variance=0.0
  )
  for name in ("table_0", "right_table_0"):
    g, p, u = (
      tree["ngrammer"][name]["embedding"]
      for tree in (gradients, params, updates)
    )
    expected = -0.3 * (g + (0.5 * p if decays else 0.0))
    np.testing.assert_allclose(u, expected, rtol=1e-5)
  g, p, u = (tree["dense"]["kernel"] for tree in (gradients, params, updates))
  np.testing.assert_allclose(u, -0.1 * (g + 0.5 * p), rtol=1e-5)


@pytest.mark.parametrize("variance", [0.0, 0.04])
def test_rows_move_whose_noisy_count_passes(variance):
  least = 2.5 * np.sqrt(variance)
  counts = np.array([0.0, least * 0.99, least * 1.01 + 1e-6, -1.0, 2.0])
  optimizer = codebook_learning.learn_codebooks(
    adamw.adamw(0.1, weight_decay=0.0),
    settings(row_threshold=2.5),
    select_rows=True,
  )
  params = params_like(columns=D + 1)
  state = optimizer.init(params)
  first = gradients_like(params, 1)
  every = jnp.full(V, 10.0)

  def counted(gradients, counts):
    parts = dict(gradients["ngrammer"])
    table = parts["table_0"]["embedding"].at[:, -1].set(counts)
    parts["table_0"] = {"embedding": table}
    return gradients | {"ngrammer": parts}

  # Rows have momentum from an update in which all of them were touched.
  updates, state = optimizer.update(
    counted(first, every), state, params, noise_variance=variance
  )
  table = np.asarray(updates["ngrammer"]["table_0"]["embedding"])
  assert (table[:, :-1] != 0).all()
  np.testing.assert_array_equal(table[:, -1], 0.0)
  updates, state = optimizer.update(
    counted(first, counts), state, params, noise_variance=variance
  )
  table = np.asarray(updates["ngrammer"]["table_0"]["embedding"])
  moved = (table[:, :-1] != 0).all(axis=1)
  np.testing.assert_array_equal(moved, [False, False, True, False, True])
  assert (table[~moved] == 0).all()
  np.testing.assert_array_equal(table[:, -1], 0.0)


def test_rows_of_noise_alone_stand_still():
  """As many as the normal distribution says: at 4 deviations 3 of 100,000."""
  rows, variance = 100_000, 0.25
  book = params_like()["ngrammer"]["codebook_0"]
  params = {
    "ngrammer": {
      "codebook_0": book,
      "table_0": {"embedding": jnp.zeros((rows, 2))},
    }
  }
  optimizer = codebook_learning.learn_codebooks(
    optax.sgd(1.0), learning="frozen", select_rows=True
  )
  noise = 0.5 * jax.random.normal(jax.random.key(0), (rows, 2))
  gradients = {
    "ngrammer": {
      "codebook_0": jax.tree.map(jnp.zeros_like, book),
      "table_0": {"embedding": noise},
    }
  }
  updates, _ = jax.jit(optimizer.update)(
    gradients, optimizer.init(params), params, noise_variance=variance
  )
  assert np.count_nonzero(updates["ngrammer"]["table_0"]["embedding"]) <= 15


def test_mistakes_are_named():
  for given, message in (
    ({"decay": 1.0}, "CodebookSettings.decay=1.0"),
    ({"mass_decay": -0.1}, "CodebookSettings.mass_decay=-0.1"),
    ({"min_mass": 0.0}, "CodebookSettings.min_mass=0.0"),
    ({"mass_floor": -1.0}, "CodebookSettings.mass_floor=-1.0"),
    ({"restart_after": 1.5}, "CodebookSettings.restart_after=1.5"),
    ({"restart_spread": -1.0}, "CodebookSettings.restart_spread=-1.0"),
    ({"table_rate": 0.0}, "CodebookSettings.table_rate=0.0"),
    ({"row_threshold": float("nan")}, "CodebookSettings.row_threshold=nan"),
    ({"weight_decay": 1}, "CodebookSettings.weight_decay=1"),
  ):
    with pytest.raises(ValueError, match=message):
      settings(**given)
  make, params = codebook_learning.learn_codebooks, params_like()
  with pytest.raises(ValueError, match="learning='mine' is unknown"):
    make(sgd.sgd(0.1), learning="mine")
  with pytest.raises(ValueError, match=r"deviation_scale=0\.0"):
    make(sgd.sgd(0.1), deviation_scale=0.0)
  with pytest.raises(ValueError, match="found no ngrammer/codebook_0"):
    make(sgd.sgd(0.1)).init({"kernel": jnp.ones(2)})
  narrow = {"ngrammer": {"codebook_0": {"embedding": jnp.ones((6, 1))}}}
  with pytest.raises(ValueError, match=r"codebook of shape \(6, 1\)"):
    make(sgd.sgd(0.1)).init(narrow)
  pair = {"codebook_1": {"embedding": jnp.ones((6, 3))}}
  pair |= {"codebook_0": {"embedding": jnp.ones((6, 2))}}
  with pytest.raises(
    ValueError, match=r"several shapes \(\(6, 2\), \(6, 3\)\)"
  ):
    make(sgd.sgd(0.1)).init({"ngrammer": pair})
  optimizer = make(sgd.sgd(0.1))
  with pytest.raises(ValueError, match="no noise_variance, which says"):
    optimizer.update(params, optimizer.init(params), params)
  with pytest.raises(ValueError, match="no params"):
    optimizer.update(params, optimizer.init(params))


def test_names_are_those_of_the_layer_alone():
  is_codebook, is_table = (
    ngram_parameters.is_codebook,
    ngram_parameters.is_table,
  )
  assert is_codebook(BOOK)
  assert is_codebook(("model", *BOOK))
  assert is_table(("ngrammer", "right_table_12", "embedding"))
  for path in (
    ("codebook_0", "embedding"),
    ("other", "codebook_0", "embedding"),
    ("ngrammer", "codebook", "embedding"),
    ("ngrammer", "codebook_0", "kernel"),
    ("ngrammer", "left_table_0", "embedding"),
    (),
  ):
    assert not is_codebook(path)
    assert not is_table(path)
