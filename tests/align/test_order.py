import pytest
import torch

from align.config import AlignConfig, MainJob
from align.order import PairOrder, StepOrder, Turns, set_aside, training_data
from align.samples import SampleLog
from rec.data.splits import CONTEXT, TEST, TRAIN, VALID
from rec.runtime.config import build
from rec.runtime.errors import UserError


def test_every_training_pair_once_an_epoch_and_nothing_held_out(small_data):
    order = PairOrder(small_data, reach=5, seed=1)
    n = len(order.targets)
    pairs = [order.pair(ordinal) for ordinal in range(n)]
    expected = []
    for user in range(small_data.n_users):
        begin, end = small_data.offsets[user], small_data.train_ends[user]
        items = small_data.sequence[begin:end].tolist()
        expected += [(user, tuple(items[max(0, i - 5) : i]), items[i]) for i in range(1, len(items))]
    assert sorted((p.user, tuple(p.items), p.target) for p in pairs) == sorted(expected)


def test_a_sample_depends_on_seed_and_ordinal_alone(small_data):
    forwards, elsewhere = PairOrder(small_data, 5, seed=1), PairOrder(small_data, 5, seed=1)
    n = len(forwards.targets)
    wanted = [0, 1, n - 1, n, 2 * n + 3]
    first = [forwards.pair(ordinal) for ordinal in wanted]
    assert [elsewhere.pair(ordinal) for ordinal in reversed(wanted)] == first[::-1]
    assert [PairOrder(small_data, 5, seed=2).pair(ordinal) for ordinal in wanted] != first
    assert [forwards.pair(ordinal) for ordinal in range(n)] != [forwards.pair(n + ordinal) for ordinal in range(n)]


def test_without_users_set_aside_every_sample_rewards_and_fits(small_data):
    order, pairs = StepOrder(small_data, 0.0, 5, batch_size=4, seed=1), PairOrder(small_data, 5, seed=1)
    tasks = [task for step in range(3) for task in order.tasks(step)]
    assert [task.ordinal for task in tasks] == list(range(12))
    assert [task.pair for task in tasks] == [pairs.pair(ordinal) for ordinal in range(12)]
    assert all(task.rewards and task.fits for task in tasks)


def test_users_set_aside_reward_and_the_others_fit(small_data):
    order, aside = StepOrder(small_data, 0.25, 5, batch_size=4, seed=1), set_aside(small_data, 0.25, seed=1)
    assert int(aside.sum()) == round(0.25 * small_data.n_users)
    steps = 2 + len(PairOrder(small_data, 5, 1).targets) // 4
    tasks = [task for step in range(steps) for task in order.tasks(step)]
    assert [task.ordinal for task in tasks] == list(range(8 * steps))
    for task in tasks:
        assert (task.rewards, task.fits) == ((True, False) if aside[task.pair.user] else (False, True))
    every = {(user, target) for user in range(small_data.n_users)
             for target in range(small_data.offsets[user] + 1, small_data.train_ends[user])}  # fmt: skip
    assert len({(task.pair.user, tuple(task.pair.items), task.pair.target) for task in tasks}) <= len(every)
    assert {task.pair.user for task in tasks} == {user for user, _ in every}


def test_data_without_users_keeps_their_histories_and_tests_alone(small_data):
    aside = set_aside(small_data, 0.25, seed=1)
    kept = small_data.without(aside)
    theirs = torch.repeat_interleave(aside, small_data.offsets.diff())
    assert torch.equal(kept.part[~theirs], small_data.part[~theirs])
    assert set(kept.part[theirs].tolist()) == {CONTEXT, TEST}
    assert {TRAIN, VALID} <= set(small_data.part[theirs].tolist())
    assert torch.equal(kept.train_ends[aside], kept.offsets[:-1][aside])
    assert not set(kept.instances("valid")[0].tolist()) & set(torch.nonzero(aside).flatten().tolist())
    assert len(kept.instances("test")[0]) == len(small_data.instances("test")[0])


def test_somebody_is_left_on_either_side(small_data):
    for share, count in ((0.001, 1), (0.999, small_data.n_users - 1), (0.0, 0)):
        assert int(set_aside(small_data, share, seed=3).sum()) == count
    one = small_data.without(torch.arange(small_data.n_users) > 0)
    with pytest.raises(UserError, match="has 1 users with a training pair"):
        set_aside(one, 0.5, seed=3)


def test_fewer_training_users_are_some_of_the_same_users(small_data):
    def trained(share: float) -> set[int]:
        job = build(MainJob, {"data": "x", "run": "y", "train_users": share})
        data = training_data(job, small_data)
        assert len(data.instances("test")[0]) == len(small_data.instances("test")[0])
        return set(torch.nonzero(data.train_ends > data.offsets[:-1]).flatten().tolist())

    assert trained(1.0) == set(range(small_data.n_users))
    assert len(trained(0.5)) == small_data.n_users / 2
    assert trained(0.1) < trained(0.5)


@pytest.mark.parametrize(("several", "stretch"), [(1, 4), (2, 1), (2, 4), (3, 5)])
def test_every_step_is_one_generators_and_no_call_reaches_into_anothers(several, stretch):
    generators = [Turns(number, several, stretch) for number in range(several)]
    for step in range(100):
        [owner] = [one for one in generators if one.has(step)]
        end = owner.end(step)
        assert step < end <= step + stretch
        assert several == 1 or all(owner.has(other) for other in range(step, end))
        for one in generators:
            assert one.next(step) == next(other for other in range(step, 200) if one.has(other))


def test_a_generators_place_is_its_first_step_without_a_batch(tmp_path):
    log = SampleLog(tmp_path)
    for step in (0, 1, 4, 5, 6):
        log.append(step, [])
    assert log.next_step() == 2
    assert log.next_step(Turns(0, 2, 2).has) == 8
    assert log.next_step(Turns(1, 2, 2).has) == 2


def test_adapters_are_not_given_from_memory():
    with pytest.raises(UserError, match=r"weights=gloo is for whole models: adapters are small"):
        build(AlignConfig, {"weights": "gloo", "trainer": {"lora": {}}})


def test_several_generators_do_not_know_what_each_other_said_last():
    generator = {"processes": 2}
    assert build(AlignConfig, {"generator": generator}).generator.processes == 2
    with pytest.raises(UserError, match=r"others=newest needs generator\.processes=1"):
        build(AlignConfig, {"generator": generator, "others": "newest"})
