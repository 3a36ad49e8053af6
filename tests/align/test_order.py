from align.order import PairOrder


def test_every_training_pair_once_an_epoch_and_nothing_held_out(small_data):
    order = PairOrder(small_data, max_length=5, seed=1)
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
