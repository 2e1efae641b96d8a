"""Reading checkpoints into a network, and writing them.

Supported are safetensors, `.npz` of tensors, files of `torch.save`, and Hugging Face folders; see `containers` for
the file formats, `checkpoint_names` for prefixes and extras, `stored_forms` for tensors that are stored as others.
Entries of a file that are not used are logged, and are preserved when the file is written.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cbs_opt.errors import InstanceError
from cbs_opt.files.atomic import atomic_write
from cbs_opt.files.instance_file import file_sha256
from cbs_opt.instances.checkpoint_names import ignorable, in_words, matched, prefix_of, without_wrappers
from cbs_opt.instances.containers import Archive, FolderArchive, container_of, open_file
from cbs_opt.instances.masks import LayerMask, add_masks
from cbs_opt.instances.modes import unwrapped
from cbs_opt.instances.plain import computed_weights, make_plain
from cbs_opt.instances.stored_forms import effective, encoded, stored_forms

__all__ = [
    "checkpoint_sha256",
    "container_of",
    "load_checkpoint",
    "read_checkpoint",
    "write_checkpoint",
    "write_state_dict",
]

logger = logging.getLogger("cbs_opt")


def read_checkpoint(
    path: Path | str, wanted: Collection[str] | None = None, key: str | None = None
) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, on the CPU.

    Parameters
    ----------
    path : Path or str
    wanted : collection of str, optional
        Names of the network's tensors: only these are read; prefixes of wrappers are removed, and tensors that are
        stored as others are returned by their effective values.
    key : str, optional
        The dictionary of tensors to use, if the file has several.

    Raises
    ------
    InstanceError
        When the file is no checkpoint, is damaged, or holds no tensors.
    """
    archive = open_file(Path(path), wanted or (), key)
    mapping = _mapping(archive, wanted)
    if not mapping:
        raise InstanceError(f"{path}: holds no tensors")
    if wanted is None:
        return {plain: archive.read(raw) for plain, raw in mapping.items()}
    needed = {*wanted, *(part for form in stored_forms(mapping) if form.name in wanted for part in form.parts)}
    tensors = {plain: archive.read(raw) for plain, raw in mapping.items() if plain in needed}
    return effective(tensors, wanted)[0]


def load_checkpoint(model: nn.Module, path: Path | str, key: str | None = None) -> None:
    """Load a checkpoint into a network, strictly.

    Every tensor of the network must be present; for a tensor that several layers share, one name suffices.
    Prefixes of wrappers are removed, and masks and parametrisations of the file or of the network are resolved.
    Masks that only the file has become masks of the network. Tensors of the file that are not parameters, or that
    are outside the prefix of the network, are ignored and logged.

    Parameters
    ----------
    model : torch.nn.Module
    path : Path or str
    key : str, optional
        As for `read_checkpoint`.

    Raises
    ------
    InstanceError
        With the tensors that are missing, unexpected or of another shape; the model is then unchanged.
    """
    model, path = unwrapped(model), Path(path)
    own = model.state_dict()
    computed = {name: (module, leaf) for name, module, leaf in computed_weights(model)}
    wanted = {*own, *computed}
    archive = open_file(path, _stored_names(wanted), key)
    mapping = _mapping(archive, wanted)
    tensors = {plain: archive.read(raw) for plain, raw in mapping.items()}
    # Stored as a parametrisation although the network is plain, and vice versa.
    parts = dict(tensors)
    tensors, forms = effective(tensors, own.keys() - computed.keys())
    plain_in_file = [name for name in computed if name in tensors]
    _check_fit(path, model, own, tensors, [(*computed[name], name) for name in plain_in_file])
    for name in plain_in_file:
        logger.info(f"{path}: {name} is plain there: the network's parametrisation of it is removed")
        make_plain(*computed[name])
    own = model.state_dict()
    groups = _tied(model)
    full = {}
    for name in own:
        source = next((alias for alias in (name, *groups.get(name, ())) if alias in tensors), None)
        if source is not None:
            full[name] = tensors[source]
    _tell_ignored(path, archive, mapping, tensors, own)
    model.load_state_dict(full, strict=False)
    found = [
        LayerMask(name, (parts[form.parts[1]] == 0).cpu().numpy())
        for name, form in forms.items()
        if form.kind == "mask"
    ]
    masks = [mask for mask in found if mask.count]
    if masks:
        logger.info(f"{path}: its masks are kept: {_listed(mask.name for mask in masks)}")
        add_masks(model, masks)


