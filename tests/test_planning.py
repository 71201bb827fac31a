"""`dptrain plan` on the command line."""

import json

import pytest

from dptrain import cli

FLAGS = ["--num_examples=1e4", "--delta=1e-6", "--phase=100:400:20"]


def run(capsys, *argv):
  status = cli.main(["plan", *argv])
  return status, *capsys.readouterr()


def test_from_flags(capsys):
  status, out, _ = run(
    capsys, *FLAGS, "--phase=400:60", "--epsilon=3", "--format=json"
  )
  told = json.loads(out)
  assert status == 0
  assert 2.98 < told["epsilon"]["value"] <= 3
  assert told["plan"]["schedule"]["phases"][1]["until_step"] == 60
  assert told["affordable_steps"] == 60


@pytest.mark.parametrize(
  ("flags", "told"),
  [
    (["--relation=add_or_remove_one"], "10,000 (a public estimate)"),
    (["--sampling=cyclic_poisson", "--bands=2"], "0.08"),
    (["--sampling=shuffled", "--relation=replace_one"], "10,000"),
  ],
  ids=str,
)
def test_other_samplings_and_relations(capsys, flags, told):
  status, out, _ = run(
    capsys, *FLAGS[:2], "--phase=400:60", "--epsilon=3", *flags
  )
  assert status == 0
  assert told in out


def test_from_a_gin_file(capsys):
  status, out, _ = run(
    capsys,
    "--gin_file=demo.gin",
    "--gin.TOTAL_STEPS=200",
    "--num_examples=30000",
  )
  assert status == 0
  assert "updates                 200" in out
  assert "compute" in out
  assert "memory: optimizer" in out


def test_as_a_page(capsys):
  flags = [*FLAGS[:2], "--phase=100:20", "--noise_multiplier=1.5"]
  status, out, _ = run(capsys, *flags, "--format=html")
  assert status == 0
  assert out.startswith("<!doctype html>")
  assert "--phase=100:20" in out


@pytest.mark.parametrize("form", ["text", "json", "html"])
def test_advice(capsys, form):
  flags = ["--advise", "--num_examples=1e5", "--epsilon=2"]
  status, out, _ = run(capsys, *flags, f"--format={form}")
  assert status == 0
  assert "arXiv 2501.18914" in out
  assert "--phase=" in out
  if form == "json":
    assert json.loads(out)["num_examples"] == 100_000


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--advise", *FLAGS, "--epsilon=1"], "--phase and --advise are both"),
    (["--advise", "--num_examples=1e6"], "--epsilon is missing: --advise"),
    (["--advise", "--epsilon=1"], "--num_examples is missing: --advise"),
    (["--advise", "--num_examples=9", "--epsilon=1"], "too far off"),
    ([*FLAGS, "--epsilon=1", "--flops=1e20"], "read with --advise only"),
    ([*FLAGS[1:], "--epsilon=1"], "--num_examples is missing"),
    (["--num_examples=10", "--phase=9:9"], "--delta is missing"),
    (["--num_examples=10", "--delta=1e-6"], "--phase is missing"),
    (FLAGS, "noise_multiplier and target_epsilon are both None"),
    ([*FLAGS, "--epsilon=0"], "target_epsilon=0.0 must be a positive"),
    ([*FLAGS[:2], "--phase=20000:9", "--epsilon=1"], "exceeds the corpus"),
    (["--gin_file=demo.gin", "--epsilon=2"], "bind it instead"),
    (["--num_examples=1.5", *FLAGS[1:], "--epsilon=1"], "a whole number"),
  ],
)
def test_refuses_in_one_line(capsys, argv, message):
  status, out, err = run(capsys, *argv)
  assert (status, out) == (2, "")
  assert message in err
  assert len(err.splitlines()) == 1
