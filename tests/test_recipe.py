"""A recipe is read as it was written, and whatever else is in the file is one line that says where and what."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from deblur_deploy.errors import InputError
from deblur_deploy.pipeline.recipe import Recipe, read_recipe, write_recipe


def keys(kind: type = Recipe, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every key that a recipe may have."""
    found = []
    for field in msgspec.structs.fields(kind):
        found.append((*path, field.name))
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            found += keys(field.type, (*path, field.name))
    return found


def read(path: Path) -> Recipe | str:
    """The recipe, or why there is none."""
    try:
        return read_recipe(path)
    except InputError as error:
        return str(error)


VALUES = st.one_of(
    st.none().map(lambda _: {}),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(st.characters(codec="utf-8")),
    st.lists(st.integers(0, 9)),
    st.dictionaries(st.sampled_from(["nonsense", "tiles", "int8"]), st.integers()),
)


@given(key=st.sampled_from([*keys(), ("nonsense",), ("int8", "nonsense"), ("int8", "a b.c")]), value=VALUES)
@example(key=("int8", "tiles"), value="16")
@example(key=("verify", "providers"), value="cpu")
@example(key=("int8", "method"), value="min\nmax")
@example(key=("prune", "recover", "loss"), value="")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_of_any_key_is_taken_or_refused_in_one_line_with_its_path(tmp_path, key, value):
    for name in reversed(key):
        value = {name: value}
    path = tmp_path / "recipe.toml"
    path.write_bytes(msgspec.toml.encode(value))
    answer = read(path)
    if isinstance(answer, Recipe):
        write_recipe(answer, path)
        assert read_recipe(path) == answer
    else:
        assert answer.startswith(f"{path}: ")
        assert len(answer.splitlines()) == 1
        assert "`$." + ".".join(key) in answer


@given(data=st.binary())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_recipe_or_one_line(tmp_path, data):
    path = tmp_path / "recipe.toml"
    path.write_bytes(data)
    answer = read(path)
    assert isinstance(answer, Recipe) or len(answer.splitlines()) == 1


def test_folders_are_taken_from_where_the_file_lies_and_stay_when_it_moves(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "recipe.toml").write_text("pairs = 'photos'\ncalibration = '/elsewhere'")
    recipe = read_recipe(tmp_path / "a" / "recipe.toml")
    assert (recipe.pairs, recipe.calibration) == (tmp_path / "a" / "photos", Path("/elsewhere"))
    write_recipe(recipe, tmp_path / "recipe.toml")
    assert read_recipe(tmp_path / "recipe.toml") == recipe


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("[int8]\ntiles = true", "Expected `int`, got `bool` - at `$.int8.tiles`; allowed: 1 or more"),
        ("[int8]\nmethod = 3", "Expected `str`, got `int` - at `$.int8.method`; allowed: result, "),
        ("[verify]\nmax_differing = 1.5", "max_differing is 1.5; allowed: 0 to 1 - at `$.verify.max_differing`"),
        ("[verify]\nroudns = 3", "no key is called `$.verify.roudns`; allowed: fp16_max_drop_db, "),
        ("[[int8]]\ntiles = 1", "Expected `object`, got `array` - at `$.int8`"),
    ],
)
def test_what_is_allowed_is_said(tmp_path, toml, said):
    (tmp_path / "recipe.toml").write_text(toml)
    with pytest.raises(InputError) as raised:
        read_recipe(tmp_path / "recipe.toml")
    assert said in str(raised.value)
