"""TF_CONFIG, which lists the workers."""

import pytest
from programs import error_of, without_tensorflow

from cifar10_resnet.distributed import cluster
from cifar10_resnet.errors import UserError


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"cluster": {"worker": ["a:1", "b:1"]}}',
        '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}',
        '{"cluster": {"ps": ["a:1", "b:1"]}, "task": {"type": "ps", "index": 0}}',
        '{"cluster": {"worker": [1, 2]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a", "b"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a:0", "b:1"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a:65536", "b:1"]}, "task": {"type": "worker", "index": 0}}',
    ],
)
def test_a_tf_config_that_names_no_place_for_this_process_is_refused(text, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UserError, match="does not list this worker"):
        cluster.from_environment()


def test_a_tf_config_with_an_address_twice_is_refused(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", cluster.to_tf_config(["a:1", "b:1", "a:1"], 1))
    with pytest.raises(UserError, match=r"a:1.* is invalid: it lists an address twice"):
        cluster.from_environment()


def test_a_tf_config_is_read_as_it_was_written(monkeypatch):
    for text in ("", "{}", '{"task": {"type": "worker", "index": 0}}'):
        monkeypatch.setenv("TF_CONFIG", text)
        assert cluster.from_environment() is None
    monkeypatch.setenv("TF_CONFIG", cluster.to_tf_config(["a:1", "b:1"], 1))
    assert cluster.from_environment() == cluster.Cluster(("a:1", "b:1"), 1)
    assert cluster.from_environment().name(1) == "worker 1 (b:1)"


def test_workers_with_the_same_list_have_the_same_token_whatever_the_form_of_tf_config(monkeypatch):
    def token(text: str) -> str:
        monkeypatch.setenv("TF_CONFIG", text)
        return cluster.from_environment().token

    text = cluster.to_tf_config(["a:1", "b:1"], 0)
    assert token(cluster.to_tf_config(["a:1", "b:1"], 1).replace(" ", "")) == token(text)
    others = [["b:1", "a:1"], ["a:1", "b:2"], ["a:1", "b:1", "c:1"]]
    assert all(token(cluster.to_tf_config(other, 0)) != token(text) for other in others)


def test_a_cluster_that_is_asked_for_but_not_named_is_an_error_before_tensorflow_starts(tmp_path):
    without = without_tensorflow(tmp_path) | {"TF_CONFIG": ""}
    wrong = ("run_trainer.py", "--distribution_strategy=multi_worker", "--use_synthetic_data")
    assert "needs TF_CONFIG" in error_of(*wrong, env=without)