def write_checkpoint(
    path: Path | str, tensors: Mapping[str, Tensor], like: Path | str, key: str | None = None
) -> None:
    """Write a checkpoint in the file format of another one, whose other entries are kept.

    Parameters
    ----------
    path : Path or str
        May be `like` itself.
    tensors : mapping of str to Tensor
        Effective values of those that change; they are stored in the types and forms that `like` has. A form that
        cannot hold a value (an orthogonal matrix with zeros) is replaced by the plain tensor, with a warning.
    like : Path or str
    key : str, optional
        As for `read_checkpoint`.

    Raises
    ------
    InstanceError
        When `like` cannot be read, or has no such tensors.
    OutputError
        When the file cannot be written; `path` is then as it was before.
    """
    path, like = Path(path), Path(like)
    archive = open_file(like, _stored_names(tensors), key, quiet=True)
    mapping = _mapping(archive, tensors, quiet=True)
    raw_of = {form.name: form for form in stored_forms(mapping)}
    changes: dict[str, Tensor] = {}
    replaced: list[str] = []
    for name, tensor in tensors.items():
        if name in mapping:
            raw = mapping[name]
            changes[raw] = _fitted(like, name, tensor, archive.read(raw))
        elif name in raw_of:
            form = raw_of[name]
            old = {part: archive.read(mapping[part]) for part in form.parts}
            new = encoded(form, tensor.detach().cpu(), old)
            if new is None:
                logger.warning(
                    f"{path}: {name} is written as a plain tensor: {form.kind} cannot hold the pruned values"
                )
                replaced += [mapping[part] for part in form.parts]
                changes[_raw_name(name, form.parts[0], mapping)] = tensor.detach().cpu().contiguous()
            else:
                changes |= {mapping[part]: _fitted(like, part, new[part], old[part]) for part in form.parts}
        else:
            raise InstanceError(f"{like}: holds no tensor {name}")
    archive.write(path, changes, replaced)


