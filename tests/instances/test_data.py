"""Readers of published data: the same images from every layout, one sentence for what is wrong."""

import gzip
import io
import pickle
import struct

import numpy as np
import pytest

torch = pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")

from cbs_opt.errors import InstanceError, UsageError  # noqa: E402
from cbs_opt.instances.data import open_samples, read_samples  # noqa: E402
from cbs_opt.instances.networks import Network, load_network  # noqa: E402

RNG = np.random.default_rng(0)
GREY, GREY_LABELS = RNG.integers(0, 256, (12, 28, 28), dtype=np.uint8), np.arange(12) % 10
COLOUR, COLOUR_LABELS = RNG.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8), np.arange(10)


@pytest.fixture(scope="module")
def mlpnet():
    return load_network("mlpnet")


@pytest.fixture(scope="module")
def cifarnet():
    return load_network("cifarnet")


def own_network(data=None, test_data=None, dtype=torch.float32):
    return Network("user:net", torch.nn.Linear(4, 2, dtype=dtype), ("weight",), None, None, data, test_data)


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def planes(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def same(samples, network, images, labels):
    torch.testing.assert_close(samples.inputs, network.prepare(torch.from_numpy(images)))
    assert samples.labels.dtype == torch.int64 and samples.labels.tolist() == list(labels)
    assert samples.inputs.dtype == torch.float32


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dot", ["-", "."])
def test_idx_files_as_downloaded(tmp_path, mlpnet, packed, dot):
    end, pack = (".gz", gzip.compress) if packed else ("", bytes)
    for stem, part in (("train", slice(0, 8)), ("t10k", slice(8, 12))):
        (tmp_path / f"{stem}-images{dot}idx3-ubyte{end}").write_bytes(pack(idx(GREY[part])))
        (tmp_path / f"{stem}-labels{dot}idx1-ubyte{end}").write_bytes(pack(idx(GREY_LABELS[part])))
    same(read_samples(tmp_path, mlpnet, "train"), mlpnet, GREY[:8], GREY_LABELS[:8])
    same(read_samples(tmp_path, mlpnet, "test"), mlpnet, GREY[8:], GREY_LABELS[8:])
    one = tmp_path / f"t10k-images{dot}idx3-ubyte{end}"
    same(read_samples(one, mlpnet, "train"), mlpnet, GREY[8:], GREY_LABELS[8:])
    (tmp_path / f"t10k-labels{dot}idx1-ubyte{end}").unlink()
    with pytest.raises(InstanceError, match="its labels are missing"):
        read_samples(one, mlpnet, "test")


def test_damaged_idx_files_are_refused(tmp_path, mlpnet):
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(GREY_LABELS))
    for content, words in (
        (idx(GREY)[:-5], "is damaged: its header tells of 9408 bytes"),
        (idx(GREY)[:9], "is damaged"),
        (b"PK\3\4 something", "is no IDX file"),
        (b"", "is no IDX file"),
        (gzip.compress(idx(GREY))[:-20], "cannot be read"),
    ):
        images.write_bytes(content)
        with pytest.raises(InstanceError, match=words):
            read_samples(tmp_path, mlpnet, "train")
    images.write_bytes(idx(GREY[:5]))
    with pytest.raises(InstanceError, match="there are 12 labels for 5 images"):
        read_samples(tmp_path, mlpnet, "train", seed=0)


def python_2_pickle(images, labels):
    """A batch as Python 2 wrote the published ones: byte strings, NumPy's old module names."""
    data = planes(images).tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01" + b"M" + struct.pack("<H", len(images)) + b"M\x00\x0c\x86"
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<I", len(data)) + data + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([int(label)]) for label in labels) + b"e"
    return b"\x80\x02}(U\x0bbatch_labelU\x08batch 1 U\x04data" + array + b"U\x06labels" + numbers + b"u."


def python_3_pickle(images, labels, protocol):
    keys = {b"data": planes(images), b"labels": [int(label) for label in labels]}
    return pickle.dumps(keys, protocol=protocol)


