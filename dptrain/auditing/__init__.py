"""Empirical audits: canaries through the real training run.

An audit is a training run like any other, on the user's records and m canaries,
each put in or left out by a fair coin. From what the run releases an attacker
guesses the coins; who guesses too well for the claimed epsilon refutes it. One
run suffices (arXiv 2305.08846, 2410.22235).
"""
