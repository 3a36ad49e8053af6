"""RecTools' SASRec: SASRecModel with its own Lightning trainer, or the flat net of its fast_transformers.

``ce`` and ``sampled`` train SASRecModel. ``fast-ce`` trains FlatSASRecNet with full cross-entropy: RecTools ships that
net without a trainer, here it has a plain loop over RecTools' own fast sequences.
"""

import logging
import warnings

import common
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.fast_transformers import FlatSASRecNet, SequenceBatchDataset, build_sequences
from rectools.models import SASRecModel
from torch.nn import functional
from torch.utils.data import DataLoader

NEGATIVES = 256
LOSSES = {"ce": "softmax", "sampled": "sampled_softmax"}
MANY = 10_000


class Watch(Callback):
    """Ends Lightning's training when the stopwatch says so."""

    def __init__(self, stopwatch):
        self.stopwatch = stopwatch

    def on_train_batch_end(self, trainer, *unused):
        """Count the batch."""
        trainer.should_stop = self.stopwatch.tick()

    def __deepcopy__(self, memo):
        return self  # RecTools copies its trainer


class Record(Callback):
    """Keeps the journal of Lightning's epochs; it begins when there is a model to score with."""

    def __init__(self, begin):
        self.begin, self.journal = begin, None

    def on_train_epoch_start(self, *unused):
        """Start the clock."""
        self.journal = self.journal or self.begin()
        self.journal.begin()

    def on_train_epoch_end(self, trainer, *unused):
        """Stop the clock and evaluate."""
        self.journal.end()
        trainer.should_stop = self.journal.done

    def __deepcopy__(self, memo):
        return self


def classic(arguments, callback, epochs):
    """SASRecModel; its trainer is as RecTools makes it, with a precision and a callback."""

    def trainer():
        return Trainer(
            max_epochs=epochs,
            min_epochs=0,
            precision={"fp32": "32-true", "bf16": "bf16-mixed"}[arguments.precision],
            callbacks=[callback],
            accelerator="cpu",
            devices=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
        )

    return SASRecModel(
        n_blocks=common.BLOCKS,
        n_heads=common.HEADS,
        n_factors=common.HIDDEN,
        dropout_rate=arguments.dropout,
        session_max_len=arguments.max_length,
        loss=LOSSES[arguments.loss],
        n_negatives=NEGATIVES,
        lr=arguments.learning_rate,
        batch_size=arguments.batch_size,
        get_trainer_func=trainer,
    )


def interactions(data, chosen):
    """RecTools' data set of the interactions ``chosen`` (mask), in their order."""
    columns = {
        Columns.User: data.users[chosen],
        Columns.Item: data.items[chosen],
        Columns.Weight: 1.0,
        Columns.Datetime: pd.to_datetime(data.positions[chosen], unit="s"),
    }
    return Dataset.construct(pd.DataFrame(columns))


def run_classic(arguments, data):
    """Figures of SASRecModel."""
    train = interactions(data, data.part == common.PARTS["train"])
    stopwatch = common.Stopwatch(0 if arguments.time_evaluation else arguments.seconds)
    if arguments.epochs:
        callback = Record(lambda: common.Journal(arguments, data, classic_scorer(model, data), net()))
    else:
        callback = Watch(stopwatch)
    model = classic(arguments, callback, arguments.epochs or MANY)

    def net():
        return model.lightning_model.torch_model

    model.fit(train)
    if arguments.epochs:
        return callback.journal.result()
    if arguments.time_evaluation:
        return time_own_evaluation(model, data)
    return stopwatch.figures(len(model.data_preparator.get_dataloader_train()))


def classic_scorer(model, data):
    """From left-padded histories to scores in the catalog's order."""
    mapping = common.numbering(model.data_preparator.get_known_item_ids().astype(int), data.n_items)
    net = model.lightning_model.torch_model

    def score(histories):
        items = net.item_model.get_all_embeddings()
        batch = {"x": common.renumber(histories, mapping)}
        states = net.similarity_module.session_tower_forward(net.encode_sessions(batch, items)[:, -1, :])
        return common.in_catalog_order(states @ net.similarity_module.item_tower_forward(items)[1:].T, mapping)

    return score


def time_own_evaluation(model, data):
    """Seconds of ``recommend`` for all users: RecTools has no other ranking of everything."""
    known = interactions(data, data.part != common.PARTS["test"])
    users = known.user_id_map.external_ids
    seconds = common.time_passes(lambda: model.recommend(users, known, k=20, filter_viewed=False))
    return {"evaluation_seconds": seconds, "evaluated": len(users)}


def run_flat(arguments, data):
    """Figures of FlatSASRecNet."""
    chosen = data.part == common.PARTS["train"]
    columns = (torch.from_numpy(column[chosen]) for column in (data.users, data.items, data.positions))
    inputs, targets, known, _ = build_sequences(*columns, max_len=arguments.max_length)
    loader = DataLoader(SequenceBatchDataset(inputs, targets), batch_size=arguments.batch_size, shuffle=True)
    net = FlatSASRecNet(len(known), common.HIDDEN, common.BLOCKS, common.HEADS, arguments.max_length, arguments.dropout)
    optimizer = torch.optim.Adam(net.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98))

    def train(batches):
        for batch in batches:
            with common.autocast(arguments):
                logits = net(batch)
                wanted = batch["y"].flatten() - 1
                loss = functional.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    if not arguments.epochs:
        stopwatch = common.Stopwatch(arguments.seconds)
        while not stopwatch.done:
            loss = train(stopwatch.watch(loader))
        return {**stopwatch.figures(len(loader)), "last_loss": loss}
    # torch's shortcut for attention without gradients makes the net's states of padded histories not a number.
    torch.backends.mha.set_fastpath_enabled(False)
    mapping = common.numbering(known, data.n_items)

    def score(histories):
        states = net.encode_last(common.renumber(histories, mapping))
        return common.in_catalog_order(states @ net.all_item_embeddings().T, mapping)

    journal = common.Journal(arguments, data, score, net)
    while not journal.done:
        journal.begin()
        train(loader)
        journal.end()
    return journal.result()


def main():
    """Time or train, and print the result."""
    arguments = common.parse(__doc__.splitlines()[0], ("ce", "sampled", "fast-ce"), batch_size=128)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    data = common.Sequences.load(arguments.data)
    flat = arguments.loss == "fast-ce"
    if flat and arguments.time_evaluation:
        raise SystemExit("error: the flat net has no evaluation of its own")
    figures = {
        "targets_per_epoch": data.targets_per_epoch(arguments.max_length),
        "feed_forward": 4 * common.HIDDEN if flat else common.HIDDEN,
    }
    figures |= (run_flat if flat else run_classic)(arguments, data)
    common.finish(arguments, "rectools", "rectools", figures)


if __name__ == "__main__":
    main()
