"""A small share of the sweep that ``benchmarks/robustness.py`` makes."""

import pytest

from benchmarks import robustness


@pytest.mark.parametrize(("kind", "first"), [("image", 0), ("video", 20), ("onnx", 945), ("onnx", 1370), ("bundle", 0)])
def test_damaged_files_give_our_errors_only(kind: str, first: int) -> None:
    outcomes, failures = robustness.sweep(kind, 12, first)
    assert not failures
    assert outcomes.total() == 12
    assert set(outcomes) <= {"accepted", "InputError", "ModelError", "ProviderError", "MissingFileError"}
