"""The kill drill in short; `make drill` is the long form."""

import drill
from conftest import random_images


def test_a_run_killed_again_and_again_ends_with_the_bytes_of_one_left_unchanged(
    write_cifar10, tmp_path
):
    data = write_cifar10(random_images(80, seed=1))
    drill.drill(data, tmp_path, steps=40, kills=len(drill.KINDS), seed=4)