@pytest.mark.parametrize("form", ["python 2", "protocol 2", "protocol 4", "binary"])
def test_cifar_batches(tmp_path, cifarnet, form):
    make = {
        "python 2": python_2_pickle,
        "protocol 2": lambda x, y: python_3_pickle(x, y, 2),
        "protocol 4": lambda x, y: python_3_pickle(x, y, 4),
        "binary": lambda x, y: np.column_stack([y.astype(np.uint8), planes(x)]).tobytes(),
    }[form]
    folder = tmp_path / ("cifar-10-batches-bin" if form == "binary" else "cifar-10-batches-py")
    folder.mkdir()
    end = ".bin" if form == "binary" else ""
    for i in range(5):
        part = slice(2 * i, 2 * i + 2)
        (folder / f"data_batch_{i + 1}{end}").write_bytes(make(COLOUR[part], COLOUR_LABELS[part]))
    (folder / f"test_batch{end}").write_bytes(make(COLOUR[3:6], COLOUR_LABELS[3:6]))
    same(read_samples(tmp_path, cifarnet, "train"), cifarnet, COLOUR, COLOUR_LABELS)
    same(read_samples(folder, cifarnet, "test"), cifarnet, COLOUR[3:6], COLOUR_LABELS[3:6])
    one = read_samples(folder / f"data_batch_2{end}", cifarnet, "test")
    same(one, cifarnet, COLOUR[2:4], COLOUR_LABELS[2:4])


class Trap:
    def __init__(self, call, *arguments):
        self.parts = call, arguments

    def __reduce__(self):
        return self.parts


def test_batches_with_code_are_refused_and_do_not_run(tmp_path, cifarnet):
    sprung = tmp_path / "sprung"
    path = tmp_path / "data_batch_1"
    for trap in (Trap(open, str(sprung), "w"), Trap(eval, f"open({str(sprung)!r}, 'w')"), Trap(np.fromfile, "x")):
        path.write_bytes(pickle.dumps({b"data": trap, b"labels": [1]}))
        with pytest.raises(
            InstanceError, match="is refused: a batch of CIFAR-10 has arrays and lists only, it holds"
        ):
            read_samples(path, cifarnet, "train")
    assert not sprung.exists()
    for content, words in (
        (b"nonsense", "is no python batch|is refused"),
        (b"", "is no python batch"),
        (pickle.dumps([1, 2]), "is no python batch"),
        (pickle.dumps({"data": np.zeros((2, 5), np.uint8), "labels": [1, 2]}), r"shape \(m, 3072\)"),
        (pickle.dumps({"data": planes(COLOUR), "labels": [1, 2]}), "must be 10 whole numbers"),
    ):
        path.write_bytes(content)
        with pytest.raises(InstanceError, match=words):
            read_samples(path, cifarnet, "train")
    (tmp_path / "data_batch_1.bin").write_bytes(b"x" * 100)
    with pytest.raises(InstanceError, match="no multiple of 3073"):
        read_samples(tmp_path / "data_batch_1.bin", cifarnet, "train")


def test_npz_layouts(tmp_path, mlpnet):
    path = tmp_path / "data.npz"
    np.savez_compressed(path, x_train=GREY[:8], y_train=GREY_LABELS[:8], x_test=GREY[8:], y_test=GREY_LABELS[8:])
    same(read_samples(path, mlpnet, "train"), mlpnet, GREY[:8], GREY_LABELS[:8])
    same(read_samples(path, mlpnet, "test"), mlpnet, GREY[8:], GREY_LABELS[8:])
    for keys in (("x", "y"), ("images", "labels")):
        np.savez(path, **dict(zip(keys, (GREY, GREY_LABELS.astype(np.uint8)), strict=True)))
        for split in ("train", "test"):
            same(read_samples(path, mlpnet, split), mlpnet, GREY, GREY_LABELS)
    np.savez(path, x_train=GREY, y_train=GREY_LABELS)
    with pytest.raises(InstanceError, match=r"holds no images and labels of the test split.*it has `x_train`"):
        read_samples(path, mlpnet, "test")


def encoded(image, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form)
    return buffer.getvalue()


