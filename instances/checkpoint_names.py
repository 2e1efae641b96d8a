"""Maps the names of a checkpoint to those of the network: prefixes, extras, the right dictionary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

# Of torch.compile, FSDP, activation checkpoints, and WoodFisher's layers with masks.
_WRAPPERS = re.compile(r"(?:(?<=^)|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_layer)\.")
_PARALLEL = "module."

# What profilers, averages and older releases store in addition to the parameters.
_EXTRA = re.compile(
    r"(?:.*\.)?(?:total_ops|total_params|n_averaged|num_batches_tracked|position_ids|masked_bias|inv_freq"
    r"|relative_position_index|attn_mask|activation_post_process\..*|_extra_state|_metadata|_device_tensor)"
)
_CAUSAL = re.compile(r"(?:.*\.)?attn\.bias")  # the triangular mask that early releases of transformers stored

_USUAL = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
)
_AVERAGES = re.compile(r"(?:^|[._])(?:ema|swa|avg|average|averaged|shadow|teacher|momentum)(?:$|[._\d])|_ema|ema_")


def without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """From plain names to the names of the file: without what `torch.compile`, FSDP and `DataParallel` add.

    Where two names would become the same, all stay as they are.
    """
    names = list(names)
    plain = [_WRAPPERS.sub("", name) for name in names]
    while (
        plain
        and all(name.startswith(_PARALLEL) or _is_extra(name) for name in plain)
        and any(name.startswith(_PARALLEL) for name in plain)
    ):
        plain = [_WRAPPERS.sub("", name.removeprefix(_PARALLEL)) for name in plain]
    mapping = dict(zip(plain, names, strict=True))
    return mapping if len(mapping) == len(names) else {name: name for name in names}


def matched(names: Iterable[str], wanted: Collection[str]) -> dict[str, str]:
    """From the names of the network to those of the file.

    Parameters
    ----------
    names : iterable of str
        Of the file.
    wanted : collection of str
        Of the network's tensors; names under which they may be stored in other forms included.

    Returns
    -------
    dict
        The names of the file as the network would call them, to what they are in the file. A prefix of all wanted
        names (`model.` of Lightning, `encoder.` of a larger network) is removed or added if this matches more of
        the wanted names.
    """
    names = list(names)
    wanted = set(wanted)
    whole = {name: name for name in names}
    plain = without_wrappers(names)
    best = max((whole, plain), key=lambda mapping: len(wanted & mapping.keys()))
    found = len(wanted & best.keys())
    if found == len(wanted):
        return best
    removed: Counter[str] = Counter()
    added: Counter[str] = Counter()
    known = set(plain)
    for name in plain:
        for prefix, rest in _splits(name):
            if rest in wanted:
                removed[prefix] += 1
    for name in wanted:
        for prefix, rest in _splits(name):
            if rest in known:
                added[prefix] += 1
    for counts, adds in ((removed, False), (added, True)):
        for prefix, count in sorted(counts.items(), key=lambda item: (-item[1], len(item[0]))):
            if count > found and 2 * count > len(wanted):
                found = count
                best = (
                    {f"{prefix}{name}": raw for name, raw in plain.items()}
                    if adds
                    else {name.removeprefix(prefix): raw for name, raw in plain.items() if name.startswith(prefix)}
                )
    return best


def _splits(name: str) -> list[tuple[str, str]]:
    parts = name.split(".")
    return [(".".join(parts[:k]) + ".", ".".join(parts[k:])) for k in range(1, len(parts))]


def prefix_of(mapping: Mapping[str, str]) -> tuple[str, str]:
    """What the names of the file have before those of the network, and the other way round."""
    for plain, raw in mapping.items():
        if plain != raw:
            return (raw.removesuffix(plain), "") if raw.endswith(plain) else ("", plain.removesuffix(raw))
    return "", ""


def in_words(prefix: tuple[str, str]) -> str:
    """A prefix as a part of a sentence; empty where there is none."""
    removed, added = prefix
    return f"without '{removed}'" if removed else f"with '{added}' before them" if added else ""


def _is_extra(name: str) -> bool:
    return _EXTRA.fullmatch(name) is not None


def ignorable(name: str, floating: bool) -> bool:
    """Whether a tensor that the network does not have is no parameter that could be missed."""
    return not floating or _is_extra(name) or _CAUSAL.fullmatch(name) is not None


def preference(path: str) -> tuple[int, int, int]:
    """Order of dictionaries that match equally well: averages last, top level first, usual names first."""
    parts = path.split(".") if path else []
    usual = next((rank for rank, name in enumerate(_USUAL) if parts and parts[-1] == name), len(_USUAL))
    average = int(any(_AVERAGES.search(part) for part in parts))
    return average, 0 if not parts else len(parts), usual
