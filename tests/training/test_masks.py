"""Images with masks: what is found in a folder, what is refused, how both are cropped, and whole runs."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from runs import interrupt_after, log, trainer

from auglocal_ext.cli import main
from auglocal_ext.tasks import Segmentation
from auglocal_ext.training import DataError, Interrupted, MaskFiles, SettingsError, load_data, load_run
from auglocal_ext.training.data.joint_crop import JointCrop
from auglocal_ext.training.data.mask_file import read_mask
from auglocal_ext.training.run.curves import read_curves
from auglocal_ext.training.run.kinds import kind_of
from auglocal_ext.training.run.measures import MIOU
from auglocal_ext.training.run.metrics import EpochSums, StepResult

SMALL = "torchvision:lraspp_mobilenet_v3_large"


def write(root, split, name, mask, image=None):
    """A grey image with the classes of the mask told by its brightness, and the mask."""
    for part in ("images", "masks"):
        (root / split / part).mkdir(parents=True, exist_ok=True)
    mask = np.asarray(mask, dtype=np.uint8)
    image = np.repeat((mask % 8 * 30)[..., None], 3, -1).astype(np.uint8) if image is None else image
    Image.fromarray(image).save(root / split / "images" / f"{name}.png")
    Image.fromarray(mask).save(root / split / "masks" / f"{name}.png")


def rectangles(seed, height=24, width=32):
    """Classes 0, 1 and 2, and a line of ignored pixels."""
    mask = np.zeros((height, width), np.uint8)
    row, column = np.random.default_rng(seed).integers(2, 8, 2)
    mask[row : row + 10, column : column + 10] = 1
    mask[row : row + 10, column + 12 : column + 20] = 2
    mask[row] = 255
    return mask


@pytest.fixture
def small():
    """A network for segmentation that is made in a moment."""
    pytest.importorskip("torchvision", exc_type=Exception, reason="needs torchvision")
    return SMALL


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "shapes"
    for split, count in (("train", 6), ("test", 3)):
        for i in range(count):
            write(root, split, f"{i}", rectangles(i, 24 + i))
    return root


def load(root, **options):
    return load_data(root, workers=0, progress=False, streamed_size=32, **options)


def test_pairs_are_found_and_classes_counted(folder):
    found = load(folder)
    assert isinstance(found, MaskFiles) and found.name == "masks" and found.classes == ("0", "1", "2")
    assert (found.train_count, found.test_count, found.input_shape) == (6, 3, (3, 32, 32))
    assert [path.rpartition("shapes/")[2] for path in found.train.masks[:2]] == [
        "train/masks/0.png",
        "train/masks/1.png",
    ]
    write(folder, "train", "0", np.where(rectangles(0) == 2, 3, rectangles(0)))
    part = load(folder, train_images=2)
    assert part.classes == ("0", "1", "2", "3") and "0.png" not in "".join(part.train.paths)  # a class it does not have
    (folder / "classes.txt").write_text("ground\nhouse\ntree\nroad\n")
    assert load(folder, train_images=2).classes == ("ground", "house", "tree", "road")
    assert load(folder, train_images=2).train_count == 2


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_modes_of_masks(tmp_path, mode):
    mask = rectangles(1) % 2 if mode == "1" else rectangles(1)
    image = Image.fromarray(mask)
    if mode == "P":
        image = Image.fromarray(mask, "L")
        palette = Image.new("P", image.size)
        palette.putpalette(list(np.random.default_rng(0).permutation(256).repeat(3)))
        palette.putdata(list(mask.flatten().tolist()))
        image = palette
    elif mode == "1":
        image = Image.fromarray(mask.astype(bool))
    image.save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as stored:
        assert stored.mode == mode
    assert torch.equal(read_mask(str(tmp_path / "mask.png")), torch.from_numpy(mask))


def test_grey_masks_of_four_bits(tmp_path):
    """Pillow multiplies their values by 17."""
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header, rows = struct.pack(">IIBBBBB", 4, 1, 4, 0, 0, 0, 0), bytes([0, 0x01, 0x2F])
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "mask.png").write_bytes(png)
    assert read_mask(str(tmp_path / "mask.png")).tolist() == [[0, 1, 2, 15]]


def _no_mask(root):
    (root / "train" / "masks" / "3.png").unlink()


def _no_image(root):
    (root / "test" / "images" / "1.png").unlink()


def _jpeg_mask(root):
    (root / "train" / "masks" / "0.png").rename(root / "train" / "masks" / "0.jpg")


def _jpeg_named_png(root):
    Image.fromarray(rectangles(0)).save(root / "train" / "masks" / "0.png", format="JPEG")


def _twice(root):
    Image.fromarray(rectangles(0)).save(root / "train" / "images" / "0.jpg")


def _other_size(root):
    Image.fromarray(rectangles(0, 10)).save(root / "train" / "masks" / "2.png")


def _damaged_mask(root):
    file = root / "test" / "masks" / "2.png"
    file.write_bytes(file.read_bytes()[:60])


def _damaged_image(root):
    file = root / "train" / "images" / "4.png"
    file.write_bytes(file.read_bytes()[:80])


def _colours(root):
    Image.fromarray(rectangles(1, 25)).convert("RGB").save(root / "train" / "masks" / "1.png")


def _sixteen_bits(root):
    Image.fromarray(rectangles(1, 25).astype(np.uint16)).save(root / "train" / "masks" / "1.png")


def _gap(root):
    write(root, "train", "0", rectangles(0) * 10)


def _new_in_test(root):
    write(root, "test", "0", np.where(rectangles(0) == 2, 7, rectangles(0)))


def _beyond_the_names(root):
    (root / "classes.txt").write_text("ground\nhouse\n")


def _wrong_names(root):
    (root / "classes.txt").write_text("ground\n\nhouse\n")


def _one_class(root):
    for i in range(6):
        write(root, "train", f"{i}", np.where(rectangles(i) == 1, 255, 0))


def _nothing_to_test(root):
    for i in range(3):
        write(root, "test", f"{i}", np.full((8, 8), 255))


def _turned(root):
    image = Image.fromarray(np.zeros((24, 32, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 3
    image.save(root / "train" / "images" / "0.png", exif=exif)


def _no_test(root):
    (root / "test").rename(root / "val")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_mask, r"images without a mask: \S*train/images/3.png; masks without an image: none"),
        (_no_image, r"images without a mask: none; masks without an image: \S*test/masks/1.png"),
        (_jpeg_mask, "masks are PNG files.*masks/0.jpg"),
        (_jpeg_named_png, "train/masks/0.png: .*(cannot identify image file|is a JPEG file)"),
        (_twice, r"images/0.jpg and \S*images/0.png have the same name"),
        (_other_size, r"masks/2.png: the mask is 32 pixels wide and 10 high, its image \S*2.png 32 wide and 26 high"),
        (_damaged_mask, "test/masks/2.png: unreadable image"),
        (_damaged_image, "train/images/4.png: unreadable image"),
        (_colours, "masks/1.png: the mask is of Pillow's mode RGB, but the value of a pixel must be its class"),
        (_sixteen_bits, "masks/1.png: the mask is of Pillow's mode I"),
        (_gap, "train/masks: classes are numbered from 0 without gaps, but the masks hold the values 0, 1, 2, 10, 20"),
        (_new_in_test, "test/masks/0.png: the value 7 at row .* is no class: expected 0 to 2, or 255"),
        (_beyond_the_names, "train/masks/0.png: the value 2 at row .* is no class: expected 0 to 1, or 255"),
        (_wrong_names, "classes.txt: expected the names of 2 to 255 classes, .* got 3 lines: 'ground', '', 'house'"),
        (_one_class, "at least two classes are needed, found the values 0 .*write 1 for 255"),
        (_nothing_to_test, "test/masks: every pixel has the value 255"),
        (_turned, "images/0.png: EXIF orientation 3 rotates or mirrors this image for display"),
        (_no_test, "test: no such folder; expected train/images/<name>.jpg .*rename or link it to 'test'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message):
        load(folder)


def test_networks_and_data_that_do_not_go_together(config, small):
    def check(network, dataset, mixes=False):
        kind_of(network).check(config(network=network, mixup=0.2 if mixes else None), dataset)

    check(small, "masks")
    check("resnet8", "folder", mixes=True)
    for name, dataset, mixes, message in (
        ("resnet8", "masks", False, "choose a network for segmentation, such as torchvision:fcn_resnet50"),
        (small, "folder", False, "the data has one class per image"),
        (small, "masks", True, "--mixup and --cutmix"),
    ):
        with pytest.raises(SettingsError, match=message):
            check(name, dataset, mixes)


def test_image_and_mask_are_cropped_alike():
    """The image says at each pixel which class the mask has, so that both can be compared after any crop."""
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(60), indexing="ij")
    mask = (rows // 20 * 3 + columns // 20).to(torch.uint8)
    image = (40 * mask).expand(3, 40, 60).clone()
    crop = JointCrop(48, (250, 251, 252), (0.5, 2.0), flip=True)
    covered, agreed = [], []
    for seed in range(40):
        torch.manual_seed(seed)
        pixels, labels = crop(image, mask)
        assert pixels.shape == (3, 48, 48) and labels.shape == (48, 48) and pixels.dtype == labels.dtype == torch.uint8
        inside = labels != 255
        assert torch.equal(pixels[:, ~inside], torch.tensor([[250], [251], [252]]).expand_as(pixels[:, ~inside]))
        near = (pixels[0][inside].float() / 40 - labels[inside]).abs() < 0.5
        covered.append(float(inside.float().mean()))
        agreed.append(float(near.float().mean()))
    assert min(agreed) > 0.9  # but for what is blurred at the borders
    assert min(covered) < 0.25 and max(covered) == 1.0


def test_test_images_are_whole_and_keep_their_proportions():
    mask = torch.zeros(20, 40, dtype=torch.uint8)
    mask[:, 20:] = 1
    image = torch.full((3, 20, 40), 9, dtype=torch.uint8)
    pixels, labels = JointCrop(20, (0, 0, 0))(image, mask)
    expected = torch.full((20, 20), 255, dtype=torch.uint8)
    expected[5:15, :10], expected[5:15, 10:] = 0, 1
    assert torch.equal(labels, expected)
    assert pixels[:, 5:15].eq(9).all() and pixels[:, :5].eq(0).all() and pixels[:, 15:].eq(0).all()


def test_sums_of_masks_over_processes():
    task = Segmentation(2)
    whole, parts = EpochSums(3, torch.device("cpu"), task), []
    counts = torch.arange(12).reshape(3, 2, 2).flip(1)
    counted = 7
    whole.add(StepResult(torch.tensor(6.0), torch.tensor([1.0, 2.0, 3.0]), counts, counted), 4)
    for stage, (first, last) in enumerate([(0, 1), (1, 3)]):
        part = EpochSums(last - first, torch.device("cpu"), task)
        losses = torch.tensor([1.0, 2.0, 3.0])[first:last]
        part.add(StepResult(losses.sum(), losses, counts[first:last], counted), 4)
        parts.append((stage, first, part.state_dict()))
    joined = EpochSums.joined(parts, whole, 3)
    assert joined.read() == whole.read()
    reading = whole.read()
    mious = reading.measured[MIOU]
    assert reading.metric == (MIOU, mious[-1]) and math.isfinite(mious[-1])
    assert reading.accuracy == pytest.approx((10 + 11) / 7)
    again = EpochSums(2, torch.device("cpu"), task)
    again.load_part(joined.state_dict(), 1, 0, 1)
    assert again.read().measured[MIOU] == mious[1:]


def settings(config, folder, **options):
    return config(
        **{
            "data": str(folder),
            "network": SMALL,
            "width": None,
            "image_size": 32,
            "epochs": 1,
            "batch_size": 3,
            **options,
        }
    )


def test_a_run_logs_miou_and_pixel_accuracy(config, folder, small, tmp_path):
    data = load(folder)
    run = trainer(settings(config, folder, rule="bp"), data)
    assert run.config.recipe == "masks" and run.config.weight_decay == 1e-4
    summary = run.fit()
    with open(f"{run.config.output}/log.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    run.network.eval()
    counts, counted, task = 0, 0, Segmentation(3)
    for images, masks in run._batches.test():
        assert masks.shape == (len(images), 32, 32) and masks.dtype == torch.int64
        with torch.no_grad():
            counts = counts + task.count(run.network(images)["out"], masks)
        counted += int(task.counted(masks))
    miou, pixels = float(task.measure(counts, counted)), int(counts[0].sum()) / counted
    assert (float(row["test_miou"]), float(row["test_accuracy"])) == pytest.approx((miou, pixels))
    assert (summary.last_miou, summary.last_accuracy, summary.best_epoch) == pytest.approx((miou, pixels, 1))
    assert float(row["module_mious"]) == float(row["train_miou"])
    curves = read_curves(run.output)
    assert curves.metric[0] == MIOU and curves.metric[2].tolist() == [float(row["test_miou"])]
    saved = load_run(run.output, "cpu")
    assert saved.classes == ("0", "1", "2")
    with pytest.raises(SettingsError, match="analyses are of networks that classify"):
        from auglocal_ext.analysis.selection import Settings, select

        select(Settings((str(run.output),), output=str(tmp_path / "analysis")))


@pytest.mark.slow
def test_local_modules_learn_and_a_stopped_run_goes_on(config, folder, small, tmp_path):
    data = load(folder)
    options = {"rule": "greedy", "head": "fcn", "modules": 2, "epochs": 2}
    straight = settings(config, folder, **options, output=str(tmp_path / "straight"))
    trainer(straight, data).fit()
    stopped = settings(config, folder, **options, output=str(tmp_path / "stopped"))
    first = trainer(stopped, data)
    interrupt_after(first, 3)
    with pytest.raises(Interrupted, match="in epoch 2 after 1 of 2 steps"):
        first.fit()
    torch.manual_seed(999)
    second = trainer(stopped, data)
    second.resume()
    second.fit()
    assert log(stopped) == log(straight)
    assert len(log(straight)[0]["module_mious"].split()) == 2
    assert load_run(second.output, "cpu").network.num_modules == 2


@pytest.mark.slow
def test_the_command(folder, small, tmp_path, capsys):
    command = ["train", "--data", str(folder), "--network", small, "--rule", "greedy", "--modules", "2"]
    options = ["--image-size", "32", "--epochs", "1", "--device", "cpu", "--workers", "2"]
    assert main([*command, *options, "--output", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "6 train and 3 test images of 32 x 32 with masks, 3 classes" in " ".join(out.split())
    assert "batch size 8: more than the 6 images; a smaller --batch-size makes more steps" in " ".join(out.split())
    assert "mIoU" in out and "accuracy" not in out and "of them right" in out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["dataset"] == "masks"
    assert main(["cuts", "--network", small, "--input-shape", "3", "64", "64"]) == 0
    assert "it can be cut at" in capsys.readouterr().out
