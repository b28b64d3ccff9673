"""A bounded run of the fuzzer; the long one is `python tests/tools/fuzz.py`."""

import fuzz


def test_mutants_are_refused_or_converted(files, tmp_path):
    for path in files.glob("tiny*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    outcomes, slowest, failures = fuzz.fuzz(fuzz.corpus(tmp_path), count=2000, seed="test")
    assert failures == []
    assert sum(outcomes.values()) == 2000
    assert slowest < fuzz.SECONDS
    assert sum(number for outcome, number in outcomes.items() if "refused" in outcome) > 1000
    assert sum(number for outcome, number in outcomes.items() if "same values" in outcome) > 50