def test_npz_of_encoded_pictures(tmp_path, cifarnet):
    path = tmp_path / "data.npz"
    files = [encoded(image) for image in COLOUR]
    offset = np.cumsum([0, *map(len, files)])
    jpeg = np.frombuffer(b"".join(files), np.uint8)
    np.savez(path, jpeg=jpeg, offset=offset, y=COLOUR_LABELS)
    same(read_samples(path, cifarnet, "test"), cifarnet, COLOUR, COLOUR_LABELS)
    for change, words in (
        ({"offset": offset[::-1]}, "`offset` must rise"),
        ({"offset": offset + 9}, "`offset` must rise"),
        ({"y": COLOUR_LABELS[:3]}, "3 labels for 10 images"),
        ({"jpeg": jpeg.astype(float)}, "`jpeg` must be uint8"),
        ({"offset": np.r_[0, offset[1:] - 3]}, "image 0: cannot be read|image 1: cannot be read"),
    ):
        np.savez(path, **({"jpeg": jpeg, "offset": offset, "y": COLOUR_LABELS} | change))
        with pytest.raises(InstanceError, match=words):
            read_samples(path, cifarnet, "test")


def test_image_folders(tmp_path, cifarnet):
    for label, name in ((0, "ant"), (1, "bee"), (2, "cat")):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        (folder / "b.png").write_bytes(encoded(COLOUR[2 * label + 1]))
        (folder / "a.png").write_bytes(encoded(COLOUR[2 * label]))
        (folder / "notes.txt").write_text("no picture", encoding="utf-8")
    same(read_samples(tmp_path, cifarnet, "train"), cifarnet, COLOUR[:6], [0, 0, 1, 1, 2, 2])
    same(read_samples(tmp_path / "train", cifarnet, "test"), cifarnet, COLOUR[:6], [0, 0, 1, 1, 2, 2])
    own = read_samples(tmp_path, own_network(), "train", limit=2)
    torch.testing.assert_close(own.inputs, torch.from_numpy(COLOUR[:2]).float())
    large = np.kron(COLOUR[0], np.ones((3, 2, 1), np.uint8))
    (tmp_path / "train" / "ant" / "a.png").write_bytes(encoded(large))
    assert read_samples(tmp_path, cifarnet, "train").inputs.shape == (6, 3, 32, 32)
    with pytest.raises(InstanceError, match="must be of one size"):
        read_samples(tmp_path, own_network(), "train")
    (tmp_path / "train" / "bee" / "a.png").write_bytes(b"no picture")
    with pytest.raises(InstanceError, match=r"a\.png: cannot be read"):
        read_samples(tmp_path, cifarnet, "train")


def test_grey_pictures_for_a_grey_network(tmp_path, mlpnet):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "x.png").write_bytes(encoded(GREY[0]))
    same(read_samples(tmp_path, mlpnet, "test"), mlpnet, GREY[:1], [0])


def test_pictures_are_cropped_in_the_middle(tmp_path):
    (tmp_path / "a").mkdir()
    picture = np.zeros((512, 384, 3), np.uint8)
    picture[128:384, 64:320] = 255
    (tmp_path / "a" / "x.png").write_bytes(encoded(picture))
    x = read_samples(tmp_path, load_network("mobilenetv1-0.25"), "test").inputs[0]
    white = x[0] > 0
    # Scaled by 256/384, the white square is 171 pixels wide and in the middle of the 224 that are left.
    assert x.shape == (3, 224, 224)
    assert abs(int(white.any(0).sum()) - 171) <= 1 and abs(int(white.any(1).sum()) - 171) <= 1
    assert abs(float(torch.nonzero(white).double().mean()) - 111.5) < 1


def test_the_digits_of_scikit_learn():
    digits = pytest.importorskip("cbs_opt.instances.digits")
    pytest.importorskip("sklearn")
    network = load_network("digits-mlp")
    read = digits.read_digits()
    for split, x, y in (("train", read.x_train, read.y_train), ("test", read.x_test, read.y_test)):
        samples = read_samples("digits", network, split)
        torch.testing.assert_close(samples.inputs, x.float())
        assert torch.equal(samples.labels, y)


