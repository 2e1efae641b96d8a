"""Checkpoints: every container comes back as it was, code in them never runs, misfits are named."""

import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

from safetensors import safe_open  # noqa: E402

from cbs_opt.errors import InstanceError, OutputError  # noqa: E402
from cbs_opt.files.npz import write_npz  # noqa: E402
from cbs_opt.instances.checkpoints import (  # noqa: E402
    checkpoint_sha256,
    load_checkpoint,
    read_checkpoint,
    write_checkpoint,
)


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2, bias=False))


def write(kind, path, state):
    if kind == "safetensors":
        safetensors.save_file(state, path, {"trained on": "nothing"})
    elif kind == "npz":
        arrays = {name: tensor.numpy() for name, tensor in state.items()}
        np.savez_compressed(path, about=np.array('{"network": "test"}'), **arrays)
    elif kind == "torch":
        torch.save(OrderedDict(state), path)
    elif kind == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind == "nested":
        parallel = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"epoch": 7, "state_dict": parallel, "optimizer": {"lr": [0.1]}}, path)
    return path


KINDS = {"safetensors": ".safetensors", "npz": ".npz", "torch": ".pt", "legacy": ".bin", "nested": ".pth"}


@pytest.fixture(params=KINDS)
def checkpoint(request, tmp_path):
    state = make_model().state_dict()
    return write(request.param, tmp_path / f"in{KINDS[request.param]}", state), request.param, state


def test_every_container_is_read_and_loaded(checkpoint):
    path, _, state = checkpoint
    tensors = read_checkpoint(path)
    assert list(tensors.keys()) == list(state.keys()) or sorted(tensors) == sorted(state)
    assert all(
        torch.equal(tensors[name], state[name]) and tensors[name].dtype == state[name].dtype for name in state
    )
    model = make_model()
    torch.nn.init.zeros_(model[0].weight)
    load_checkpoint(model, path)
    assert torch.equal(model[0].weight, state["0.weight"])


def test_the_container_is_known_by_content_not_by_name(checkpoint, tmp_path):
    path, _, state = checkpoint
    other = tmp_path / "weights"
    other.write_bytes(path.read_bytes())
    assert torch.equal(read_checkpoint(other)["2.weight"], state["2.weight"])


@pytest.mark.parametrize("in_place", [False, True])
def test_writing_changes_the_named_tensors_and_nothing_else(checkpoint, tmp_path, in_place):
    path, kind, state = checkpoint
    out = path if in_place else tmp_path / f"out{path.suffix}"
    write_checkpoint(out, {"0.weight": torch.zeros(4, 3, dtype=torch.float64)}, like=path)
    tensors = read_checkpoint(out)
    assert not tensors["0.weight"].any() and tensors["0.weight"].dtype == torch.float32
    assert all(torch.equal(tensors[name], state[name]) for name in state if name != "0.weight")
    if kind == "npz":
        with np.load(out) as npz:
            assert str(npz["about"]) == '{"network": "test"}'
    if kind == "safetensors":
        with safe_open(out, "pt") as file:
            assert file.metadata() == {"trained on": "nothing"}
    if kind == "nested":
        content = torch.load(out, weights_only=True)
        assert content["epoch"] == 7 and content["optimizer"] == {"lr": [0.1]}
        assert all(name.startswith("module.") for name in content["state_dict"])


def test_writing_refuses_tensors_that_are_not_there(checkpoint, tmp_path):
    path = checkpoint[0]
    out = tmp_path / "out"
    with pytest.raises(InstanceError, match=r"holds no tensor 9\.weight"):
        write_checkpoint(out, {"9.weight": torch.zeros(1)}, like=path)
    with pytest.raises(InstanceError, match=r"0.weight has shape \(4, 3\), not \(2,\)"):
        write_checkpoint(out, {"0.weight": torch.zeros(2)}, like=path)
    assert not out.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="NOT TESTED: no /dev/full here")
def test_a_full_disk_is_told(checkpoint):
    with pytest.raises(OutputError, match="cannot be written: No space left"):
        write_checkpoint("/dev/full", {}, like=checkpoint[0])