def write_state_dict(path: Path | str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as a new checkpoint: .safetensors, or a file of torch.save for .pt and .pth.

    Raises
    ------
    OutputError
        When the file cannot be written; `path` is then as it was before.
    """
    import io

    from safetensors.torch import save

    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    content = io.BytesIO()
    if Path(path).suffix == ".safetensors":
        content.write(save(own))
    else:
        torch.save(own, content)
    with atomic_write(path) as file:
        file.write(content.getvalue())


def checkpoint_sha256(path: Path | str) -> str:
    """SHA-256 of the file, in hexadecimal; of a folder that of its index and shards.

    Raises
    ------
    InstanceError
        When it cannot be read.
    """
    path = Path(path)
    try:
        if path.exists() and container_of(path) == "folder":
            archive = open_file(path)
            assert isinstance(archive, FolderArchive)
            total = hashlib.sha256()
            for member in archive.members():
                total.update(f"{member.name} {file_sha256(member)}\n".encode(errors="surrogateescape"))
            return total.hexdigest()
        return file_sha256(path)
    except OSError as error:
        raise InstanceError(f"{path}: cannot be read: {error.strerror or error}") from None


def _stored_names(wanted: Iterable[str]) -> set[str]:
    """The names under which tensors may be stored: their own, and those of masks and parametrisations."""
    out = set()
    for name in wanted:
        stem, _, leaf = name.rpartition(".")
        base = f"{stem}.parametrizations.{leaf}" if stem else f"parametrizations.{leaf}"
        out |= {name, f"{name}_orig", f"{name}_g", f"{base}.original", f"{base}.original0"}
    return out


def _mapping(archive: Archive, wanted: Iterable[str] | None, *, quiet: bool = False) -> dict[str, str]:
    """Plain names to the names of the file."""
    if wanted is None:
        return without_wrappers(archive.shapes)
    wanted = set(wanted)
    mapping = matched(archive.shapes, wanted)
    if not wanted <= mapping.keys():
        more = matched(archive.shapes, _stored_names(wanted))
        mapping = more if prefix_of(more) != prefix_of(mapping) else mapping
    if not quiet and (words := in_words(prefix_of(mapping))):
        logger.info(f"{archive.path}: names are taken {words}")
    return mapping


def _tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each name of a tensor that several layers share, the others."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            names.setdefault(id(tensor), []).append(name)
    return {name: tuple(o for o in group if o != name) for group in names.values() for name in group}


def _check_fit(
    path: Path,
    model: nn.Module,
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    made_plain: Sequence[tuple[nn.Module, str, str]],
) -> None:
    """Refuse a checkpoint that lacks tensors of the network, has others, or has them in other shapes."""
    groups = _tied(model)
    hidden = set()
    expected = dict(own)
    for module, leaf, name in made_plain:
        stem, _, last = name.rpartition(".")
        base = f"{stem}.parametrizations.{last}." if stem else f"parametrizations.{last}."
        hidden |= {key for key in own if key.startswith(base)}
        hidden |= {key for key in own if key in {f"{name}_{e}" for e in ("orig", "mask", "g", "v", "u")}}
        expected[name] = getattr(module, leaf)
    problems = []
    missing = [
        name
        for name, tensor in own.items()
        if isinstance(tensor, Tensor)
        and name not in hidden
        and not any(alias in tensors for alias in (name, *groups.get(name, ())))
        and not name.endswith("num_batches_tracked")
    ]
    unexpected = [
        name for name, t in tensors.items() if name not in expected and not ignorable(name, t.is_floating_point())
    ]
    if missing:
        problems.append(f"it lacks {_listed(missing)}")
    if unexpected:
        problems.append(f"the network has no {_listed(unexpected)}")
    shapes = [
        f"{name} ({tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)})"
        for name in expected
        if name in tensors and isinstance(expected[name], Tensor) and tensors[name].shape != expected[name].shape
    ]
    if shapes:
        problems.append(f"of another shape are {_listed(shapes)}")
    for name, others in groups.items():
        for other in others:
            if (
                name < other
                and name in tensors
                and other in tensors
                and not torch.equal(tensors[name], tensors[other])
            ):
                problems.append(
                    f"{name} and {other} are one tensor in the network, and two that differ in the file"
                )
    if problems:
        raise InstanceError(f"{path}: does not fit the network: {'; '.join(problems)}")


def _tell_ignored(
    path: Path,
    archive: Archive,
    mapping: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
) -> None:
    outside = [raw for raw in archive.shapes if raw not in set(mapping.values())]
    extras = [name for name in tensors if name not in own]
    ignored = [*archive.ignored, *outside, *extras]
    if ignored:
        logger.info(f"{path}: ignored, as no part of the network: {_listed(ignored)}")


def _raw_name(name: str, part: str, mapping: Mapping[str, str]) -> str:
    """The name of a plain tensor in the file, with the prefix that the part has there."""
    return f"{mapping[part].removesuffix(part)}{name}"


def _fitted(path: Path, name: str, new: Tensor, old: Tensor) -> Tensor:
    """A new tensor in the type of the old one, on the CPU."""
    if new.shape != old.shape:
        raise InstanceError(f"{path}: {name} has shape {tuple(old.shape)}, not {tuple(new.shape)}")
    return new.detach().to("cpu", old.dtype).contiguous()


def _listed(names: Iterable[str]) -> str:
    """Up to six names, and how many more."""
    all_names = list(names)
    more = f" and {len(all_names) - 6} more" if len(all_names) > 6 else ""
    return ", ".join(all_names[:6]) + more
