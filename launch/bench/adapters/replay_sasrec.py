"""RePlay's SasRec: its model, losses and batch transforms in a plain loop over tensors that are in memory.

The loop is Lightning's without its hooks and RePlay's without its parquet reading, so it costs RePlay nothing. Both of
RePlay's remedies against padding are in use unless ``--bucket 0``: columns that are padding in the whole batch are
trimmed, and the encoder runs over buckets of rows of similar length.
"""

import common
import torch
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn.lightning.optimizer import OptimizerFactory
from replay.nn.loss import CE, CESampled
from replay.nn.sequential import LengthBucketedQueryEncoder, SasRec
from replay.nn.transform import (
    GroupTransform,
    NextTokenTransform,
    RenameTransform,
    TargetAwareAdaptiveTrimTransform,
    UniformNegativeSamplingTransform,
    UnsqueezeTransform,
)

NEGATIVES = 256
ITEM = "item_id"


def schema_of(n_items):
    """One categorical sequence, the items; RePlay numbers them from 0 and pads with their number."""
    feature = TensorFeatureInfo(
        ITEM,
        feature_type=FeatureType.CATEGORICAL,
        is_seq=True,
        feature_hint=FeatureHint.ITEM_ID,
        feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, ITEM)],
        cardinality=n_items,
        embedding_dim=common.HIDDEN,
        padding_value=n_items,
    )
    return TensorSchema([feature])


class SameType(torch.nn.Module):
    """An encoder whose states have the type of its inputs: RePlay's buckets do not expect autocast to change it."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def reset_parameters(self):
        """Of the encoder."""
        self.encoder.reset_parameters()

    def forward(self, feature_tensors, input_embeddings, padding_mask, attention_mask):
        """The encoder's states."""
        states = self.encoder(feature_tensors, input_embeddings, padding_mask, attention_mask)
        return states.to(input_embeddings.dtype)


def build(arguments, schema, n_items):
    """The model."""
    body = SasRec.from_params(
        schema,
        embedding_dim=common.HIDDEN,
        num_heads=common.HEADS,
        num_blocks=common.BLOCKS,
        max_sequence_length=arguments.max_length,
        dropout=arguments.dropout,
        hidden_dim=common.FEED_FORWARD,
    ).body
    if arguments.bucket:
        body.encoder = LengthBucketedQueryEncoder(SameType(body.encoder), bucket_size=arguments.bucket)
    return SasRec(body, (CE if arguments.loss == "ce" else CESampled)(ignore_index=n_items))


def transforms(arguments, schema, n_items):
    """From a batch of sequences to the arguments of the model, as RePlay's default transforms for SasRec do it."""
    steps = [
        NextTokenTransform(label_name=ITEM, shift=1),
        RenameTransform({f"{ITEM}_mask": "padding_mask", "positive_labels_mask": "target_padding_mask"}),
    ]
    if arguments.bucket:
        steps.append(TargetAwareAdaptiveTrimTransform([ITEM, "positive_labels"]))
    if arguments.loss == "sampled":
        steps.append(UniformNegativeSamplingTransform(n_items, NEGATIVES))
    steps += [UnsqueezeTransform("target_padding_mask", -1), UnsqueezeTransform("positive_labels", -1)]
    return torch.nn.Sequential(*steps, GroupTransform({"feature_tensors": schema.names}))


def batches(sequences, n_items, size):
    """[size, L + 1] sequences in random order, as RePlay's parquet reader hands them out."""
    for rows in torch.randperm(len(sequences)).split(size):
        items = sequences[rows]
        yield {ITEM: torch.where(items > 0, items - 1, n_items), f"{ITEM}_mask": items > 0}


def scorer(model, n_items):
    """From left-padded histories to scores in the catalog's order."""

    def score(histories):
        items = torch.where(histories > 0, histories - 1, n_items)
        return model.forward_inference({ITEM: items}, histories > 0)["logits"]

    return score


def time_evaluation(arguments, data, score):
    """Seconds to score all test histories and take the best 20 of each."""
    targets = torch.from_numpy(data.targets("test"))

    def work():
        for chunk in targets.split(arguments.batch_size):
            score(data.histories(chunk.numpy(), arguments.max_length)).topk(20)

    return {"evaluation_seconds": common.time_passes(work), "evaluated": len(targets)}


def main():
    """Time or train, and print the result."""
    arguments = common.parse(
        __doc__.splitlines()[0],
        ("ce", "sampled"),
        batch_size=128,
        extend=lambda parser: parser.add_argument("--bucket", type=int, default=32, help="rows a bucket; 0: none"),
    )
    data = common.Sequences.load(arguments.data)
    schema = schema_of(data.n_items)
    model, prepare = build(arguments, schema, data.n_items), transforms(arguments, schema, data.n_items)
    optimizer = OptimizerFactory(learning_rate=arguments.learning_rate).create(model.parameters())
    sequences = data.training_windows(arguments.max_length + 1)
    score = scorer(model, data.n_items)

    def train(batches):
        for batch in batches:
            with common.autocast(arguments):
                loss = model(**prepare(batch))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    def epoch():
        return batches(sequences, data.n_items, arguments.batch_size)

    figures = {
        "targets_per_epoch": data.targets_per_epoch(arguments.max_length),
        "feed_forward": common.FEED_FORWARD,
        "bucket": arguments.bucket,
    }
    if arguments.time_evaluation:
        with torch.inference_mode():
            figures |= time_evaluation(arguments, data, score)
    elif arguments.epochs:
        journal = common.Journal(arguments, data, score, model)
        while not journal.done:
            journal.begin()
            train(epoch())
            journal.end()
        figures |= journal.result()
    else:
        stopwatch = common.Stopwatch(arguments.seconds)
        while not stopwatch.done:
            loss = train(stopwatch.watch(epoch()))
        figures |= {**stopwatch.figures(-(-len(sequences) // arguments.batch_size)), "last_loss": loss}
    common.finish(arguments, "replay", "replay-rec", figures)


if __name__ == "__main__":
    main()
