"""Preempted, requeued, a node killed, a node cut off: the bytes of a run that nothing happened to, on a real SLURM."""

import pytest


@pytest.mark.parametrize("recipe", ["bert_pretrain", "imagenet_train"])
def test_preempted_requeued_and_a_node_killed_on_two_nodes(stories, recipe):
    found = stories[recipe].result()
    assert found["state"] == "COMPLETED", found["output"]
    assert found["resumes"] == [1, 2, 3, 4]
    assert found["output"].count("and saved: requeued, the same command goes on") >= 2
    assert found["same"][0] and found["same"][2], found["same"][1]


@pytest.mark.parametrize("story", ["killed_slurmd", "pulled_cable"])
def test_ranks_that_are_cut_off_publish_nothing_more_and_end(stories, story):
    found = stories[story].result()
    assert found["state"] == "COMPLETED", found["output"]
    lease = found["lease"]
    assert (lease["token"], lease["restarts"], lease["host"] != found["node"]) == (2, 1, True)
    assert found["same"][0] and found["same"][2], found["same"][1]
