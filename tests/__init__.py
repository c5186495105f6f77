"""A package, so that `python -m tests.fuzz.…` finds this folder and not the tests that torch-fidelity installs."""
