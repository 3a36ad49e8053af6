"""RecBole's SASRec: its data set with one sample per prefix, its loader, its trainer.

RecBole sorts by timestamps in float32, which cannot tell neighbouring seconds apart; here an interaction's time is
its place in its user's sequence, so that RecBole trains on the same order.
"""

import logging
import time

import common
import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.utils import get_dataloader
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed

NAME = "prepared"
TRAIN_ALL, LEAVE_ONE_OUT = {"RS": [1.0, 0.0, 0.0]}, {"LS": "valid_and_test"}


class Timed:
    """A loader that ends when the stopwatch says so."""

    def __init__(self, loader, stopwatch):
        self.loader, self.stopwatch, self.shuffle = loader, stopwatch, loader.shuffle

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return self.stopwatch.watch(self.loader)


def write_atomic_files(data, chosen):
    """RecBole's files: the interactions ``chosen`` (mask), and every item of the catalog."""
    rows = zip(data.users[chosen].tolist(), data.items[chosen].tolist(), data.positions[chosen].tolist(), strict=True)
    folder = common.Path(NAME)
    folder.mkdir()
    with (folder / f"{NAME}.inter").open("w") as stream:
        stream.write("user_id:token\titem_id:token\ttimestamp:float\n")
        stream.writelines(f"{user}\t{item}\t{position}\n" for user, item, position in rows)
    with (folder / f"{NAME}.item").open("w") as stream:
        stream.write("item_id:token\n")
        stream.writelines(f"{item}\n" for item in range(1, data.n_items + 1))


def configure(arguments, split):
    """RecBole's configuration; what is not named here keeps RecBole's default."""
    return Config(
        model="SASRec",
        dataset=NAME,
        config_dict={
            "data_path": ".",
            "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id"]},
            "MAX_ITEM_LIST_LENGTH": arguments.max_length,
            "n_layers": common.BLOCKS,
            "n_heads": common.HEADS,
            "hidden_size": common.HIDDEN,
            "inner_size": common.FEED_FORWARD,
            "hidden_dropout_prob": arguments.dropout,
            "attn_dropout_prob": arguments.dropout,
            "loss_type": "CE",
            "train_neg_sample_args": None,
            "train_batch_size": arguments.batch_size,
            "learning_rate": arguments.learning_rate,
            "enable_amp": arguments.precision == "bf16",
            "eval_args": {"split": split, "group_by": "user", "order": "TO", "mode": "full"},
            "metrics": ["Hit", "NDCG", "MRR"],
            "topk": [5, 10, 20],
            "valid_metric": "NDCG@10",
            "use_gpu": False,
            "seed": arguments.seed,
            "show_progress": False,
        },
    )


def time_own_evaluation(config, dataset):
    """Seconds of RecBole's own full ranking of the test items."""
    train, _, test = data_preparation(config, dataset)
    trainer = Trainer(config, SASRec(config, train.dataset))
    metrics = trainer.evaluate(test, load_best_model=False)
    seconds = common.time_passes(lambda: trainer.evaluate(test, load_best_model=False))
    return {"evaluation_seconds": seconds, "evaluated": len(test.dataset), "untrained_metrics": dict(metrics)}


def main():
    """Time or train, and print the result."""
    arguments = common.parse(__doc__.splitlines()[0], ("ce",), batch_size=2048)
    logging.disable(logging.WARNING)
    data = common.Sequences.load(arguments.data)
    if arguments.time_evaluation and not data.is_leave_one_out:
        raise SystemExit("error: RecBole's own evaluation needs a leave-one-out split")
    started = time.perf_counter()
    everything = arguments.time_evaluation
    write_atomic_files(data, np.ones(len(data.items), bool) if everything else data.part == common.PARTS["train"])
    config = configure(arguments, LEAVE_ONE_OUT if everything else TRAIN_ALL)
    init_seed(arguments.seed, reproducibility=True)
    dataset = create_dataset(config)
    if everything:
        return common.finish(arguments, "recbole", "recbole", time_own_evaluation(config, dataset))
    train_set = dataset.build()[0]
    loader = get_dataloader(config, "train")(config, train_set, None, shuffle=True)
    model = SASRec(config, train_set)
    trainer = Trainer(config, model)
    figures = {
        "targets_per_epoch": len(train_set),
        "feed_forward": model.inner_size,
        "preparation_seconds": time.perf_counter() - started,
    }
    if arguments.epochs:
        own = [int(token) for token in train_set.field2id_token["item_id"][1:]]
        score = scorer(model, common.numbering(own, data.n_items))
        journal = common.Journal(arguments, data, score, model)
        while not journal.done:
            journal.begin()
            trainer._train_epoch(loader, len(journal.epochs))
            journal.end()
        figures |= journal.result()
    else:
        stopwatch = common.Stopwatch(arguments.seconds)
        while not stopwatch.done:
            trainer._train_epoch(Timed(loader, stopwatch), 0)
        figures |= stopwatch.figures(len(loader))
    return common.finish(arguments, "recbole", "recbole", figures)


def scorer(model, mapping):
    """From left-padded histories to scores in the catalog's order; RecBole pads at the right."""

    def score(histories):
        rows = common.renumber(histories, mapping)
        lengths = (rows > 0).sum(1)
        places = (torch.arange(rows.shape[1]) - lengths[:, None]) % rows.shape[1]
        states = model.forward(rows.gather(1, places), lengths)
        return common.in_catalog_order(states @ model.item_embedding.weight[1:].T, mapping)

    return score


if __name__ == "__main__":
    main()