def test_a_folder_that_is_not_there_is_told(checkpoint, tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        write_checkpoint(tmp_path / "no" / "out", {}, like=checkpoint[0])


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickles_with_code_do_not_run(tmp_path):
    sprung = tmp_path / "sprung"
    weights = {"w": torch.arange(2.0), "x": Trap(sprung)}
    for name, zipped in (("new", True), ("legacy", False)):
        beside, whole = tmp_path / f"beside-{name}.pt", tmp_path / f"whole-{name}.pt"
        torch.save(weights, beside, _use_new_zipfile_serialization=zipped)
        torch.save(Trap(sprung), whole, _use_new_zipfile_serialization=zipped)
        assert list(read_checkpoint(beside)) == ["w"] and read_checkpoint(beside)["w"].tolist() == [0, 1]
        write_checkpoint(tmp_path / "out", {"w": torch.zeros(2)}, like=beside)
        assert not read_checkpoint(tmp_path / "out")["w"].any()
        with pytest.raises(
            InstanceError, match=r"holds no dictionary of tensors, only io\.open: save torch\.save"
        ):
            read_checkpoint(whole)
    plain = tmp_path / "plain.pkl"
    plain.write_bytes(pickle.dumps({"w": Trap(sprung)}))
    with pytest.raises(InstanceError, match=r"is a pickle, but no file of torch\.save"):
        read_checkpoint(plain)
    objects = tmp_path / "objects.npz"
    np.savez(objects, w=np.array([Trap(sprung)], dtype=object))
    with pytest.raises(InstanceError, match="pickled Python objects, which are never loaded"):
        read_checkpoint(objects)
    assert not sprung.exists()


def test_misfits_are_named_and_change_nothing(tmp_path):
    state = make_model().state_dict()
    state["2.weight"] = torch.zeros(9, 9)
    del state["0.bias"]
    state["extra"] = torch.zeros(1)
    path = write("safetensors", tmp_path / "bad.safetensors", state)
    model = make_model()
    with torch.no_grad():
        model[0].weight.fill_(5)
    with pytest.raises(InstanceError) as caught:
        load_checkpoint(model, path)
    assert str(caught.value) == (
        f"{path}: does not fit the network: it lacks 0.bias; the network has no extra; "
        "of another shape are 2.weight ((9, 9), expected (2, 4))"
    )
    assert (model[0].weight == 5).all()


def test_a_long_list_of_misfits_is_cut(tmp_path):
    path = write("torch", tmp_path / "few.pt", {"w": torch.zeros(1)})
    with pytest.raises(InstanceError, match=r"it lacks 0.weight.* and 1 more"):
        load_checkpoint(make_model(), path)


def test_what_is_no_checkpoint_is_refused_in_one_sentence(tmp_path):
    good = write("safetensors", tmp_path / "good.safetensors", make_model().state_dict())
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-8])
    zipped = write("torch", tmp_path / "good.pt", make_model().state_dict())
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(zipped.read_bytes()[: zipped.stat().st_size // 2])
    (tmp_path / "text.pt").write_text("not a checkpoint", encoding="utf-8")
    (tmp_path / "empty.pt").touch()
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "folder").mkdir()
    write_npz(tmp_path / "no-tensors.npz", {"about": np.array("nothing")})
    for name, words in (
        ("cut.safetensors", "is damaged"),
        ("damaged.pt", "no known checkpoint format|is damaged|cannot be read"),
        ("text.pt", "no known checkpoint format"),
        ("empty.pt", "no known checkpoint format"),
        ("list.pt", "holds no dictionary of tensors"),
        ("no-tensors.npz", "holds no tensors"),
        ("absent.pt", "No such file"),
        ("folder", "holds no checkpoint: no index of shards"),
    ):
        with pytest.raises(InstanceError, match=words) as caught:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(InstanceError, match="No such file"):
        checkpoint_sha256(tmp_path / "absent.pt")
    assert len(checkpoint_sha256(good)) == 64


def test_a_tensor_with_two_names_changes_under_both(tmp_path):
    state = make_model().state_dict()
    state["again.weight"] = state["0.weight"]
    like = write("torch", tmp_path / "in.pt", state)
    pruned = torch.zeros(4, 3)
    write_checkpoint(tmp_path / "out.pt", {"0.weight": pruned}, like)
    after = read_checkpoint(tmp_path / "out.pt")
    assert torch.equal(after["0.weight"], pruned) and torch.equal(after["again.weight"], pruned)
    assert torch.equal(after["2.weight"], state["2.weight"])


def test_a_truncated_file_of_torch_save_is_called_damaged(tmp_path):
    path = write("torch", tmp_path / "in.pt", make_model().state_dict())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InstanceError, match="is damaged"):
        read_checkpoint(path)
