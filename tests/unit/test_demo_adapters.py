"""The adapters that are shipped for the demo: small, of the format, and made for the base that is built."""

from pathlib import Path

import pytest
import yaml

from perft.base_model import base_fingerprint
from perft.config import AdapterConfig
from perft.training.options import read_options
from server import demo
from server.demo.base import upcycle
from server.demo.data.examples import MADE

SHIPPED, RECIPES = (Path(demo.__file__).parent / name for name in ("adapters", "recipes"))
MOST_BYTES = 1_500_000


class TestShippedAdapters:
    @pytest.mark.parametrize("name", MADE)
    def test_folder_holds_what_perft_train_wrote_and_is_small(self, name: str) -> None:
        files = {file.name: file.stat().st_size for file in (SHIPPED / name).iterdir()}
        assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert sum(files.values()) <= MOST_BYTES

    @pytest.mark.parametrize("name", MADE)
    def test_config_is_the_recipes(self, name: str) -> None:
        """What the recipe says of the adapter is what was trained."""
        recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
        config = shipped()[name].model_dump()
        said = {key: value for key, value in recipe.items() if key in config}
        assert said and said.items() <= config.items()
        read_options(recipe | {"base": "x", "data": ["x"], "output": "x"})

    @pytest.mark.parametrize("name", MADE)
    def test_card_is_of_this_recipe_and_says_how_good_it_is(self, name: str) -> None:
        card = (SHIPPED / name / "README.md").read_text(encoding="utf-8")
        recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
        options = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
        assert {key: options[key] for key in recipe} == recipe
        before, after = (
            float(line.split("|")[2]) for line in card.splitlines() if line.startswith(("| before", "| after"))
        )
        assert after < before and "answers exactly right" in card and "`build/demo-data/" in card

    def test_no_other_adapter_is_shipped(self) -> None:
        assert set(shipped()) == set(MADE)
        assert {config.variant for config in shipped().values()} >= {"R", "E", "S"}

    def test_shipped_adapters_name_the_base_that_is_built(self) -> None:
        built = base_fingerprint(upcycle.router_weight(layer, 576) for layer in range(30))
        assert {config.base_fingerprint for config in shipped().values()} == {built}


def shipped() -> dict[str, AdapterConfig]:
    """The configurations of the shipped adapters, by name."""
    return {
        folder.name: AdapterConfig.model_validate_json((folder / "adapter_config.json").read_text(encoding="utf-8"))
        for folder in SHIPPED.iterdir()
    }
