"""The recipe: every choice of an export, in one record that is also a TOML file and the command line."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import tyro

from deblur_deploy.errors import InputError
from deblur_deploy.files import existing
from deblur_deploy.pipeline.config import Int8Config, NetworkConfig, VerifyConfig
from deblur_deploy.pipeline.pruning.config import PruneConfig


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides what is in a bundle, apart from the checkpoint."""

    name: str | None = None
    """Name of the bundle, as reports and receipts show it; without it, the checkpoint's file name."""
    checkpoint_sha256: str | None = None
    """Refuse any other checkpoint; a bundle's own recipe names the one that it was made from."""
    pairs: Path | None = None
    """Folder with blur/NAME and sharp/NAME to verify on; without it, photographs that scikit-image carries."""
    calibration: Path | None = None
    """Folder of photographs as they will be in use, to calibrate int8 on; without it, scikit-image's."""
    network: Annotated[NetworkConfig, tyro.conf.arg(name="")] = NetworkConfig()
    """A network that is no checkpoint of ours."""
    prune: PruneConfig = PruneConfig()
    """Making the network smaller, before anything else."""
    int8: Int8Config = Int8Config()
    """Quantization."""
    verify: VerifyConfig = VerifyConfig()
    """What must hold, and what is timed."""


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file, its folders taken from where the file lies.

    Raises MissingFileError without such a file, InputError that names the key and what is allowed.
    """
    try:
        recipe = msgspec.toml.decode(existing(path, kind="file").read_bytes(), type=Recipe, dec_hook=_to_path)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {_explained(' '.join(str(error).split()))}") from None
    folders = {name: path.parent / folder for name in ("pairs", "calibration") if (folder := getattr(recipe, name))}
    prune = recipe.prune.under(path.parent)
    return msgspec.structs.replace(recipe, prune=prune, **folders)


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write ``recipe`` so that :func:`read_recipe` gives it back, from wherever the file goes."""
    folders = {name: folder.absolute() for name in ("pairs", "calibration") if (folder := getattr(recipe, name))}
    recipe = msgspec.structs.replace(recipe, prune=recipe.prune.under(Path.cwd()), **folders)
    path.write_bytes(msgspec.toml.encode(_without_none(msgspec.to_builtins(recipe, enc_hook=str))))


def _without_none(values: Any) -> Any:
    """TOML has no null: what is None is left out, and is None again when read."""
    if not isinstance(values, dict):
        return values
    return {key: _without_none(value) for key, value in values.items() if value is not None}


def _to_path(kind: type, value: object) -> object:
    if not isinstance(value, str):
        raise ValueError(f"Expected `str`, got `{type(value).__name__}`")
    return kind(value)


def _explained(message: str) -> str:
    """msgspec's ``message``, with the path down to the key itself and with what is allowed there."""
    what, _, place = message.partition(" - at `$")
    keys = re.findall(r"\.(\w+)", place)
    holder, kind = Recipe, Recipe
    for key in keys:
        holder, kind = kind, _struct(get_type_hints(kind)[key])
    if unknown := re.search(r"unknown field `(.*)`", what):
        return f"no key is called `{'.'.join(['$', *keys, unknown[1]])}`; allowed: {', '.join(kind.__struct_fields__)}"
    named = what.partition(" ")[0]
    if kind is not None and named in kind.__struct_fields__:  # by its __post_init__
        return f"{what} - at `{'.'.join(['$', *keys, named])}`"
    allowed = _allowed(holder, keys[-1]) if keys else ""
    return message + (f"; {allowed}" if allowed else "")


def _struct(hint: Any) -> Any:
    """The struct that a field holds, or None."""
    kinds = (hint, *get_args(hint))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, msgspec.Struct)), None)


def _allowed(config: type[msgspec.Struct], name: str) -> str:
    """The values that a field takes, if they are listed or bounded: a config names the bounds when they are crossed."""
    hint = get_type_hints(config)[name]
    if get_origin(hint) is Literal:
        return f"allowed: {', '.join(get_args(hint))}"
    if hint is str:
        return ""
    try:
        config(**{name: -math.inf})
    except (ValueError, TypeError) as error:
        _, found, bounds = str(error).partition("allowed: ")
        return found + bounds
    return ""
