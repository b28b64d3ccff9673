"""Finds the models in a checkpoint: where the names of each start, and which towers it has."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, Optional

import numpy as np

from ..errors import CheckpointError, listed

IMAGE, TEXT = "image", "text"
_SCALE = "logit_scale"
_MAX_MODELS = 100  # in a file, that are compared with each other

# What programs put into the names of modules they wrap: torch.compile, DistributedDataParallel, FSDP, activation
# checkpointing, Lightning's Fabric, Paddle's fleet.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)"
    r"(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|_layers)\."
)
# A tensor that every tower of a kind has, as (start of the model's names)(parent of the tower's)(rest).
_TELLS = {
    IMAGE: re.compile(
        r"((?:.+?\.)??)(visual\.|vision_model\.)?"
        r"((?:embeddings\.)?class_embedding|attnpool\.positional_embedding(?:\.weight)?)"
    ),
    TEXT: re.compile(
        r"((?:.+?\.)??)"
        r"(?:(text\.|text_model\.)?((?:embeddings\.)?token_embedding\.weight)"
        r"|(bert\.|text_model\.)(embeddings\.word_embeddings\.weight))"
    ),
}
# The start of all names of a tower that has a parent, its projection's among them.
_OF_TOWER = {IMAGE: re.compile(r"visual|vision_"), TEXT: re.compile(r"text[._]|bert\.")}

Names = dict[str, str]  # {name without prefix and wrappers: name in the file}


class Found(NamedTuple):
    """A model, or a tower alone, within a checkpoint."""

    prefix: str  # start of its names in the file, such as "state_dict.module."
    names: Names
    towers: frozenset[str]  # IMAGE, TEXT or both; empty if no name tells


def alone(towers: Collection[str]) -> str:
    """What there is of a model, in words: "an image tower alone", "a text tower alone", or "" for a whole model."""
    return {IMAGE: "an image tower alone", TEXT: "a text tower alone"}["".join(towers)] if len(towers) == 1 else ""


def find(tensors: Mapping[str, np.ndarray], source: str, prefix: Optional[str] = None) -> Found:
    """Finds the model that is asked for, or the only one. A tower alone is one only where there is no whole model.

    Args:
        tensors: all tensors of a file.
        source: name of the file, for messages.
        prefix: start of the model's names, with or without wrappers and the last dot; None for the only model.

    Raises:
        CheckpointError: if there are several models, or none has the prefix; the message lists what there is.
    """
    names = list(tensors)
    if any(name.endswith("_flat_param") for name in names):
        raise CheckpointError(
            f"{source} holds FSDP's flat parameters, which tell no tensor's name or shape: save the model's full state "
            "dict (StateDictType.FULL_STATE_DICT)"
        )
    inside = _inside(names, prefix)
    places = _places(inside)
    starts = [""] if prefix is not None and "" in places else _distinct(_best(places), inside, tensors)
    if prefix is not None and not starts:
        there = listed(
            [f"{start}*" if start else "a model whose names have no prefix" for start in _best(_places(_inside(names)))]
        )
        raise CheckpointError(f"{source} has no model under prefix={prefix!r}; it has {there or 'none'}")
    if len(starts) > 1:
        raise CheckpointError(_several([_dotted(prefix) + start for start in starts], places[starts[0]], source))
    start = starts[0] if starts else ""
    nested = tuple(other for other in _best(places) if other.startswith(start) and other != start)
    own = {
        name[len(start) :]: raw
        for name, raw in inside.items()
        if name.startswith(start) and not (nested and name.startswith(nested))
    }
    towers = places.get(start, {})
    raw_prefix = own[_SCALE][: -len(_SCALE)] if _SCALE in own else _dotted(prefix) + start
    if _WRAPPERS.search(raw_prefix):  # DeepSpeed's "module" has a wrapper's name, and an optimizer beside it
        parts = {name.partition(".")[0] for name, raw in own.items() if _WRAPPERS.search(raw)}
        own = {name: raw for name, raw in own.items() if name.partition(".")[0] in parts}
    return Found(raw_prefix, _of_tower(own, towers), frozenset(towers))


def _dotted(prefix: Optional[str]) -> str:
    return f"{prefix}." if prefix and not prefix.endswith(".") else prefix or ""


def _inside(names: list[str], prefix: Optional[str] = None) -> Names:
    """The names under a prefix, without it and without wrappers."""
    start = _dotted(prefix)
    exact = {name[len(start) :]: name for name in names if name.startswith(start)}
    if exact:
        return _unwrapped(exact)
    start = _WRAPPERS.sub("", start)
    return {
        name[len(start) :]: raw for name, raw in _unwrapped({n: n for n in names}).items() if name.startswith(start)
    }


def _unwrapped(names: Names) -> Names:
    """The names without wrappers; one that another tensor then has already stays as it is."""
    found = {name: raw for name, raw in names.items() if not _WRAPPERS.search(name)}
    for name, raw in names.items():
        bare = _WRAPPERS.sub("", name)
        found[name if bare in found else bare] = raw
    return found


def _places(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """{start of a model's names: {tower: its parent, perhaps ""}}; without towers where there is a scale alone."""
    places: dict[str, dict[str, str]] = {}
    for name in names:
        if name == _SCALE or name.endswith(f".{_SCALE}"):
            places.setdefault(name[: -len(_SCALE)], {})
        for tower, pattern in _TELLS.items():
            match = pattern.fullmatch(name)
            if match:
                places.setdefault(match[1], {})[tower] = match[2] or (match[4] if tower == TEXT else "") or ""
    return places


def _best(places: dict[str, dict[str, str]]) -> list[str]:
    """The starts of the whole models; of towers, or of scales, where there is nothing better."""
    most = max(map(len, places.values()), default=0)
    return sorted(start for start, towers in places.items() if len(towers) == most)


def _distinct(starts: list[str], names: Names, tensors: Mapping[str, np.ndarray]) -> list[str]:
    """The starts without those of second mentions: the arrays of another, or the model Lightning was started with."""
    if not 1 < len(starts) <= _MAX_MODELS:
        return starts

    def place(array: np.ndarray) -> tuple[Any, ...]:
        return array.__array_interface__["data"][0], array.shape, array.strides

    kept: dict[str, dict[str, tuple[Any, ...]]] = {}
    for start in sorted(starts, key=lambda start: not start.startswith("state_dict.")):
        model = {name[len(start) :]: place(tensors[raw]) for name, raw in names.items() if name.startswith(start)}
        if model not in kept.values():
            kept[start] = model
    return [start for start in kept if not start.startswith("hyper_parameters.")] or list(kept)


def _of_tower(names: Names, towers: dict[str, str]) -> Names:
    """The names that belong to a model; those of a tower alone begin as they do in a whole model."""
    if len(towers) != 1 or _SCALE in names:
        return names
    ((tower, parent),) = towers.items()
    if parent:  # what lies beside it is no part of it
        return {name: raw for name, raw in names.items() if _OF_TOWER[tower].match(name)}
    if any(name.startswith("embeddings.") for name in names):  # Hugging Face's, since its version 5
        parent = {IMAGE: "vision_model.", TEXT: "text_model."}[tower]
    elif tower == IMAGE:
        parent = "visual."
    return {parent + name: raw for name, raw in names.items()}


def _several(starts: list[str], towers: dict[str, str], source: str) -> str:
    what = {0: "models", 1: "towers", 2: "models"}[len(towers)]
    example = next(start for start in starts if start)
    plain = " (prefix='' for the names that start with none of these)" if "" in starts else ""
    return (
        f"{source} holds several {what}: {listed([f'{start}*' for start in starts])}; choose one by the start of its "
        f"names, such as prefix={example!r}{plain}"
    )
