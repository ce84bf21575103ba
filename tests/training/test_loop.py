"""The duties after each step, worked out by hand."""

import pytest

from cifar10_resnet.config import RunConfig, training_config
from cifar10_resnet.options import Options
from cifar10_resnet.training.loop import Agenda, next_end


def settled(**settings) -> Options:
    return Options(ckpt_path="run", **settings).settled("cpu", "channels_last", 1)


def calls(first: int = 0, workers: int = 1, images: int = 100, **settings) -> list[tuple]:
    """Returns each call of a run of 10 steps of 10 images: its steps, and what is due after it."""
    run = RunConfig(training=training_config({"num_iterations": 10, "batch_size": 10}))
    settings = {"log_per_iterations": 5, **settings}
    agenda = Agenda(run, settled(**settings), images, workers)
    found, step = [], first
    while step < agenda.last:
        watched = "watched " if "watch" in agenda.due(step) else ""
        count = agenda.until_next(step)
        step += count
        due = agenda.due(step) - {"agree", "watch", "profile"}
        found.append((f"{watched}{count} to {step}", *sorted(due)))
    return found


END = ("end", "log", "save")


def test_without_a_limit_a_call_ends_before_each_log_whose_step_is_watched():
    assert calls(steps_per_call=100) == [
        ("4 to 4",),
        ("watched 1 to 5", "log"),
        ("4 to 9",),
        ("watched 1 to 10", *END),
    ]


def test_a_call_is_no_longer_than_it_may_be():
    assert [call[0] for call in calls(steps_per_call=3)] == [
        *("3 to 3", "1 to 4", "watched 1 to 5", "3 to 8", "1 to 9", "watched 1 to 10"),
    ]


def test_every_step_is_watched_if_every_step_is_logged():
    assert calls(8, log_per_iterations=1, steps_per_call=9) == [
        ("watched 1 to 9", "log"),
        ("watched 1 to 10", *END),
    ]


def test_the_end_logs_and_saves_wherever_it_is_and_is_not_watched_between_logs():
    assert calls(5, max_train_steps=7, steps_per_call=9) == [("2 to 7", *END)]


def test_saving_interrupts_a_call():
    due = calls(save_per_iterations=3, log_per_iterations=100, steps_per_call=100)
    assert due == [("3 to 3", "save"), ("3 to 6", "save"), ("3 to 9", "save"), ("1 to 10", *END)]


def test_evaluations_come_with_the_step_that_ends_an_epoch_and_with_the_last():
    due = calls(images=35, epochs_between_evals=1, log_per_iterations=100, steps_per_call=100)
    # 35, 70 and 105 images are through after 4, 7 and 11 steps of 10.
    assert due == [
        ("4 to 4", "evaluate"),
        ("3 to 7", "evaluate"),
        ("3 to 10", "end", "evaluate", "log", "save"),
    ]
    assert [next_end(step, 35, 10) for step in (0, 3, 4, 6, 7)] == [4, 4, 7, 7, 11]


def logs(length: int, **settings) -> list[int]:
    """Returns the steps after which a run of this length logs."""
    run = RunConfig(training=training_config({"num_iterations": length}))
    agenda = Agenda(run, settled(**settings), 50_000)
    return [step for step in range(1, agenda.last + 1) if "log" in agenda.due(step)]


def test_a_run_logs_at_least_twenty_times_by_default_and_every_200_steps_at_least():
    assert logs(7) == [1, 2, 3, 4, 5, 6, 7]
    assert logs(39) == list(range(1, 40))  # 39 / 20 is 1 and a rest
    assert logs(40) == list(range(2, 41, 2))
    assert logs(157) == [*range(7, 155, 7), 157]
    assert logs(3_999) == [*range(199, 3_981, 199), 3_999]
    assert logs(16_000) == list(range(200, 16_001, 200))


def test_the_logs_are_counted_over_the_steps_of_this_start_and_a_given_interval_stays():
    assert logs(64_000, max_train_steps=100) == list(range(5, 101, 5))
    assert logs(40, log_per_iterations=25) == [25, 40]


def test_a_profile_begins_before_its_first_step_and_ends_after_its_last():
    due = calls(profile_steps=(3, 4), log_per_iterations=100, steps_per_call=100)
    assert [call[0] for call in due] == ["2 to 2", "2 to 4", "6 to 10"]


def test_several_workers_agree_every_ten_steps_and_one_after_each_call():
    due = calls(7, workers=2, log_per_iterations=100, steps_per_call=100, max_train_steps=None)
    assert [call[0] for call in due] == ["3 to 10"]
    run = RunConfig(training=training_config({"num_iterations": 40}))
    options = settled(log_per_iterations=100, steps_per_call=100)
    together, alone = (Agenda(run, options, 1000, workers) for workers in (2, 1))
    assert [together.until_next(step) for step in (0, 4, 10)] == [10, 6, 10]
    assert ["agree" in together.due(step) for step in (9, 10, 11)] == [False, True, False]
    assert alone.until_next(0) == 40
    assert all("agree" in alone.due(step) for step in (1, 2, 40))


@pytest.mark.parametrize("first", [10, 12])
def test_nothing_is_left_of_a_run_that_is_over(first):
    assert calls(first) == []
