"""Every recipe loads, and those on real data train: smaller here than as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft.config_load import load_recipe
from fedpeft.events import Summary, Watcher
from fedpeft.run import run

ROOT = Path(__file__).parents[1]
RECIPES = sorted([*ROOT.glob("experiments/**/*.yaml"), *ROOT.glob("fedpeft/recipes/*.yaml")])
STUDIES = ROOT / "experiments" / "studies"


def name_of(path: Path) -> str:
    """A study's recipe is named after its folder, any other after its file."""
    return path.parent.name if STUDIES in path.parents else path.stem


def test_all_recipes_are_here() -> None:
    own = [path.stem for path in RECIPES if STUDIES not in path.parents]
    assert own == [
        "banking77",
        "fedkseed",
        "fedspine",
        "flasc",
        "jetson80",
        "prune_first",
        "shakespeare",
        "quickstart",
    ]
    assert len(RECIPES) == len(own) + len(list(STUDIES.glob("*/recipe.yaml")))


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_loads_and_names_itself(path: Path) -> None:
    recipe = load_recipe(str(path), [])
    assert recipe.name == name_of(path)
    assert recipe.output.folder == f"runs/{name_of(path)}"
    assert path.read_text().startswith("# ")


def small(shared: Path, out: Path, name: str, data: str, model: str, *more: str) -> Summary:
    recipe = load_recipe(
        str(ROOT / "experiments" / "recipes" / f"{name}.yaml"),
        [
            f"data.source={shared / 'data' / data}",
            f"model.name={shared / 'models' / model}",
            f"output.folder={out}",
            "baselines=[untrained]",
            "engine.threads=1",
            "engine.device=cpu",
            "rounds.count=1",
            *more,
        ],
    )
    return run(recipe, Watcher())


@pytest.mark.slow
def test_banking77_on_a_sentence_encoder(shared: Path, tmp_path: Path) -> None:
    more = ("data.limit=1000", "partition.clients=4", "local.epochs=2", "data.max_length=24")
    summary = small(shared, tmp_path / "r", "banking77", "banking77", "all-MiniLM-L6-v2", *more)
    untrained, trained = summary.rows
    assert untrained.score.accuracy < 0.05
    assert trained.score.accuracy > untrained.score.accuracy + 0.1


def test_shakespeare_by_speaker_on_a_decoder(shared: Path, tmp_path: Path) -> None:
    more = ("partition.clients=8", "local.steps=4")
    summary = small(shared, tmp_path / "r", "shakespeare", "tinyshakespeare", "stories260K", *more)
    untrained, trained = summary.rows
    assert untrained.score.loss > 4.0
    assert trained.score.loss < untrained.score.loss - 0.3


def test_the_whole_decoder_by_forward_passes_alone(shared: Path, tmp_path: Path) -> None:
    more = ("partition.clients=4", "local.steps=5", "rounds.sampling.size=2", "data.limit=400")
    summary = small(shared, tmp_path / "r", "fedkseed", "tinyshakespeare", "stories260K", *more)
    untrained, trained = summary.rows
    assert 0 < abs(trained.score.loss - untrained.score.loss) < 0.2
    assert sum(trained.down.values()) == 2 * (16_384 + 128 + 1 + 2 * 9 + 9)
    assert sum(trained.up.values()) == 2 * (5 * 6 + 2 * 129 + 26)
