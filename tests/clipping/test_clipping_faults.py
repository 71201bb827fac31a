"""Faults put in on purpose: each must be seen, or the tests see nothing."""

import dataclasses
import functools

import clipped_models
import clipping_cases
import flax.linen as nn
import jax.numpy as jnp
import pytest

from dptrain.clipping import book_keeping
from dptrain.clipping import dense_layers
from dptrain.clipping import layer_rules
from dptrain.clipping import marks
from dptrain.clipping import methods
from dptrain.clipping import per_example
from dptrain.clipping import products
from dptrain.clipping import survey
from dptrain.clipping import taps


def check(name, method):
  loss_fn, params, batch = clipping_cases.CASES[name]()
  methods.check_against_vmap(
    loss_fn, params, batch, clipped_models.keys_of(batch), method=method
  )


@functools.cache
def check_once(name, method):
  check(name, method)


def no_cross_term(patch):
  def nothing(ids, gradients, queries, logit_gradients):
    return jnp.zeros(ids.shape[0])

  patch.setattr(products, "lookup_attend_products", nothing)


def uses_not_joined(patch):
  right = book_keeping._product_squares

  def apart(uses, left, right_, grams):
    rows = left.shape[2] // len(uses)
    parts = [
      right([use], left[:, :, i : i + rows], right_[:, :, i : i + rows], {})
      for i, use in zip(range(0, left.shape[2], rows), uses, strict=True)
    ]
    return sum(parts)

  patch.setattr(book_keeping, "_product_squares", apart)


def no_id_mask(patch):
  def unmasked(ids, gradients):
    return jnp.sum(products.gram(gradients), axis=(1, 2, 3))

  patch.setattr(products, "lookup_squares", unmasked)


def biases_skipped(patch):
  right = per_example.squares
  patch.setattr(per_example, "squares", lambda g: 0 * right(g))


def second_call_forgotten(patch):
  right = book_keeping._uses_by_weight

  def first_only(uses):
    return right(tuple(use for use in uses if use.number == 0))

  patch.setattr(book_keeping, "_uses_by_weight", first_only)


def first_iteration_only(patch):
  right = taps.captured

  def first(uses, handed_out):
    return {
      name: seen._replace(gradients=seen.gradients.at[:, 1:].set(0))
      for name, seen in right(uses, handed_out).items()
    }

  patch.setattr(taps, "captured", first)


def first_squares_only(patch):
  right = book_keeping._differentiate

  def first(*args):
    own, handed_out, losses, aux = right(*args)
    for path in handed_out:
      if path == taps.squares_path(path):
        handed_out[path] = handed_out[path].at[:, 1:].set(0)
    return own, handed_out, losses, aux

  patch.setattr(book_keeping, "_differentiate", first)


def derivatives_not_noticed(patch):
  patch.setattr(marks, "other_use", lambda weight: jnp.ones(()))
  zeros_not_in_place(patch)  # it would notice, too


def shared_inputs_not_heard(patch):
  patch.setattr(survey, "_heard", lambda *args: args[-1])


def zeros_not_in_place(patch):
  patch.setattr(survey, "_in_place", lambda *args: args[-1])


def any_promotion(patch):
  patch.setattr(dense_layers, "is_plain", lambda module: True)


def marks_without_numbers(patch):
  def any_layer(jaxpr, var, number):
    return marks.meetings(
      jaxpr, var, lambda eqn, places: eqn.primitive is marks._layer_p
    )

  patch.setattr(marks, "layers_met", any_layer)


def custom_rules_seen_through(patch):
  right = marks._body

  def body(eqn, places):
    if eqn.primitive.name == "custom_jvp_call":
      return eqn.params["call_jaxpr"].jaxpr
    return right(eqn, places)

  patch.setattr(marks, "_body", body)


def ids_as_given(patch):
  rules = dict(layer_rules.RULES)
  rules[nn.Embed, "__call__"] = layer_rules.LayerRule(
    "embedding", "lookup", lambda module, ids: ids
  )
  patch.setattr(layer_rules, "RULES", rules)


def rule_changed(patch, layer, **changes):
  rules = dict(layer_rules.RULES)
  key = layer, "__call__"
  rules[key] = dataclasses.replace(rules[key], **changes)
  patch.setattr(layer_rules, "RULES", rules)


def patches_in_another_order(patch):
  right = layer_rules.RULES[nn.Conv, "__call__"].flatten
  rule_changed(patch, nn.Conv, flatten=lambda *args: right(*args)[..., ::-1])


def kernel_taken_as_it_is(patch):
  rule_changed(patch, nn.Einsum, weight_order=lambda module: None)


FAULTS = [
  (no_cross_term, "tiedtwice", ("one_pass", "two_pass")),
  (uses_not_joined, "sharedtwice", ("one_pass", "two_pass")),
  (no_id_mask, "positions", ("one_pass", "two_pass")),
  (no_id_mask, "negativeids", ("one_pass",)),
  (biases_skipped, "nnjit", ("one_pass",)),
  (second_call_forgotten, "sharedtwice", ("one_pass", "two_pass")),
  (first_iteration_only, "scan", ("one_pass",)),
  (first_squares_only, "scan", ("two_pass",)),
  (derivatives_not_noticed, "gradient_penalty", ("one_pass",)),
  (shared_inputs_not_heard, "sharedinputbehindstopgradient", ("one_pass",)),
  (any_promotion, "ownpromotion", ("one_pass",)),
  (marks_without_numbers, "kernels_swapped_between_layers", ("one_pass",)),
  (custom_rules_seen_through, "custom_jvp_around_the_layer", ("one_pass",)),
  (ids_as_given, "negativeids", ("one_pass",)),
  (ids_as_given, "onerow", ("one_pass",)),
  (patches_in_another_order, "convolutiontwiceandscanned", ("one_pass",)),
  (kernel_taken_as_it_is, "einsumtwiceandscanned", ("one_pass", "two_pass")),
  (zeros_not_in_place, "vmapwithbroadcastparams", ("one_pass",)),
  (zeros_not_in_place, "two_applications_with_an_unused_call", ("one_pass",)),
]


@pytest.mark.parametrize(
  ("fault", "name", "method"),
  [
    pytest.param(fault, name, method, id=f"{fault.__name__}-{name}-{method}")
    for fault, name, tried in FAULTS
    for method in tried
  ],
)
def test_a_fault_is_seen(fault, name, method, monkeypatch):
  check_once(name, method)
  fault(monkeypatch)
  with pytest.raises(ValueError, match=rf"{method} gets the .* wrong by"):
    check(name, method)
