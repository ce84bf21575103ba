"""Downloads CIFAR-10 or CIFAR-100, verifies it and unpacks it.

    python cifar10_download_and_extract.py                      # into ./cifar-10-batches-bin
    python cifar10_download_and_extract.py --data_dir=~/data    # into ~/data/cifar-10-batches-bin
    python cifar10_download_and_extract.py --dataset=cifar100   # into ./cifar-100-binary
    python cifar10_download_and_extract.py --synthetic          # synthetic images, no download

A broken download resumes where it stopped. The data folder appears only once it is complete.
"""

import re
from pathlib import Path

from absl import flags

from cifar10_resnet import storage
from cifar10_resnet.cli import app
from cifar10_resnet.cli.guard import exits_with_a_sentence
from cifar10_resnet.data import archive, download
from cifar10_resnet.data.data_folder import DataFolder
from cifar10_resnet.errors import UserError
from cifar10_resnet.formats import FORMATS, Digest
from cifar10_resnet.terminal import command

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", ".", "Folder that gets cifar-10-batches-bin or cifar-100-binary")
flags.DEFINE_enum("dataset", "cifar10", ["cifar10", "cifar100"], "Data set to download")
flags.DEFINE_multi_string("url", None, "Download address (repeat the flag for mirrors)")
flags.DEFINE_string("sha256", None, "Expected SHA-256 of the archive")
flags.DEFINE_bool("keep_archive", False, "Keep the archive after unpacking")
flags.DEFINE_float("timeout", 30, "Seconds to wait for a silent server")
flags.DEFINE_bool("synthetic", False, "Write synthetic images instead of downloading")
for split, kind, default in (("train", "training", 10_000), ("test", "test", 2_000)):
    about = f"Number of synthetic {kind} images"
    flags.DEFINE_integer(f"synthetic_{split}_images", default, about, 1, 10 * default)
flags.DEFINE_integer("seed", 0, "Random seed of the synthetic images", 0, 2**32 - 1)
FLAG_GROUPS = {
    "Where to": ("data_dir",),
    "Download": ("dataset", "url", "sha256", "keep_archive", "timeout"),
    "Synthetic images": ("synthetic", "synthetic_train_images", "synthetic_test_images", "seed"),
}
ADDRESS = r"(?ai)https?://(\[[\da-f:.]+\]|[\w.-]+)(:\d+)?(/[!-~]*)?|file:(//)?/(?!/)[!-~]+"
is_address = re.compile(ADDRESS).fullmatch
for name, is_valid, what in (
    ("url", lambda urls: all(map(is_address, urls or ())), "an http, https or file address"),
    ("sha256", lambda text: re.fullmatch("(?i)[0-9a-f]{64}", text or "0" * 64), "64 hex digits"),
    ("timeout", lambda seconds: 0 < seconds <= 3600, "above 0 and at most 3600"),
    ("synthetic_train_images", lambda count: count % 5 == 0, "a multiple of 5"),
):
    flags.register_validator(name, is_valid, f"it must be {what}")


@exits_with_a_sentence
def main(argv: list[str]) -> int:
    """Provides the data that the flags ask for, unless it is there."""
    for name in FLAG_GROUPS["Download" if FLAGS.synthetic else "Synthetic images"]:
        if FLAGS[name].value != FLAGS[name].default:
            how = "with" if FLAGS.synthetic else "without"
            raise UserError(f"--{name} does not work {how} --synthetic. Remove it.")
    try:
        provide_data()
    except BrokenPipeError:
        raise  # It says nothing of the data.
    except OSError as error:
        raise UserError(
            f"cannot use {error.filename or FLAGS.data_dir}: {error.strerror or error}. Solve "
            "this or use another --data_dir, then run the same command again."
        ) from error
    return 0


def provide_data() -> None:
    """Puts the data where the trainer looks, and prints the command that trains on it."""
    data_dir, file_format = Path(FLAGS.data_dir), FORMATS[FLAGS.dataset]
    folder = DataFolder(data_dir / file_format.folder, file_format)
    wanted = f"archive with the SHA-256 {FLAGS.sha256.lower()}" if FLAGS.sha256 else None
    if FLAGS.synthetic:
        from cifar10_resnet.data import synthetic  # and with it NumPy

        sizes = FLAGS.synthetic_train_images, FLAGS.synthetic_test_images, FLAGS.seed
        wanted = synthetic.source(*sizes)
    if not folder.holds(wanted):
        data_dir.mkdir(parents=True, exist_ok=True)
        refusal = f"--data_dir={data_dir} is in use by another run. Wait, or use another folder."
        with storage.lock(data_dir, refusal):
            if FLAGS.synthetic:
                with folder.replacing(wanted) as part:
                    synthetic.write(part, *sizes)
            else:
                fetch_and_unpack(folder)
        print(f"{'synthetic data' if FLAGS.synthetic else file_format.title} is in {folder.path}")
    print(f"next: {command('run_trainer.py', f'--path={folder.path}')}", flush=True)


def fetch_and_unpack(folder: DataFolder) -> None:
    """Fills a data folder from its archive, which is downloaded unless the user has it there."""
    title, official = folder.file_format.title, folder.file_format.archive
    digest = Digest("sha256", FLAGS.sha256.lower()) if FLAGS.sha256 else official.digest
    kept = Path(FLAGS.data_dir) / official.file
    part = kept.with_name(f"{kept.name}.part")
    # An archive that was there before this run is the user's: it is read and left alone.
    source = kept if kept.exists() else part
    if source == part:
        download.obtain(part, digest, FLAGS.url or [official.url], FLAGS.timeout, title)
    elif (actual := download.digest_of(kept, digest)) != digest:
        raise UserError(
            f"{kept} has the {actual}, not the expected {digest.value}. Move it away to download "
            "it again, or use its own SHA-256 as --sha256."
        )
    print(f"unpacking {source}", flush=True)
    try:
        with folder.replacing(f"archive with the {digest}") as data:
            archive.unpack(source, folder.file_format, data)
    except archive.BadData as problem:
        storage.remove(part)
        raise UserError(
            f"cannot unpack {source}: {problem}. Nothing of it was kept. Use the --url and "
            f"--sha256 of an archive that contains {title}'s binary version."
        ) from None
    if source == part:
        part.replace(kept) if FLAGS.keep_archive else part.unlink()


if __name__ == "__main__":
    app.run(main, FLAG_GROUPS)
