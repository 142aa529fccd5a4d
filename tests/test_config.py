"""Settings: strict both ways, one parser, errors that name the nearest right one."""

from dataclasses import dataclass, replace

import pytest

from troodon import config as c
from troodon import recipes
from troodon.config import UsageError
from troodon.views.config import CropsConfig


@dataclass(frozen=True)
class Whole:
    crops: CropsConfig = CropsConfig()
    on: bool = True
    count: int | None = None
    names: tuple[str, ...] = ("a", "b")


def test_what_is_written_is_read_back(tmp_path):
    whole = Whole(crops=CropsConfig(global_px=64, aspect=(0.5, 2.0)), on=False, count=3, names=("x", "y z"))
    path = tmp_path / "whole.yaml"
    path.write_text(c.to_yaml(whole))
    assert c.from_yaml(Whole(), path) == whole
    assert c.from_yaml(whole, path) == whole


@pytest.mark.parametrize("name", [n for known in recipes.KNOWN.values() for n in known])
def test_every_recipe_survives_its_own_yaml(name, tmp_path):
    recipe = recipes.any_verb(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(c.to_yaml(recipe))
    assert c.from_yaml(type(recipe)(), path) == recipe


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"crops": {"global_pxx": 3}}, "--crops.global-pxx.*--crops.global-px"),
        ({"crops": {"global_px": "big"}}, "--crops.global-px big: must be INT"),
        ({"crops": {"aspect": [1.0]}}, "--crops.aspect.*2 values"),
        ({"nothing": 1}, "--nothing"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(changes, said):
    with pytest.raises(UsageError, match=rf"^my.yaml: .*{said}") as error:
        c.from_dict(Whole(), changes, source="my.yaml")
    assert "\n" not in str(error.value)
    assert not set("│╭╰") & set(str(error.value))


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "just words"])
def test_what_is_no_yaml_of_settings_is_refused_by_name(tmp_path, text):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"odd\.yaml"):
        c.from_yaml(Whole(), path)


def test_nearest_names_the_nearest():
    assert "did you mean 'demo'?" in str(c.nearest("recipe", "dmeo", ["demo", "vitl14"]))
    assert "did you mean" not in str(c.nearest("recipe", "xyz", ["demo", "vitl14"]))


def test_differences_name_every_setting_that_differs():
    old, new = c.to_dict(Whole()), c.to_dict(replace(Whole(), count=3, crops=CropsConfig(flip=0.0)))
    assert c.differences(old, new) == ["count: None -> 3", "crops.flip: 0.5 -> 0.0"]


def test_fingerprints_tell_configs_apart():
    assert c.fingerprint(Whole()) == c.fingerprint(Whole())
    assert c.fingerprint(Whole()) != c.fingerprint(replace(Whole(), count=3))
