from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cohort import arguments, main


def test_an_unknown_way_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(["--ways", "cohort,flour"])
    assert "'flour' is none of" in capsys.readouterr().err


@pytest.mark.slow
def test_a_measurement_from_start_to_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tiny.json"
    options = ["--workload", "tiny", "--rounds", "2", "--repeats", "2", "--threads", "1"]
    main([*options, "--ways", "loop,cohort,centralised", "--out", str(out)])
    table = capsys.readouterr().out
    assert table.count("| cohort (1 x 1, chunk ") == 1
    found = json.loads(out.read_text())
    families = [run["way"]["family"] for run in found["runs"]]
    assert families == ["loop", "cohort", *["centralised"] * 3, "loop", "cohort", "centralised"]
    for run in found["runs"]:
        assert len(run["seconds"]) == 2
        assert run["startup"] > 0 and run["peak_bytes"] > 50_000_000
    assert max(run["gap"] for run in found["runs"] if run["gap"] is not None) < 1e-6
    assert found["environment"]["packages"]["torch"]
