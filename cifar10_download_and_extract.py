"""Downloads CIFAR-10 or CIFAR-100, verifies it and unpacks it.

    python cifar10_download_and_extract.py                      # into ./cifar-10-batches-bin
    python cifar10_download_and_extract.py --data_dir=~/data    # into ~/data/cifar-10-batches-bin
    python cifar10_download_and_extract.py --dataset=cifar100   # into ./cifar-100-binary
    python cifar10_download_and_extract.py --synthetic          # synthetic images, no download

A broken download resumes where it stopped. The data folder appears only once it is complete.
"""

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cifar10_resnet import storage
from cifar10_resnet.cli import app
from cifar10_resnet.data import archive, download
from cifar10_resnet.data.data_folder import DataFolder
from cifar10_resnet.errors import UserError
from cifar10_resnet.formats import FORMATS, Digest
from cifar10_resnet.settings import Checked, setting
from cifar10_resnet.terminal import command

if TYPE_CHECKING:
    from cifar10_resnet.cli.flags import Flags

of_download = partial(setting, group="Download")
of_synthetic = partial(setting, group="Synthetic images")
ADDRESS = {
    "pattern": r"(?ai)https?://(\[[\da-f:.]+\]|[\w.-]+)(:\d+)?(/[!-~]*)?|file:(//)?/(?!/)[!-~]+",
    "meaning": "an http, https or file address",
}
DIGITS = {"pattern": "(?i)[0-9a-f]{64}", "meaning": "64 hex digits"}


@dataclass(frozen=True)
class Settings(Checked):
    data_dir: str = setting(
        ".", "Folder that gets cifar-10-batches-bin or cifar-100-binary", "Folder"
    )
    dataset: str = of_download("cifar10", "Data set to download", choices=("cifar10", "cifar100"))
    url: tuple[str, ...] = of_download(
        (), "Download address (repeat the flag for mirrors)", **ADDRESS
    )
    sha256: str | None = of_download(None, "Expected SHA-256 of the archive", **DIGITS)
    keep_archive: bool = of_download(False, "Keep the archive after unpacking")
    timeout: float = of_download(30.0, "Seconds to wait for a silent server", above=0, most=3600)
    synthetic: bool = of_synthetic(False, "Write synthetic images instead of downloading")
    synthetic_train_images: int = of_synthetic(
        10_000, "Number of synthetic training images", least=5, most=100_000, multiple=5
    )
    synthetic_test_images: int = of_synthetic(
        2_000, "Number of synthetic test images", least=1, most=20_000
    )
    seed: int = of_synthetic(0, "Random seed of the synthetic images", least=0, most=2**32 - 1)


def main(flags: "Flags") -> int:
    """Provides the data that the flags ask for, unless it already exists."""
    unused, how = ("Download", "with") if flags.synthetic else ("Synthetic images", "without")
    for item in fields(Settings):
        if item.metadata["group"] == unused and getattr(flags, item.name) != item.default:
            raise UserError(f"--{item.name} does not work {how} --synthetic. Remove it.")
    storage.refuse_remote(flags.data_dir)
    try:
        provide_data(flags)
    except BrokenPipeError:
        raise  # The output was closed. The data is not the cause.
    except OSError as error:
        raise UserError(
            f"{error.filename or flags.data_dir} cannot be used: {error.strerror or error}. Fix "
            "it, or use another --data_dir, and run the same command again."
        ) from error
    return 0


def provide_data(flags: "Flags") -> None:
    """Puts the data where the trainer looks, and prints the command that trains on it."""
    data_dir, file_format = Path(flags.data_dir), FORMATS[flags.dataset]
    folder = DataFolder(data_dir / file_format.folder, file_format)
    digest = Digest("sha256", flags.sha256.lower()) if flags.sha256 else None
    wanted = digest and _source(digest)
    if flags.synthetic:
        from cifar10_resnet.data import synthetic  # It imports NumPy.

        sizes = flags.synthetic_train_images, flags.synthetic_test_images, flags.seed
        wanted = synthetic.source(*sizes)
    if not folder.holds(wanted):
        storage.make_folders(data_dir)
        why = "is in use by another run. Wait, or use another folder."
        refusal = UserError(why, "data_dir", data_dir)
        with storage.lock(data_dir, refusal):
            if flags.synthetic:
                with folder.replacing(wanted) as part:
                    synthetic.write(part, *sizes)
            else:
                fetch_and_unpack(folder, digest or file_format.archive.digest, flags)
        print(f"{'synthetic data' if flags.synthetic else file_format.title} is in {folder.path}")
    print(f"next: {command('run_trainer.py', f'--path={folder.path}')}", flush=True)


def _source(digest: Digest) -> str:
    """Returns what a data folder records about its origin."""
    return f"archive with the {digest}"


def fetch_and_unpack(folder: DataFolder, digest: Digest, flags: "Flags") -> None:
    """Fills a data folder from its archive. Downloads the archive if the user does not have it."""
    title, official = folder.file_format.title, folder.file_format.archive
    kept = Path(flags.data_dir) / official.file
    part = kept.with_name(f"{kept.name}.part")
    # An archive that existed before this start is the user's, so it is read but not changed.
    source = kept if kept.exists() else part
    if source == part:
        download.obtain(part, digest, flags.url or [official.url], flags.timeout, title)
    elif (actual := download.digest_of(kept, digest)) != digest:
        raise UserError(
            f"{kept} has the {actual}, not the expected {digest.value}. Move it away to download "
            "it again, or use its own SHA-256 as --sha256."
        )
    print(f"unpacking {source}", flush=True)
    try:
        with folder.replacing(_source(digest)) as data:
            archive.unpack(source, folder.file_format, data)
    except archive.BadData as problem:
        storage.remove(part)
        raise UserError(
            f"{source} cannot be unpacked: {problem}. Nothing of it was kept. Use the --url and "
            f"--sha256 of an archive that contains {title}'s binary version."
        ) from None
    if source == part:
        storage.move(part, kept) if flags.keep_archive else part.unlink()


if __name__ == "__main__":
    app.run(main, Settings)
