"""Checkpoints as people have them: training states, wrappers, averages, whole models, shards, small types."""

import json
import shutil
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

from torch import nn  # noqa: E402
from torch.optim.swa_utils import AveragedModel  # noqa: E402

from cbs_opt.errors import InstanceError, OutputError  # noqa: E402
from cbs_opt.instances.checkpoint_names import matched, without_wrappers  # noqa: E402
from cbs_opt.instances.checkpoints import (  # noqa: E402
    checkpoint_sha256,
    load_checkpoint,
    read_checkpoint,
    write_checkpoint,
)


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


class Config:
    """A class of the user's that nobody else can import."""

    def __init__(self):
        self.layers, self.schedule = [1, 2], {"lr": 0.1}


def training_state(path, **options):
    model = make()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    content = {
        "epoch": np.int64(3),
        "model": model.state_dict(),
        "optimizer": optimizer,
        "rng": np.random.default_rng(0).bit_generator.state,
        "config": Config(),
        "best": np.float64(0.9),
    }
    torch.save(content, path, **options)
    return model


def prefixed(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_state_is_read_and_written_with_all_that_lies_beside(zipped, tmp_path, caplog):
    caplog.set_level("INFO", "cbs_opt")
    model = training_state(tmp_path / "in.pt", _use_new_zipfile_serialization=zipped)
    fresh = make()
    load_checkpoint(fresh, tmp_path / "in.pt")
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert (
        "`model` is taken" in caplog.text and "ignored, as no part of the network: epoch, optimizer" in caplog.text
    )
    write_checkpoint(tmp_path / "out.pt", {"0.weight": torch.ones(4, 3)}, like=tmp_path / "in.pt")
    before, after = (torch.load(tmp_path / name, weights_only=False) for name in ("in.pt", "out.pt"))
    assert (after["model"]["0.weight"] == 1).all() and torch.equal(
        after["model"]["0.bias"], before["model"]["0.bias"]
    )
    assert after["config"].schedule == {"lr": 0.1} and after["best"] == np.float64(0.9)
    moments = [
        s["exp_avg"] for state in (before, after) for s in state["optimizer"].state_dict()["state"].values()
    ]
    assert all(
        torch.equal(a, b) for a, b in zip(moments[: len(moments) // 2], moments[len(moments) // 2 :], strict=True)
    )
    if zipped:
        with zipfile.ZipFile(tmp_path / "out.pt") as archive:
            assert archive.testzip() is None
            for info in archive.infolist():
                start = info.header_offset + 30 + len(info.filename)
                with (tmp_path / "out.pt").open("rb") as file:
                    file.seek(info.header_offset + 28)
                    start += int.from_bytes(file.read(2), "little")
                assert "/data/" not in info.filename or start % 64 == 0
        assert (torch.load(tmp_path / "out.pt", weights_only=False, mmap=True)["model"]["0.weight"] == 1).all()


WRAPPED = {
    "compiled": lambda state: prefixed("_orig_mod.", state),
    "compiled and parallel": lambda state: prefixed("_orig_mod.module.", state),
    "parallel and compiled": lambda state: prefixed("module._orig_mod.", state),
    "sharded": lambda state: {name.replace(".", "._fsdp_wrapped_module."): t for name, t in state.items()},
    "lightning": lambda state: {"state_dict": {**prefixed("model.", state), "criterion.weight": torch.ones(2)}},
    "nested": lambda state: {"model_state": prefixed("module.model.", state), "epoch": 1},
    "averaged": lambda state: {**prefixed("module.", state), "n_averaged": torch.tensor(3)},
    "profiled": lambda state: {**state, "total_ops": torch.zeros(1).double(), "0.total_params": torch.zeros(1)},
    "part of more": lambda state: {**prefixed("encoder.", state), "decoder.weight": torch.ones(2, 2)},
    "early": lambda state: {name: t for name, t in state.items() if "num_batches" not in name},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_and_extras_are_looked_through(name, tmp_path):
    model = make()
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save(WRAPPED[name](model.state_dict()), path)
    fresh = make()
    nn.init.zeros_(fresh[0].weight)
    load_checkpoint(fresh, path)
    assert torch.equal(fresh[0].weight, model[0].weight)
    assert torch.equal(read_checkpoint(path, {"0.weight", "2.weight"})["2.weight"], model[2].weight)
    write_checkpoint(out, {"0.weight": torch.zeros(4, 3), "2.weight": model[2].weight}, like=path)
    load_checkpoint(fresh, out)
    assert not fresh[0].weight.any() and torch.equal(fresh[2].weight, model[2].weight)
    names = [set(f.get("state_dict", f)) for f in (torch.load(p) for p in (path, out))]
    assert names[0] == names[1]


def test_wrapped_networks_take_plain_checkpoints(tmp_path):
    model = make()
    safetensors.save_file(model.state_dict(), tmp_path / "plain.safetensors")
    for wrapped in (nn.DataParallel(make()), AveragedModel(make()), nn.ModuleDict({"model": make()})):
        parameters = dict(wrapped.named_parameters())
        nn.init.zeros_(next(iter(parameters.values())))
        load_checkpoint(wrapped, tmp_path / "plain.safetensors")
        assert torch.equal(next(iter(parameters.values())), model[0].weight)


def test_names_are_matched_by_the_prefix_that_fits():
    wanted = ["fc.weight", "fc.bias"]
    assert matched(["a.fc.weight", "a.fc.bias", "b.fc.weight"], wanted)["fc.bias"] == "a.fc.bias"
    assert matched(["weight", "bias"], wanted) == {"fc.weight": "weight", "fc.bias": "bias"}
    assert matched(["module.weight"], ["module.weight"]) == {"module.weight": "module.weight"}
    assert without_wrappers(["module.a", "b"]) == {"module.a": "module.a", "b": "b"}
    assert without_wrappers(["_orig_mod.a", "a"]) == {"_orig_mod.a": "_orig_mod.a", "a": "a"}


def test_of_several_dictionaries_one_is_chosen_aloud(tmp_path, caplog):
    state = make().state_dict()
    averaged = {name: tensor * 0 for name, tensor in state.items()}
    path = tmp_path / "timm.pth"
    torch.save({"state_dict_ema": averaged, "state_dict": state, "epoch": 1}, path)
    model = make()
    load_checkpoint(model, path)
    assert torch.equal(model[0].weight, state["0.weight"])
    assert "`state_dict` is taken; it also has `state_dict_ema` (--checkpoint-key state_dict_ema" in caplog.text
    load_checkpoint(model, path, "state_dict_ema")
    assert not model[0].weight.any()
    write_checkpoint(tmp_path / "out.pth", {"0.weight": torch.ones(4, 3)}, path, "state_dict_ema")
    content = torch.load(tmp_path / "out.pth")
    assert (content["state_dict_ema"]["0.weight"] == 1).all()
    assert torch.equal(content["state_dict"]["0.weight"], state["0.weight"])
    with pytest.raises(InstanceError, match="no dictionary of tensors under `ema`; it has `state_dict_ema`"):
        load_checkpoint(model, path, "ema")


def test_whole_models_are_read_without_their_classes(tmp_path):
    model = make()
    model.register_buffer("scratch", torch.ones(2), persistent=False)
    torch.save({"model": model, "ema": None}, tmp_path / "whole.pt")
    torch.jit.save(torch.jit.trace(make().eval(), torch.randn(2, 3)), tmp_path / "script.pt")
    for name in ("whole.pt", "script.pt"):
        fresh = make()
        nn.init.zeros_(fresh[2].weight)
        load_checkpoint(fresh, tmp_path / name)
        assert torch.equal(fresh[2].weight, model[2].weight)
        write_checkpoint(tmp_path / "out.pt", {"2.weight": torch.zeros(2, 4)}, tmp_path / name)
        assert not read_checkpoint(tmp_path / "out.pt", {"2.weight"})["2.weight"].any()
    script = torch.jit.load(tmp_path / "out.pt")
    assert not script.eval()(torch.randn(2, 3)).any()


def test_views_keep_their_places(tmp_path):
    base = torch.arange(24.0)
    tensors = {"t": base[:12].reshape(3, 4).T, "tail": base[12:], "same": base[:12].reshape(3, 4).T}
    torch.save(tensors, tmp_path / "in.pt")
    write_checkpoint(tmp_path / "out.pt", {"t": torch.zeros(4, 3)}, tmp_path / "in.pt")
    after = torch.load(tmp_path / "out.pt")
    assert not after["t"].any() and after["t"].stride() == (1, 4) and after["tail"].tolist() == list(range(12, 24))
    assert not after["same"].any()
    with pytest.raises(
        InstanceError, match="'t' shares its numbers with 'same' in the file, but not in the network"
    ):
        write_checkpoint(
            tmp_path / "out.pt", {"t": torch.zeros(4, 3), "same": torch.ones(4, 3)}, tmp_path / "in.pt"
        )
    torch.save({"a": base[:10], "b": base[5:]}, tmp_path / "overlap.pt")
    with pytest.raises(InstanceError, match="'b' and 'a' are parts of the same numbers"):
        write_checkpoint(tmp_path / "out.pt", {"a": torch.zeros(10)}, tmp_path / "overlap.pt")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight


def test_one_name_of_a_tied_tensor_is_enough_and_copies_must_agree(tmp_path):
    model = Tied()
    safetensors.save_model(model, str(tmp_path / "one.safetensors"))
    assert len(read_checkpoint(tmp_path / "one.safetensors")) == 1
    fresh = Tied()
    nn.init.zeros_(fresh.a.weight)
    load_checkpoint(fresh, tmp_path / "one.safetensors")
    assert torch.equal(fresh.a.weight, model.a.weight) and fresh.b.weight is fresh.a.weight
    np.savez(tmp_path / "two.npz", **{"a.weight": np.eye(4, dtype="f"), "b.weight": np.ones((4, 4), "f")})
    with pytest.raises(
        InstanceError, match=r"a\.weight and b\.weight are one tensor in the network, and two that differ"
    ):
        load_checkpoint(fresh, tmp_path / "two.npz")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float64"])
def test_storage_types_are_kept(dtype, tmp_path):
    kind = getattr(torch, dtype)
    state = {name: t.to(kind) if t.is_floating_point() else t for name, t in make().state_dict().items()}
    for path in (tmp_path / "x.safetensors", tmp_path / "x.pt"):
        safetensors.save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
        model = make()
        load_checkpoint(model, path)
        assert model[0].weight.dtype == torch.float32 and torch.equal(model[0].weight, state["0.weight"].float())
        write_checkpoint(path, {"0.weight": model[0].weight.detach() * (torch.arange(3) > 0)}, path)
        after = read_checkpoint(path)
        assert after["0.weight"].dtype == kind and not after["0.weight"][:, 0].float().any()
        assert torch.equal(after["0.weight"][:, 1:].float(), state["0.weight"][:, 1:].float())
        assert torch.equal(after["2.weight"].float(), state["2.weight"].float())


def shards(folder, ending="safetensors"):
    state = make().state_dict()
    names = list(state)
    files = {f"model-0000{k}-of-00002.{ending}": names[(k - 1) * 3 : k * 3 if k == 1 else None] for k in (1, 2)}
    folder.mkdir()
    for file, own in files.items():
        part = {name: state[name] for name in own}
        safetensors.save_file(part, folder / file, {"format": "pt"}) if ending != "bin" else torch.save(
            part, folder / file
        )
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: file for file, own in files.items() for name in own},
    }
    stem = "model.safetensors" if ending != "bin" else "pytorch_model.bin"
    (folder / f"{stem}.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "tf_model.h5").write_bytes(b"stale")
    return state


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_folders_of_shards_come_back_as_shards(ending, tmp_path):
    state = shards(tmp_path / "hf", ending)
    index = next((tmp_path / "hf").glob("*.index.json"))
    for source in (tmp_path / "hf", index):
        model = make()
        nn.init.zeros_(model[2].weight)
        load_checkpoint(model, source)
        assert torch.equal(model[2].weight, state["2.weight"])
    write_checkpoint(
        tmp_path / "out", {"0.weight": torch.zeros(4, 3), "2.weight": torch.ones(2, 4)}, tmp_path / "hf"
    )
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {path.name for path in (tmp_path / "hf").iterdir()} - {"tf_model.h5"}
    after = read_checkpoint(tmp_path / "out")
    assert not after["0.weight"].any() and (after["2.weight"] == 1).all()
    assert torch.equal(after["1.weight"], state["1.weight"])
    assert checkpoint_sha256(tmp_path / "hf") == checkpoint_sha256(index) != checkpoint_sha256(tmp_path / "out")
    shutil.copytree(tmp_path / "hf", tmp_path / "copy")
    assert checkpoint_sha256(tmp_path / "copy") == checkpoint_sha256(tmp_path / "hf")


def test_one_file_in_a_folder_and_what_is_wrong_with_folders(tmp_path):
    single = tmp_path / "single"
    single.mkdir()
    safetensors.save_file(make().state_dict(), single / "model.safetensors")
    assert set(read_checkpoint(single)) == set(make().state_dict())
    shards(tmp_path / "hf")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        write_checkpoint(tmp_path / "file", {}, tmp_path / "hf")
    for text, words in (
        ('{"weight_map": {"a": "../x"}}', "must name a file of its own folder"),
        ("{", "is no index of shards: JSONDecodeError"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "No such file"),
        ('{"weight_map": {"a": ".."}}', "must name a file of its own folder"),
        ('{"weight_map": {"a": "model.safetensors.index.json"}}', "must name a file of its own folder"),
        ('{"weight_map": {}}', "must name a file of its own folder"),
    ):
        index.write_text(text, encoding="utf-8")
        with pytest.raises(InstanceError, match=words):
            read_checkpoint(tmp_path / "hf")


def test_pickles_that_try_to_reach_out_stay_inert(tmp_path):
    class Reach:
        def __init__(self, call):
            self.call = call

        def __reduce__(self):
            return self.call

    import os
    import subprocess

    sprung = tmp_path / "sprung"
    for k, call in enumerate(
        (
            (os.system, (f"touch {sprung}",)),
            (subprocess.check_call, (["touch", str(sprung)],)),
            (getattr, ("text", "upper")),
            (eval, (f"open({str(sprung)!r}, 'w')",)),
            (print, ("said",)),
        )
    ):
        path = tmp_path / f"{k}.pt"
        torch.save({"w": torch.ones(2), "again": Reach(call), "deep": {"x": [Reach(call)]}}, path)
        assert read_checkpoint(path)["w"].tolist() == [1, 1]
    assert not sprung.exists()


def test_names_of_a_pickle_do_not_make_torch_load_modules(tmp_path):
    import subprocess
    import sys

    with zipfile.ZipFile(tmp_path / "reach.pt", "w") as file:
        file.writestr("reach/data.pkl", b"\x80\x02ctorch\n_inductor\n.")
        file.writestr("reach/version", b"3")
    code = (
        "import sys, contextlib\n"
        "from cbs_opt.errors import CbsError\n"
        "from cbs_opt.instances.checkpoints import read_checkpoint\n"
        "before = {*sys.modules}\n"
        "with contextlib.suppress(CbsError):\n"
        f"    read_checkpoint({str(tmp_path / 'reach.pt')!r})\n"
        "assert 'torch._inductor' in before or 'torch._inductor' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_tensor_that_repeats_its_numbers_cannot_be_changed(tmp_path):
    torch.save({"w": torch.ones(1).expand(3, 4)}, tmp_path / "in.pt")
    assert read_checkpoint(tmp_path / "in.pt")["w"].shape == (3, 4)
    with pytest.raises(InstanceError, match="'w' repeats its numbers"):
        write_checkpoint(tmp_path / "out.pt", {"w": torch.arange(12.0).reshape(3, 4)}, tmp_path / "in.pt")


def test_checkpoints_of_woodfisher_are_read_and_written(tmp_path):
    """Its MLPNet: layers wrapped beside a mask, in DataParallel, beside a pickled optimizer."""
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(5, 5)).sum().backward()
    optimizer.step()
    state = {}
    for name in ("0", "2"):
        weight = model[int(name)].weight.detach()
        state[f"module.{name}._weight_mask"] = (torch.arange(weight.numel()).reshape(weight.shape) % 5 > 0).float()
        state[f"module.{name}._layer.weight"] = weight
    torch.save(
        {"epoch": 25, "model_state_dict": state, "optimizer": {"optimizer": optimizer}}, tmp_path / "in.ckpt"
    )
    kept = {name: state[f"module.{name}._weight_mask"] for name in ("0", "2")}
    fresh = nn.Sequential(nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False))
    load_checkpoint(fresh, tmp_path / "in.ckpt")
    assert all(torch.equal(fresh[int(k)].weight, model[int(k)].weight * mask) for k, mask in kept.items())
    write_checkpoint(tmp_path / "out.ckpt", {"0.weight": torch.zeros(4, 5)}, tmp_path / "in.ckpt")
    after = torch.load(tmp_path / "out.ckpt", weights_only=False)
    assert not after["model_state_dict"]["module.0._layer.weight"].any()
    assert torch.equal(after["model_state_dict"]["module.2._layer.weight"], model[2].weight)
    assert after["optimizer"]["optimizer"].state_dict()["state"]