def test_drawing_is_repeatable_without_replacement(tmp_path, mlpnet, caplog):
    path = tmp_path / "data.npz"
    np.savez(path, x=GREY, y=np.arange(12) % 10)
    first, again = (read_samples(path, mlpnet, "train", 7, seed=3) for _ in range(2))
    assert torch.equal(first.inputs, again.inputs)
    rows = {tuple(row.tolist()) for row in first.inputs}
    assert len(rows) == 7
    assert not torch.equal(first.labels, read_samples(path, mlpnet, "train", 7, seed=4).labels)
    same(read_samples(path, mlpnet, "train", 5), mlpnet, GREY[:5], GREY_LABELS[:5])
    assert not caplog.records
    assert len(open_samples(path, mlpnet, "train", 99)) == 12
    assert "holds 12 samples, fewer than 99" in caplog.text
    with pytest.raises(UsageError, match="at least 1, got 0"):
        read_samples(path, mlpnet, "train", 0)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": GREY, "y": GREY_LABELS + 5}, "labels must be between 0 and 9 for this network, got 14|got 1"),
        ({"x": GREY, "y": GREY_LABELS - 1}, "got -1"),
        ({"x": GREY[:0], "y": GREY_LABELS[:0]}, "holds no samples"),
        ({"x": GREY, "y": np.eye(12)}, r"one per image, got float64 of shape \(12, 12\)"),
        ({"x": GREY, "y": GREY_LABELS + 0.5}, "labels must be whole numbers"),
        ({"x": GREY[:4], "y": GREY_LABELS}, "12 labels for 4 images"),
        ({"x": GREY, "y": GREY_LABELS[:4]}, "4 labels for 12 images"),
        ({"x": COLOUR, "y": COLOUR_LABELS}, "takes images of shape 28 × 28, got 32 × 32 × 3"),
        ({"x": GREY.astype("U4"), "y": GREY_LABELS}, "images must be numbers"),
        ({"x": np.full((12, 28, 28), np.nan), "y": GREY_LABELS}, "NaN"),
        ({"z": GREY}, "it has `z`"),
    ],
)
def test_what_does_not_fit_is_told_with_the_file(tmp_path, mlpnet, arrays, words):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    with pytest.raises(InstanceError, match=words) as caught:
        read_samples(path, mlpnet, "train", seed=0)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_unknown_layouts_are_told(tmp_path, mlpnet):
    (tmp_path / "data.csv").write_text("1,2", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    for name, words in (
        ("data.csv", "is no data that we know"),
        ("absent", "no such file or folder"),
        ("folder", "holds no train data that we know"),
    ):
        with pytest.raises(InstanceError, match=words):
            read_samples(tmp_path / name, mlpnet, "train")


def test_a_factorys_own_data():
    x, y = torch.randn(9, 4), torch.arange(9) % 2
    pair = own_network((x, y), (x[:3], y[:3]))
    assert torch.equal(read_samples(None, pair, "train").inputs, x)
    assert len(open_samples(None, pair, "test")) == 3
    loader = own_network([(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])])
    assert torch.equal(read_samples(None, loader, "test").inputs, x)
    assert torch.equal(read_samples(None, loader, "train", 5).labels, y[:5])
    arrays = own_network((x.numpy(), y.numpy()))
    assert torch.equal(read_samples(None, arrays, "train").inputs, x)
    with pytest.raises(UsageError, match="provides no data"):
        read_samples(None, own_network(), "train")
    for data, words in (
        ((x, y[:3]), "9 inputs and 3 labels"),
        ((x[:0], y[:0]), "holds no samples"),
        ([], "at least one"),
        (7, "must be"),
    ):
        with pytest.raises(InstanceError, match=words):
            read_samples(None, own_network(data), "train")


def test_inputs_come_in_the_type_of_the_users_weights(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.zeros((3, 4), np.float32), y=np.zeros(3, np.int64))
    network = own_network(dtype=torch.float64)
    assert read_samples(tmp_path / "data.npz", network, "train").inputs.dtype == torch.float64


def test_a_folder_of_the_other_split_is_not_taken_for_a_class(tmp_path):
    for label in ("a", "b"):
        (tmp_path / "val" / label).mkdir(parents=True)
        Image.fromarray(GREY[0]).save(tmp_path / "val" / label / "0.png")
    network = own_network()
    with pytest.raises(InstanceError, match="has a folder val, but none of the train split"):
        open_samples(tmp_path, network, "train")
    assert open_samples(tmp_path, network, "test").labels.tolist() == [0, 1]


def test_training_data_do_not_silently_pass_for_test_data(caplog):
    data = torch.zeros(3, 4), torch.tensor([0, 1, 1])
    with caplog.at_level("WARNING", "cbs_opt"):
        open_samples(None, own_network(data, data), "test")
        assert not caplog.records
        open_samples(None, own_network(data), "test")
    assert "no test data" in caplog.text
